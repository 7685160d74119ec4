"""Networks and their adapters: teachers, students, the discriminator, the latent VGG, the probe.

`adapter` defines the contract of a model family. `stable_diffusion` and `pixel` are the built-in families. `adapters`
chooses the adapter of a pipeline. `teachers` loads a teacher from a sealed folder. The training of networks is in
`stages.training` and in the stage kinds.
"""
