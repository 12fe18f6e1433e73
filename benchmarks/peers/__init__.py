"""Peers: what `benchmarks/peers.py` and `benchmarks/curves.py` share, and one small server an engine.

A server (`*_server.py`) is run by the Python of its engine's own environment, so it imports nothing from here but
`protocol`, which needs the standard library alone.
"""
