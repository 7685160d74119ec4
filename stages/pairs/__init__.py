"""Stage kind `pairs`: solves the teacher's ODE from random noise and writes shards of (noise, latent, prompt).

`stage` plans the shards. `factory` is the worker that makes one shard. The format of shards and receipts is in
`stages.data`.
"""

from stages.pairs.stage import Pairs, guidance_scales

__all__ = ["Pairs", "guidance_scales"]
