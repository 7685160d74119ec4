"""`kind: latents`: encodes an image set once with a teacher's VAE, for all stages that train on real latents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.base import SCRATCH, Artifact, Choice, Input, Stage, StageContext
from stages.data.images.config import IMAGE_SETS, ImageSet
from stages.teacher import Teacher

REACHED = "encoded.json"
"""The file in the scratch folder that records the progress of an attempt."""


class Latents(Stage):
    """Encodes the images of an image set with the teacher's VAE, and stores the latents with captions and classes.
    Training and held-out images are stored separately.

    A latent is the mean of the VAE's posterior times the VAE's scaling factor. For a pixel-space teacher, it is the
    image in [-1, 1].
    """

    VERSION: ClassVar[int] = 1
    kind: Literal["latents"]
    teacher: Annotated[str, Input("teacher")] = Field(description="teacher whose VAE encodes the images")
    images: Annotated[ImageSet, Choice("name", IMAGE_SETS)] = Field(description="image set to encode")
    storage_dtype: Literal["float16", "float32"] = Field("float16", description="precision of the stored latents")

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        teacher = inputs["teacher"].stage
        assert isinstance(teacher, Teacher)
        if teacher.gaussian:
            yield "teacher", "it is `gaussian:`, which has no VAE to encode images with"
        if teacher.train and teacher.train.dataset.size != self.images.size:
            trained = teacher.train.dataset.size
            yield "images.size", f"{self.images.size} pixels, but the teacher was trained on images of {trained}"

    def progress_in(self, work: Path, pool: Path) -> str | None:
        try:
            reached = json.loads((work / SCRATCH / REACHED).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return f"{reached['done']} of {reached['total']} images are encoded"

    def run(self, context: StageContext) -> Mapping[str, Any]:
        return context.run(
            _encode,
            context.inputs["teacher"].folder,
            self.images,
            self.storage_dtype,
            self.execution,
            context.output,
            context.output / SCRATCH / REACHED,
            context.threads,
        )


def _encode(*arguments: Any) -> Any:
    from stages.latents.encoding import encode_images

    return encode_images(*arguments)
