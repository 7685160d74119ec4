"""The registry of distillation methods, by their names in a manifest. Importing it does not import torch."""

from stages.methods.base import MethodConfig
from stages.methods.consistency.config import ConsistencyConfig
from stages.methods.diffusion2gan.config import Diffusion2GANConfig
from stages.methods.dmd.config import DMDConfig
from stages.methods.dmd2.config import DMD2Config
from stages.methods.guided.config import GuidedConfig
from stages.methods.knowledge_distillation.config import KnowledgeDistillationConfig
from stages.methods.progressive.config import ProgressiveConfig
from stages.registry import Registry

METHODS: Registry[MethodConfig] = Registry(
    "retort.methods",
    MethodConfig,
    "name",
    {
        "knowledge_distillation": KnowledgeDistillationConfig,
        "diffusion2gan": Diffusion2GANConfig,
        "progressive": ProgressiveConfig,
        "guided": GuidedConfig,
        "consistency": ConsistencyConfig,
        "dmd": DMDConfig,
        "dmd2": DMD2Config,
    },
)
