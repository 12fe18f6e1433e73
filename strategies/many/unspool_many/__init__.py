"""Strategies that draw many texts: best of n, self-consistency, minimum Bayes risk, particles."""
