"""The mathematics of diffusion: noise schedules, prediction types, guidance, samplers.

Notation: `x0` is clean data, `noise` is standard normal, and z_t = alpha_t x0 + sigma_t noise with alpha_t^2 +
sigma_t^2 = 1. SNR = alpha^2 / sigma^2 and lambda = log SNR. A level is a pair (alpha, sigma). Most functions take both
torch tensors and NumPy arrays.
"""
