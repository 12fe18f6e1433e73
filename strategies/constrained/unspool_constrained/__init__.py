"""Constraints: what a text must look like, whatever the strategy that writes it."""
