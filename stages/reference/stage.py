"""`kind: reference`: features of real images, for FID and the other standard metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from stages.base import Artifact, Choice, Config, Content, Stage, StageContext
from stages.data.images.config import IMAGE_SETS, ImageSet
from stages.metrics.protocols import Preset

PATTERNS = ("*.json", "*.txt", "*.safetensors")
"""The files of a network in the layout of the transformers library."""
NEEDS = {
    "inception": "fid, kid, precision and recall, patch_fid",
    "dinov2": "fd_dinov2",
    "clip": "clip_score",
    "lpips": "lpips_diversity",
}
"""Network -> the figures that need it."""


class Pretrained(Config):
    """A network in the layout of the transformers library."""

    source: Annotated[str, Content("revision", PATTERNS)] = Field(
        description="folder or hub id; its weights must be .safetensors files"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")


Weights = Annotated[
    Pretrained | None,
    BeforeValidator(
        lambda value: {"source": value} if isinstance(value, str) else value,
        json_schema_input_type=str | Pretrained | None,
    ),
]


class Reference(Stage):
    """Prepares the standard metrics: copies their networks, and computes the features of real images. The metrics are
    FID, KID, precision and recall, patch FID, FD-DINOv2 (the Fréchet distance of DINOv2 features, 2306.04675), CLIP
    score and LPIPS diversity.

    An evaluation with `reference: STAGE` measures its samples with these networks. Their sha256 is recorded. If a
    network is left out, its metrics are not measured, and no other network replaces it.

    The values of these metrics depend on the number of samples and on how images are scaled. `preset` names a published
    protocol. Real and generated images are scaled as it says, and an evaluation should have its number of samples.
    """

    VERSION: ClassVar[int] = 1
    kind: Literal["reference"]
    preset: Preset = Field(
        description="number of samples and their scaling; coco2014_30k: 30,000 samples at 256 pixels; coco2017_5k: "
        "5,000 at 512 pixels; sdxl_10k: 10,000 at 512 pixels, with patch FID; cifar10_50k: 50,000, not scaled"
    )
    images: Annotated[ImageSet, Choice("name", IMAGE_SETS)] = Field(
        description="the real images; all of them are used, even the held-out ones"
    )
    inception: Annotated[str | None, Content()] = Field(
        None,
        description="weights of the Inception network of FID: torch-fidelity's pt_inception-2015-12-05 as .pth, or the "
        "same tensors as .safetensors; a .pth file is read without running code from it",
    )
    dinov2: Weights = Field(None, description="DINOv2, such as facebook/dinov2-large")
    clip: Weights = Field(
        None, description="CLIP, such as laion/CLIP-ViT-g-14-laion2B-s12B-b42K (DMD2's) or openai/clip-vit-base-patch16"
    )
    lpips: Annotated[str | None, Content()] = Field(
        None, description="weights of torchvision's vgg16 (vgg16-397923af.pth), the trunk of LPIPS"
    )

    def warnings(self, inputs: Mapping[str, Artifact]) -> Iterator[str]:
        absent = [f"{figures} ({name})" for name, figures in NEEDS.items() if getattr(self, name) is None]
        if absent:
            yield f"not measured, because the weights are not given: {'; '.join(absent)}"

    def run(self, context: StageContext) -> Mapping[str, Any]:
        return context.run(_measure, self, context.contents, context.output, context.threads)


def _measure(*arguments: Any) -> Any:
    from stages.reference.measure import measure

    return measure(*arguments)
