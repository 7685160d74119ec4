"""How a mixture is divided. Imports no NumPy: planning checks shares, too."""

BLOCK = 1024
"""Draws within which a mixture's shares are exact: a source with less than one of them is never drawn."""
