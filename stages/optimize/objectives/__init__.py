"""The objectives, by their names in a manifest. Imports no torch."""

from stages.optimize.config import ObjectiveConfig
from stages.optimize.objectives.config import SDSConfig, VSDConfig
from stages.registry import Registry

OBJECTIVES: Registry[ObjectiveConfig] = Registry(
    "retort.objectives", ObjectiveConfig, "name", {"sds": SDSConfig, "vsd": VSDConfig}
)
