"""Stage kind `probe`: trains a classifier of real images. Evaluations use its features and its predictions.

`stage` holds the settings. The network is in `stages.networks.probe`.
"""

from stages.probe.stage import Probe

__all__ = ["Probe"]
