"""`kind: probe`: trains a classifier of real images. Evaluations use its features and predictions."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.base import SCRATCH, Artifact, Choice, Progress, Stage, StageContext
from stages.data.images.config import IMAGE_SETS, Digits, ImageSet


class Probe(Stage):
    """Trains a classifier of real images. Evaluations use its predictions for prompt accuracy, and its features for
    distances.

    A probe is trained once for all evaluations. Only figures of the same probe can be compared.
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
            yield "images", "a probe is trained on classes; set `label` of the images"

    def run(self, context: StageContext) -> Mapping[str, Any]:
        return context.run(_train, self, context.seed, context.output, context.threads)


def _train(stage: Probe, seed: int, output: Path, threads: int) -> Generator[Progress, None, dict[str, Any]]:
    """Train the classifier and write it to `output`. Return its accuracy on held-out images."""
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
    in_captions = digits.prompt_labels(unseen.captions) if isinstance(stage.images, Digits) else unseen.labels
    return {
        "device": device_name(device),
        "images": len(seen),
        "held_out_images": len(unseen),
        "accuracy": accuracy(predicted, unseen.labels),
        "caption_accuracy": accuracy(predicted, in_captions),
        "label_accuracy": {name: accuracy(predicted, {name: unseen.labels[name]}) for name in unseen.labels},
    }
