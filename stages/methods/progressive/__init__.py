"""Halving the steps round by round (Salimans and Ho 2022, 2202.00512)."""
