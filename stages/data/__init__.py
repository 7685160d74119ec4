"""Records on disk and how they are read: shards and their receipts, latents, prompts, image sets, triplets, noise.

All of it works without torch. What a shard holds is computed in `stages.pairs`, what a latent is in `stages.networks`.
"""
