"""Stage kind `probe`: a classifier of real images, trained once and used by many evaluations.

`stage` holds the settings. The network is in `stages.networks.probe`.
"""

from stages.probe.stage import Probe

__all__ = ["Probe"]
