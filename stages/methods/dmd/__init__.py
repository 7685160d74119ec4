"""Distribution matching distillation with a regression term (Yin et al. 2023, 2311.18828)."""
