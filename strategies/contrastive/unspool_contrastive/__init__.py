"""Decoding by contrast: with the text so far, a weaker model, an earlier layer, another prompt. A module an idea."""
