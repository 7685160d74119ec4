"""The resolution of mixture weights. Imports no NumPy, because planning checks weights, too."""

BLOCK = 1024
"""Mixture weights are rounded to multiples of 1/BLOCK, and every BLOCK draws have exactly these shares. A source with a
weight below 1/BLOCK would never be drawn."""
