"""LatentLPIPS and E-LatentLPIPS as losses."""

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
    """The perceptual distance d(x0, x1), plus `l1_weight` times the mean absolute difference.

    With an augmentation T, it is a one-sample estimate of E_T[d(T x0, T x1)], which is E-LatentLPIPS (Kang et al. 2024,
    2405.05967, section 3.2). T is the same for both inputs. Every call draws a new T for each sample. The L1 term uses
    the inputs before the transformation; the paper's loss has no such term.
    """

    def __init__(self, metric: LPIPS, augmentation: Augmentation | None = None, l1_weight: float = 0.0) -> None:
        super().__init__()
        self.metric, self.augmentation, self.l1_weight = metric, augmentation, l1_weight

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the distances (B,) of two batches (B, C, H, W)."""
        x0, x1 = output, target
        if self.augmentation is not None:
            self.metric.check(output, target)  # check the inputs themselves, before the transformation
            draw = self.augmentation.draw(output)
            x0, x1 = self.augmentation(output, draw), self.augmentation(target, draw)
        distance: Tensor = self.metric(x0, x1)
        return distance + self.l1_weight * l1(output, target) if self.l1_weight else distance


def warn_of_another_space(network: Artifact, teacher: Path) -> None:
    """Log a warning if a perceptual network was trained on latents of a VAE other than the teacher's.

    teacher: the folder of a sealed teacher.
    """
    if "latents" in network.inputs:
        network_vae, teacher_vae = _vae(network.inputs["latents"].inputs["teacher"].folder), _vae(teacher)
        if network_vae != teacher_vae:
            log.warning(
                "perceptual/%s was trained on latents of another VAE than that of this student's teacher: its "
                "distances may be meaningless in this latent space",
                network.fingerprint,
            )


def _vae(teacher: Path) -> dict[str, str]:
    """Return file -> sha256 of the VAE's weights of a sealed teacher."""
    files = json.loads((teacher / "artifact.json").read_text(encoding="utf-8"))["files"]
    return {name: file["sha256"] for name, file in files.items() if name.startswith("vae/") and "safetensors" in name}
