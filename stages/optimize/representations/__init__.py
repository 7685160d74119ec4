"""The kinds of objects that a teacher's score is distilled into, by their names in a manifest. Imports no torch."""

from stages.optimize.config import RepresentationConfig
from stages.optimize.representations.config import ImageConfig, LatentConfig
from stages.optimize.representations.mesh.config import MeshConfig
from stages.optimize.representations.nerf.config import NerfConfig
from stages.registry import Registry

REPRESENTATIONS: Registry[RepresentationConfig] = Registry(
    "retort.representations",
    RepresentationConfig,
    "name",
    {"latent": LatentConfig, "image": ImageConfig, "mesh": MeshConfig, "nerf": NerfConfig},
)
