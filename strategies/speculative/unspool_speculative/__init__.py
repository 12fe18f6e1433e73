"""Drafters: they guess what comes next, so that several tokens cost one pass. No guess ever changes a token."""
