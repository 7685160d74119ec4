"""Diffusion arithmetic. Plain operators on arrays: the same functions serve torch tensors and NumPy arrays.

Notation, as in diffusers: `x0` is data, `noise` is standard normal, `z_t = alpha_t x0 + sigma_t noise`.
"""
