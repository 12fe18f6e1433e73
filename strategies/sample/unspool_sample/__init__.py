"""Sampling, and the transforms that shape the distribution before it: a module an idea."""
