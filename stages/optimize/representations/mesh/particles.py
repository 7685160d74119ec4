"""Particles that share one mesh and differ in its colours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from stages.data.pictures import strip
from stages.networks.adapter import Adapter
from stages.optimize.cameras import Cameras
from stages.optimize.representations.base import Look, Solid, Views
from stages.optimize.representations.mesh.rays import Hits, first_hits
from stages.optimize.representations.mesh.surface import Surface

if TYPE_CHECKING:
    from stages.optimize.representations.mesh.config import MeshConfig

NOISE = 0.1
"""Standard deviation of the parameters before training. They are colours before the sigmoid."""


class Mesh(Solid):
    """One surface with a colouring for each particle: a texture (3, T, T), top row first, or vertex colours (V, 3).

    Colours are the sigmoid of `state`, in [0, 1]. There is no light. `state` does not hold the geometry, which is not
    trained."""

    config: MeshConfig
    corners: Tensor
    """The triangles in the coordinates of the cameras, (F, 3, 3) float64."""
    places: Tensor
    """Where the colours of the corners are looked up: UV coordinates (F, 3, 2), or vertex numbers (F, 3)."""
    edges: Tensor
    """The vertices at the ends of each edge, (E, 2)."""

    def __init__(self, teacher: Adapter, count: int, config: MeshConfig, surface: Surface) -> None:
        """Raises StageError if the teacher's images are not square."""
        super().__init__(teacher, count, config)
        self.surface = surface if config.texture else surface.welded()
        faces = self.surface.faces[self.surface.thick()]
        vertices, uv = self.surface.placed(config.axis()), self.surface.uv
        places = faces if uv is None else uv[faces]
        edges = np.unique(np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2)), axis=0)
        for name, value in (("corners", vertices[faces]), ("places", places), ("edges", edges)):
            self.register_buffer(name, torch.from_numpy(value), persistent=False)
        shape = (3, config.texture, config.texture) if config.texture else (len(vertices), 3)
        self.state = nn.ParameterList([nn.Parameter(NOISE * torch.randn(shape)) for _ in range(count)])
        self.to(teacher.device)

    def look(self, views: Views, side: int) -> Look:
        assert views.cameras
        images, opacity, depth, roughness = [], [], [], []
        colours = {number: self.state[number].sigmoid() for number in views.particles.unique().tolist()}
        for row, number in enumerate(views.particles.tolist()):
            camera = _precise(views.cameras.at(torch.tensor([row])), self.corners)
            hits = first_hits(self.corners, camera, side)
            own = colours[number]
            behind = self.background(own[None]).view(1, 3).repeat(side**2, 1)
            images.append(behind.index_copy(0, hits.pixels, self._colours(own, hits)))
            opacity.append(own.new_zeros(side**2).index_fill(0, hits.pixels, 1.0))
            depth.append(own.new_zeros(side**2).index_copy(0, hits.pixels, hits.distances.to(own)))
            roughness.append(self._variation(own))
        return Look(
            torch.stack(images).mT.unflatten(-1, (side, side)),
            torch.stack(opacity).view(-1, 1, side, side),
            torch.stack(depth).view(-1, 1, side, side),
            {"smooth": self.config.smooth * torch.stack(roughness)} if self.config.smooth else {},
        )

    def _colours(self, own: Tensor, hits: Hits) -> Tensor:
        """Look up the colours at the hits, in the texture or in the vertex colours. Returns (K, 3)."""
        places, weights = self.places[hits.faces], hits.weights.unsqueeze(-1)
        if not self.config.texture:
            return (own[places] * weights.to(own)).sum(1)
        u, v = (places * weights).sum(1).unbind(-1)
        place = torch.stack([u - u.floor(), 1 - (v - v.floor())], -1).to(own)  # rows go down, v goes up
        size = self.config.texture
        grid = (place * size + 1) / (size + 2) * 2 - 1  # the padding adds a texel on each side, because textures repeat
        repeated = functional.pad(own[None], (1, 1, 1, 1), mode="circular")
        return functional.grid_sample(repeated, grid[None, :, None], align_corners=False)[0, :, :, 0].T

    def _variation(self, own: Tensor) -> Tensor:
        """Return the mean difference of neighbouring texels or vertices, a scalar."""
        if not self.config.texture:
            return own[self.edges].diff(dim=1).abs().mean()
        return (own.diff(dim=1).abs().mean() + own.diff(dim=2).abs().mean()) / 2

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Also write `PARTICLE/mesh.glb`, the mesh in its original coordinates with its texture or vertex colours, and
        for textures `PARTICLE/texture.png`."""
        super().save(folder)
        for number, state in enumerate(self.state):
            own, colours = folder / f"{number:04}", state.sigmoid().float().cpu()
            image = Image.fromarray(strip(colours[None].numpy() * 2 - 1)) if self.config.texture else None
            if image:
                image.save(own / "texture.png")
            self.surface.export(own / "mesh.glb", self.config.axis(), image or colours.numpy())


def _precise(cameras: Cameras, like: Tensor) -> Cameras:
    """Return the cameras in the dtype of `like`, on its device."""
    fields = cameras.azimuth, cameras.elevation, cameras.distance, cameras.field_of_view
    return Cameras(*(field.to(like) for field in fields))
