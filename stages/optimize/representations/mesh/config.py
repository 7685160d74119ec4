"""The settings of `representation: mesh`. Imports neither torch nor trimesh."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.base import Content, StageError
from stages.optimize.config import RepresentationMaterials
from stages.optimize.representations.config import SolidConfig

if TYPE_CHECKING:
    from stages.optimize.representations.base import Representation

Axis = Literal["y", "z"]
UP: dict[str, Axis] = {".glb": "y", ".obj": "y", ".ply": "z"}
"""File type -> the axis that points up: by the specification of glTF, and as Blender writes OBJ and PLY by default."""


class MeshConfig(SolidConfig):
    """The texture or the vertex colours of your own mesh. They start grey, with a little noise.

    The mesh is moved and scaled so that its bounding box is centred at the origin and its farthest vertex has distance
    1 from it. There is no light: colours are shown as they are. Textures repeat outside [0, 1]. The parts of a scene
    share one texture: where their UV coordinates overlap, they have the same colours.
    """

    name: Literal["mesh"] = "mesh"
    path: Annotated[str, Content()] = Field(description="an .obj, .ply or .glb file; its own colours are not used")
    up: Axis | None = Field(
        None,
        description="axis of the file that points up; with y, the front is z, as in glTF; with z, the front is x; "
        "default: y for .glb and .obj, z for .ply",
    )
    texture: int | None = Field(
        None,
        ge=2,
        le=8192,
        description="side of the texture in texels, for meshes with UV coordinates; texels that no pixel falls on are "
        "not trained; null: train a colour for each vertex instead",
    )
    smooth: float = Field(
        0.0,
        ge=0,
        description="weight of the total variation: the mean difference between the colours, in [0, 1], of "
        "neighbouring texels or vertices",
    )

    def check(self) -> Iterator[tuple[str, str]]:
        if Path(self.path).exists():  # planning reports a missing file
            yield from self._problems(Path(self.path))

    def prepare(self, folder: Path) -> None:
        """Copy the mesh to `folder`."""
        try:
            shutil.copyfile(self.path, self._copy(folder))
        except OSError as error:
            raise StageError(f"representation.path: {self.path} cannot be copied ({error.strerror})") from error
        for field, problem in self._problems(self._copy(folder)):
            raise StageError(f"representation.{field}: {problem}")

    def create(self, materials: RepresentationMaterials) -> Representation:
        from stages.optimize.representations.mesh.particles import Mesh
        from stages.optimize.representations.mesh.surface import load

        return Mesh(materials.teacher, materials.particles, self, load(self._copy(materials.folder)))

    def axis(self) -> Axis:
        """Return the axis of the file that points up."""
        return self.up or UP[Path(self.path).suffix.lower()]

    def _copy(self, folder: Path) -> Path:
        return folder / f"mesh{Path(self.path).suffix.lower()}"

    def _problems(self, file: Path) -> Iterator[tuple[str, str]]:
        from stages.optimize.representations.mesh.surface import load

        try:
            surface = load(file)
        except StageError as error:
            yield "path", str(error)
            return
        if self.texture and surface.uv is None:
            yield "texture", "the mesh has no UV coordinates; unwrap it, or set texture: null to colour its vertices"
