"""Stage kind `pairs`: solves the teacher's ODE from random noise and writes shards of (noise, latent, prompt).

`stage` holds the settings and plans the shards. `factory` makes one shard at a time on a worker. `stages.data` defines
the format of shards and receipts.
"""

from stages.pairs.stage import Pairs, guidance_scales, stored_scale

__all__ = ["Pairs", "guidance_scales", "stored_scale"]
