"""Settings of reconstruction losses: distances between a student's output and its target. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from stages.base import Artifact, Config, Content, Input
from stages.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from stages.networks.adapter import Adapter

    Distance = Callable[[Tensor, Tensor], Tensor]
    """A function of output and target, both (B, C, H, W). Returns the distance of each sample, (B,). Differentiable in
    both."""


@dataclass(frozen=True)
class LossMaterials:
    """The teacher, artifacts and files that a loss is created with."""

    teacher: Adapter
    inputs: Mapping[str, Artifact]
    """Field of the loss -> the artifact that it names."""
    contents: Mapping[str, str]
    """`Content` field of the loss -> the hash or commit of the files that it names."""


class LossConfig(Config):
    """The distance between a student's output and its target."""

    name: str

    def create(self, materials: LossMaterials) -> Distance:
        """Create the distance function. May import torch. Raises StageError."""
        raise TypeError(f"{type(self).__name__} does not implement create()")

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        """Yield (field, problem) for each setting that does not fit `inputs`, the artifacts that fields name."""
        yield from ()


class Regression(LossConfig):
    """Absolute (l1), squared (mse) or pseudo-Huber difference, averaged over the elements of a sample. Pseudo-Huber
    is quadratic for small and linear for large differences (Song and Dhariwal 2023, 2310.14189, section 3.3)."""

    name: Literal["l1", "mse", "pseudo_huber"] = Field(description="which of the three")

    def create(self, materials: LossMaterials) -> Distance:
        from stages.losses import regression

        distance: Distance = getattr(regression, self.name)
        return distance


class _InSpace(LossConfig):
    """A loss whose `perceptual` network must compare inputs of the space SPACE, latents or pixels."""

    SPACE: ClassVar[str] = "latents"
    perceptual: Annotated[str, Input("perceptual")] = Field(
        description="perceptual network whose features are compared"
    )

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        space = getattr(inputs["perceptual"].stage, "space", self.SPACE)
        if space != self.SPACE:
            yield "perceptual", f"{self.perceptual} compares {space}; {self.name} needs one with `space: {self.SPACE}`"


class LatentLPIPS(_InSpace):
    """LPIPS in the teacher's latent space (Kang et al. 2024, 2405.05967, section 3.1), without random transformations.
    In the paper it is an ablation: students get artefacts that the metric does not see."""

    name: Literal["latent_lpips"] = "latent_lpips"
    l1_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the mean absolute difference, which is added to the loss; the paper has no such term",
    )

    def create(self, materials: LossMaterials) -> Distance:
        return self._create(materials, None)

    def _create(self, materials: LossMaterials, augment: str | None) -> Distance:
        from stages.losses.augmentation import Augmentation
        from stages.losses.perceptual import PerceptualLoss, warn_of_another_space
        from stages.networks.perceptual import LPIPS

        network = materials.inputs["perceptual"]
        warn_of_another_space(network, materials.teacher.folder)
        metric = LPIPS.load(network.folder)
        loss = PerceptualLoss(metric, Augmentation(augment) if augment else None, self.l1_weight)
        return loss.to(materials.teacher.device)


class ELatentLPIPS(LatentLPIPS):
    """LatentLPIPS after a random transformation (Kang et al. 2024, 2405.05967, section 3.2). Output and target get the
    same transformation. A new one is drawn for each sample at every step."""

    name: Literal["e_latent_lpips"] = "e_latent_lpips"  # type: ignore[assignment]
    augment: Annotated[str, StringConstraints(pattern="^b?g?c?o?$", min_length=1)] = Field(
        "bg",
        description="groups of transformations, in the order bgco: b mirrors, turns and shifts by whole pixels; g "
        "scales, rotates and shifts; c changes colours; o cuts a square out; the authors' package uses bg",
    )

    def create(self, materials: LossMaterials) -> Distance:
        return self._create(materials, self.augment)


class _Decoded(LossConfig):
    """A loss between decoded images."""

    tiny_vae: Annotated[
        str | None, Content(revision_field="tiny_vae_revision", files=("config.json", "*.safetensors"))
    ] = Field(None, description="AutoencoderTiny to decode with, as a folder or a hub id; default: the teacher's VAE")
    tiny_vae_revision: str | None = Field(None, description="branch, tag or commit of the hub id")

    @model_validator(mode="after")
    def _revision_of_something(self) -> Self:
        if self.tiny_vae_revision and not self.tiny_vae:
            raise ValueError("tiny_vae_revision needs a tiny_vae")
        return self

    def _decoder(self, materials: LossMaterials) -> Callable[[Tensor], Tensor]:
        if self.tiny_vae is None:
            return materials.teacher.decode_with_gradient
        from stages.networks.tiny import tiny_decoder

        identity = materials.contents["tiny_vae"]
        commit = identity.removeprefix("hub:") if identity.startswith("hub:") else None
        return tiny_decoder(self.tiny_vae, commit, materials.teacher.latent_shape[0], materials.teacher.device)


class PublishedLPIPS(_Decoded):
    """LPIPS of the lpips package (Zhang et al. 2018, 1801.03924) between decoded images. torchvision downloads the
    weights of the trunk network."""

    name: Literal["lpips"] = "lpips"
    net: Literal["vgg", "alex", "squeeze"] = Field(
        "vgg", description="network of the lpips package; distillation uses vgg"
    )

    def create(self, materials: LossMaterials) -> Distance:
        from stages.losses import decoded

        metric = decoded.PublishedLPIPS(self.net).to(materials.teacher.device)
        return decoded.Decoded(self._decoder(materials), metric)


class PixelLPIPS(_InSpace, _Decoded):
    """LPIPS between decoded images, with a network that a `perceptual` stage trained on pixels."""

    SPACE: ClassVar[str] = "pixels"
    name: Literal["pixel_lpips"] = "pixel_lpips"

    def create(self, materials: LossMaterials) -> Distance:
        from stages.losses.decoded import Decoded
        from stages.networks.perceptual import LPIPS

        metric = LPIPS.load(materials.inputs["perceptual"].folder).to(materials.teacher.device)
        return Decoded(self._decoder(materials), metric)


LOSSES: Registry[LossConfig] = Registry(
    "retort.losses",
    LossConfig,
    "name",
    {
        "l1": Regression,
        "mse": Regression,
        "pseudo_huber": Regression,
        "latent_lpips": LatentLPIPS,
        "e_latent_lpips": ELatentLPIPS,
        "lpips": PublishedLPIPS,
        "pixel_lpips": PixelLPIPS,
    },
)
