"""Stage kind `probe`: a classifier of real images, trained once and shared by evaluations.

`stage` holds its settings. The network is in `stages.networks.probe`.
"""

from stages.probe.stage import Probe

__all__ = ["Probe"]
