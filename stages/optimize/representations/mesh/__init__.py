"""Meshes that the user gives: their geometry stays, their texture or vertex colours are optimised."""
