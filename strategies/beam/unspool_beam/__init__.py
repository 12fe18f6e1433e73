"""Beam search and what grew from it: each idea is a module of its own."""
