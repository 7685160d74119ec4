"""Networks and their adapters: teachers, students, the discriminator, the latent VGG, the probe.

`network` is the contract of a teacher, `latent` and `pixel` are its two layouts, `teachers` loads one from a sealed
folder. How networks are trained is in `stages.training` and in the stage kinds.
"""
