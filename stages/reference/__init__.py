"""Stage kind `reference`: measures real images with the standard networks. Evaluations compare with them.

`stages.metrics.protocols` holds the published settings of FID and the other standard metrics. The networks are in
`stages.networks.standard`.
"""

from stages.reference.stage import Reference

__all__ = ["Reference"]
