"""The power of the laws: faults that are planted on purpose, each of which a law must find."""
