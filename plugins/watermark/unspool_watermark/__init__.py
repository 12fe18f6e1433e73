"""Watermarks: text that says who wrote it, to whoever has the key. A module an idea."""
