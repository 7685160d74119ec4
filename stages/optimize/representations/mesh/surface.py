"""Triangles and UV coordinates: read from files, placed in front of the cameras, and written with colours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial

from stages.base import StageError
from stages.optimize.representations.mesh.config import UP, Axis

AXES = {"y": [2, 0, 1], "z": [0, 1, 2]}
"""Axis that points up -> the axes of the file that become x (the front), y and z (up) of the cameras' coordinates."""
THIN = 1e-9
"""The least height of a triangle, divided by its longest edge. Thinner ones are not seen."""


@dataclass(frozen=True)
class Surface:
    """Triangles in the coordinates of their file."""

    vertices: NDArray[np.float64]
    """(V, 3)"""
    faces: NDArray[np.int64]
    """The vertices of each triangle, (F, 3)."""
    uv: NDArray[np.float64] | None
    """Texture coordinates of the vertices, (V, 2). v points up: (0, 0) is the lower left corner of the texture."""

    def welded(self) -> Surface:
        """Return the surface without UV coordinates, with vertices at the same position merged into one.

        Files store a vertex twice at the seam of a texture. The two would otherwise get different colours."""
        vertices, place = np.unique(self.vertices, axis=0, return_inverse=True)
        return Surface(vertices, place.reshape(-1)[self.faces], None)

    def placed(self, up: Axis) -> NDArray[np.float64]:
        """Return the vertices in the coordinates of the cameras, (V, 3).

        The bounding box of the triangles with an area is centred at the origin. Their farthest corner is 1 from it."""
        vertices = self.vertices[:, AXES[up]]
        corners = vertices[self.faces[self.thick()].reshape(-1)]
        centre = (corners.min(0) + corners.max(0)) / 2
        return (vertices - centre) / np.linalg.norm(corners - centre, axis=1).max()

    def thick(self) -> NDArray[np.bool_]:
        """Return which triangles have an area, (F,)."""
        a, b, c = self.vertices[self.faces].transpose(1, 0, 2)
        longest = np.max([np.linalg.norm(edge, axis=1) for edge in (b - a, c - b, a - c)], axis=0)
        return np.linalg.norm(np.cross(b - a, c - a), axis=1) > THIN * longest**2

    def export(self, file: Path, up: Axis, colours: NDArray[np.float32] | Image.Image) -> None:
        """Write a .glb file with this geometry and a texture, or with colours of the vertices (V, 3) in [0, 1].

        The coordinates are those of the original file. If z points up in them, the .glb file adds a rotation, since y
        points up in glTF. Textures and images are sRGB. Vertex colours are linear in glTF, so they are converted."""
        if isinstance(colours, Image.Image):
            material = PBRMaterial(baseColorTexture=colours, metallicFactor=0.0, roughnessFactor=1.0)
            visual: TextureVisuals | ColorVisuals = TextureVisuals(uv=self.uv, material=material)
        else:
            linear = np.where(colours > 0.04045, ((colours + 0.055) / 1.055) ** 2.4, colours / 12.92)
            visual = ColorVisuals(vertex_colors=(linear * 255).round().astype(np.uint8))
        mesh = trimesh.Trimesh(self.vertices, self.faces, visual=visual, process=False)
        turn = np.eye(4)
        turn[:3, :3] = np.eye(3)[AXES["y"]].T @ np.eye(3)[AXES[up]]
        scene = trimesh.Scene()
        scene.add_geometry(mesh, transform=turn)
        scene.export(file)


def load(file: Path) -> Surface:
    """Read an .obj, .ply or .glb file. The parts of a scene become one surface, with UV coordinates if all have them.

    Raises StageError if it cannot be read, or if it has no triangle with an area."""
    kind = file.suffix.lower()
    if kind not in UP or not file.is_file():
        raise StageError("it is not an .obj, .ply or .glb file; convert it, for example with Blender")
    outside = kind != ".glb"  # the materials are in other files; without those of a .glb, trimesh reads no UVs
    try:
        with file.open("rb") as opened:
            scene = trimesh.load_scene(opened, file_type=kind[1:], process=False, skip_materials=outside)
        parts = [part for part in scene.dump() if isinstance(part, trimesh.Trimesh) and len(part.triangles)]
    except Exception as error:  # trimesh's readers raise many types, all of which mean: not such a file
        raise StageError(f"it cannot be read as {kind} ({error}); export it again") from error
    if not parts:
        raise StageError("it has no triangles; export it again as a mesh with faces")
    starts = np.cumsum([0, *(len(part.vertices) for part in parts)])
    faces = np.concatenate([part.faces + start for part, start in zip(parts, starts, strict=False)]).astype(np.int64)
    maps = [uv for uv in (getattr(part.visual, "uv", None) for part in parts) if uv is not None]
    uv = np.concatenate(maps).astype(np.float64) if len(maps) == len(parts) else None
    surface = Surface(np.concatenate([part.vertices for part in parts]).astype(np.float64), faces, uv)
    if not np.isfinite(surface.vertices[faces]).all() or not surface.thick().any():
        raise StageError("its triangles have no area, or coordinates that are not finite; export it again")
    return surface
