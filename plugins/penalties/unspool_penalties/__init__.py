"""Penalties, biases and bans on tokens: a module an idea."""
