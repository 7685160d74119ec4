"""LatentLPIPS as a loss, alone and as an ensemble over random transformations."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from torch import Tensor, nn

from stages.base import Artifact
from stages.losses.augmentation import Augmentation
from stages.losses.regression import l1
from stages.networks.perceptual import LPIPS

log = logging.getLogger(__name__)


class PerceptualLoss(nn.Module):
    """d(x0, x1), plus `l1_weight` times the mean absolute difference.

    With an augmentation T it is one draw of the ensemble E_T[d(T x0, T x1)], E-LatentLPIPS (Kang et al. 2024,
    2405.05967, section 3.2): T is the same for both inputs, another for each sample, and fresh at every call. The L1
    term sees what is not transformed; the paper's loss has none.
    """

    def __init__(self, metric: LPIPS, augmentation: Augmentation | None = None, l1_weight: float = 0.0) -> None:
        super().__init__()
        self.metric, self.augmentation, self.l1_weight = metric, augmentation, l1_weight

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Two (B, C, H, W) -> (B,)."""
        x0, x1 = output, target
        if self.augmentation is not None:
            self.metric.check(output, target)  # what is checked is what was given, not what it is made into
            draw = self.augmentation.draw(output)
            x0, x1 = self.augmentation(output, draw), self.augmentation(target, draw)
        distance: Tensor = self.metric(x0, x1)
        return distance + self.l1_weight * l1(output, target) if self.l1_weight else distance


def warn_of_another_space(network: Artifact, teacher: Path) -> None:
    """Log it if the latents that a network was trained on came of a VAE other than the teacher's."""
    if "latents" in network.inputs:
        own, other = _vae(network.inputs["latents"].inputs["teacher"].folder), _vae(teacher)
        if own != other:
            log.warning(
                "the VAE of this student's teacher is not the one in whose latents perceptual/%s was trained: "
                "distances mean less, or nothing, in another latent space",
                network.fingerprint,
            )


def _vae(teacher: Path) -> dict[str, str]:
    """Weights of a sealed teacher's VAE, by file."""
    files = json.loads((teacher / "artifact.json").read_text(encoding="utf-8"))["files"]
    return {name: file["sha256"] for name, file in files.items() if name.startswith("vae/") and "safetensors" in name}
