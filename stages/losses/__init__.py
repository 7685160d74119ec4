"""Losses: distances between a student's output and its target, and the adversarial losses of Diffusion2GAN.

`config` holds the settings of distances by name, and imports no torch. Distances between sets of images are in
`stages.metrics`.
"""
