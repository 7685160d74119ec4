"""`kind: probe`: a classifier of real images, whose features and labels evaluations use."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.base import SCRATCH, Artifact, Choice, Progress, Stage, StageContext
from stages.data.images.config import IMAGE_SETS, Digits, ImageSet


class Probe(Stage):
    """A classifier of real images: evaluations measure prompt accuracy by its heads, distances in its features.

    Trained once and sealed, so that all evaluations that name it look through the same eyes.
    """

    VERSION: ClassVar[int] = 1
    kind: Literal["probe"]
    images: Annotated[ImageSet, Choice("name", IMAGE_SETS)] = Field(
        description="image set with classes: the probe learns them, and evaluations compare with these images"
    )
    limit: int = Field(20_000, ge=200, description="largest number of training images, and also of held-out images")
    steps: int = Field(1200, ge=100, description="training steps of 128 images each")

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        if not self.images.labelled:
            yield "images", "needs its label: a probe is trained on classes"

    def run(self, context: StageContext) -> Mapping[str, Any]:
        return context.run(_train, self, context.seed, context.output, context.threads)


def _train(stage: Probe, seed: int, output: Path, threads: int) -> Generator[Progress, None, dict[str, Any]]:
    """Fill `output`; return how often the classifier is right on images that it never saw."""
    from stages.data.images import digits
    from stages.data.images.load import load
    from stages.networks.compute import device_name, device_of, prepare
    from stages.networks.probe import accuracy, batches, train_probe

    prepare(threads)
    device = device_of(stage.execution)
    seen = load(stage.images, limit=stage.limit, scratch=output / SCRATCH)
    unseen = load(stage.images, held_out=True, limit=stage.limit, scratch=output / SCRATCH)
    classifier = yield from train_probe(seen, steps=stage.steps, seed=seed, device=device)
    classifier.save(output)
    _, predicted = classifier.look(batches(unseen))
    told = digits.prompt_labels(unseen.captions) if isinstance(stage.images, Digits) else unseen.labels
    return {
        "device": device_name(device),
        "images": len(seen),
        "held_out_images": len(unseen),
        "accuracy": accuracy(predicted, unseen.labels),
        "caption_accuracy": accuracy(predicted, told),
        "label_accuracy": {name: accuracy(predicted, {name: unseen.labels[name]}) for name in unseen.labels},
    }
