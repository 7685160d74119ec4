"""Stage kind `pairs`: the teacher's ODE solved from random noise, written as shards of (noise, latent, prompt).

`stage` plans the shards, `factory` is the worker that makes one. The format of shards and receipts is in `stages.data`.
"""

from stages.pairs.stage import Pairs, guidance_scales

__all__ = ["Pairs", "guidance_scales"]
