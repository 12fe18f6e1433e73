"""The test kit: exact models, drafters that try to be seen, runs under bad circumstances, and the laws to check."""
