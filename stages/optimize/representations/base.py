"""Representation: the base class of what is optimised. `Views` says which particles are seen, and from where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from stages.base import StageError
from stages.data.pictures import strip
from stages.networks.adapter import Adapter
from stages.optimize.cameras import Cameras

if TYPE_CHECKING:
    from stages.optimize.representations.config import SolidConfig

WEIGHTS = "particles.safetensors"
"""The file of the particles' parameters."""
BACKGROUNDS = {"white": 1.0, "black": 0.0, "grey": 0.5, "random": 0.5}
"""The background colours outside training."""
FRAMES, MILLISECONDS = 36, 80
"""The number of images of a turntable, and how long each is shown."""


@dataclass(frozen=True)
class Views:
    """B views of particles."""

    particles: Tensor
    """The number of the particle in each view, (B,)."""
    cameras: Cameras | None = None
    """The camera of each view. None for particles without sides: latents and images."""


class Rendering(NamedTuple):
    """Latents x (B, C, h, w) of views, with gradients to the particles, and further terms of the loss, each (B,)."""

    x: Tensor
    terms: Mapping[str, Tensor]


class Look(NamedTuple):
    """What B cameras see of solid particles."""

    images: Tensor
    """(B, 3, side, side) in [0, 1], with gradients."""
    opacity: Tensor
    """The share of light that the object stops, (B, 1, side, side) in [0, 1]."""
    depth: Tensor
    """The mean distance from the camera at which light is stopped, (B, 1, side, side). 0 where none is stopped."""
    terms: Mapping[str, Tensor]
    """Further terms of the loss, each (B,)."""


class Representation(nn.Module, ABC):
    """N particles of one kind. Each has its own parameters, so that a particle which is not seen is not changed."""

    solid = False
    """Whether views have cameras."""

    def __init__(self, teacher: Adapter, count: int) -> None:
        super().__init__()
        self.teacher, self.count = teacher, count

    def draw(self, particles: Tensor) -> Views:
        """Return random views of `particles` (B,), with torch's global generator."""
        return Views(particles)

    def fixed(self, most: int) -> Views:
        """Return views for previews and measurements, the same in every call: one of each particle, at most `most`."""
        return Views(torch.arange(min(most, self.count)))

    @abstractmethod
    def render(self, views: Views) -> Rendering:
        """Render the views as latents of the teacher."""

    @abstractmethod
    def images(self, views: Views) -> Tensor:
        """Return the views as images (B, 3, H, W) in [-1, 1], float32, on the CPU, without gradients."""

    def prompts(self, prompt: str, views: Views) -> list[str]:
        """Return the prompt of each view for the teacher."""
        return [prompt] * len(views.particles)

    def save(self, folder: Path) -> None:
        """Write the parameters to WEIGHTS. Subclasses also write files for other programs."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)

    def load(self, folder: Path) -> Representation:
        """Load what `save` wrote. Returns itself."""
        self.load_state_dict(load_file(folder / WEIGHTS))
        return self.to(self.teacher.device)


class Solid(Representation):
    """Particles that cameras see from all sides. A subclass renders images by `look`."""

    solid = True

    def __init__(self, teacher: Adapter, count: int, config: SolidConfig) -> None:
        """Raises StageError if the teacher's images are not square."""
        super().__init__(teacher, count)
        self.config = config
        _, height, width = teacher.latent_shape
        if height != width:
            raise StageError(f"{config.name}: cameras make square images, the teacher's latents are {height} x {width}")

    @abstractmethod
    def look(self, views: Views, side: int) -> Look:
        """Render images of `side` pixels. In training mode, the sampling of rays and the background may be random."""

    def background(self, like: Tensor) -> Tensor:
        """Return the colours behind B images, (B, 3, 1, 1), on the device and in the dtype of `like` (B, ...)."""
        name = self.config.background
        if name == "random" and self.training:
            return torch.rand(len(like), 3, 1, 1).to(like)
        return like.new_full((len(like), 3, 1, 1), BACKGROUNDS[name])

    def draw(self, particles: Tensor) -> Views:
        return Views(particles, Cameras.draw(len(particles), self.config.cameras))

    def fixed(self, most: int) -> Views:
        """As in the base class, but each particle is seen from several sides, as many as `most` allows.

        The sides are within the range of the random cameras."""
        particles = torch.arange(min(most, self.count))
        sides = most // len(particles)
        around = Cameras.spread(sides, self.config.cameras)
        return Views(particles.repeat_interleave(sides), around.at(torch.arange(sides).repeat(len(particles))))

    def render(self, views: Views) -> Rendering:
        images, _, _, terms = self.look(views, self.config.resolution)
        side = self.teacher.latent_shape[1] * self.teacher.down_sampling
        if self.config.resolution != side:
            images = functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return Rendering(self.teacher.encode_with_gradient(images * 2 - 1), terms)

    @torch.no_grad()
    def images(self, views: Views) -> Tensor:
        return torch.cat([look.images.cpu() for look in self._looks(views)]) * 2 - 1

    def _looks(self, views: Views) -> Iterator[Look]:
        """Render one view after the other in evaluation mode, at the size of written images. Yield each result."""
        assert views.cameras
        training = self.training
        self.eval()
        for row in torch.arange(len(views.particles)).split(1):
            yield self.look(Views(views.particles[row], views.cameras.at(row)), self.config.shown)
        self.train(training)

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Also write what cameras around each particle see: `PARTICLE/turntable.webp`, frames and depth images.

        A depth image is white at the nearest point that a camera sees and darker with the distance; black is empty."""
        super().save(folder)
        for number in range(self.count):
            circle = self.config.cameras.model_copy(update={"azimuth": (0.0, 360.0)})
            around = Cameras.spread(FRAMES, circle)
            looks = list(self._looks(Views(torch.full((FRAMES,), number), around)))
            frames = [Image.fromarray(strip((look.images * 2 - 1).cpu().numpy())) for look in looks]
            depths = [Image.fromarray(strip(_shade(look).cpu().numpy())) for look in looks]
            own = folder / f"{number:04}"
            for name, images in (("frames", frames), ("depth", depths)):
                (own / name).mkdir(parents=True, exist_ok=True)
                for place, image in enumerate(images):
                    image.save(own / name / f"{place:03}.png")
            frames[0].save(
                own / "turntable.webp", save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0
            )

    def prompts(self, prompt: str, views: Views) -> list[str]:
        assert views.cameras
        return views.cameras.prompts(prompt) if self.config.view_prompts else super().prompts(prompt, views)


def _shade(look: Look) -> Tensor:
    """Return the depth of one view as a grey image (1, 3, side, side) in [-1, 1]."""
    seen = look.opacity > 0.5
    near, far = look.depth[seen].aminmax() if seen.any() else (look.depth.min(), look.depth.max())
    light = 1 - 0.8 * (look.depth - near) / (far - near).clamp_min(1e-6)
    return (torch.where(seen, light, 0.0).clamp(0, 1) * 2 - 1).expand(-1, 3, -1, -1)
