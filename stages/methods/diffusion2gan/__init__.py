"""One-step regression with a conditional GAN (Kang et al. 2024, 2405.05967)."""
