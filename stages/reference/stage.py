"""`kind: reference`: real images, seen by the networks of the standard metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from stages.base import Artifact, Choice, Config, Content, Stage, StageContext
from stages.data.images.config import IMAGE_SETS, ImageSet
from stages.metrics.protocols import Preset

PATTERNS = ("*.json", "*.txt", "*.safetensors")
"""The files that are read of a network in the layout of the transformers library."""
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
    """Measures real images with the networks of the standard metrics: FID, KID, precision and recall, patch FID, the
    Fréchet distance of DINOv2 features (2306.04675), CLIP score and LPIPS diversity.

    An evaluation that names it in `reference` measures its samples with the same networks. The networks are copied to
    the artifact, and their sha256 is recorded. A figure whose network is not given is not measured. Nothing stands in
    for it.

    Papers' figures depend on how images are scaled and counted, so `preset` sets all of that. Both the real and the
    generated images are prepared as it says.
    """

    VERSION: ClassVar[int] = 1
    kind: Literal["reference"]
    preset: Preset = Field(
        description="coco2014_30k: 30,000 samples at 256 pixels; coco2017_5k: 5,000 at 512; sdxl_10k: 10,000 at 512, "
        "with patch FID; cifar10_50k: 50,000, not scaled"
    )
    images: Annotated[ImageSet, Choice("name", IMAGE_SETS)] = Field(
        description="the real images; all of them are used, also the held-out ones"
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
