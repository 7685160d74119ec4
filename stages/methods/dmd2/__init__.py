"""Distribution matching in one or several steps, without pairs (Yin et al. 2024, 2405.14867)."""
