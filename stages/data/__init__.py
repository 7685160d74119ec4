"""Reads and writes data on disk: shards of pairs, latents, prompts, image sets and triplets. Also draws noise.

Each shard has a receipt, a parquet file with the statistics and hashes of its pairs. Nothing here needs torch.
`stages.pairs` computes the pairs of a shard. The networks in `stages.networks` encode latents.
"""
