"""Consistency distillation (Song et al. 2023, 2303.01469), also of latent models (Luo et al. 2023, 2310.04378)."""
