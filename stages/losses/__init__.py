"""Distances of a student's output to its target, by name, and the adversarial losses of Diffusion2GAN.

`config` holds their settings and imports no torch. Distances between whole sets of images are in `stages.metrics`.
"""
