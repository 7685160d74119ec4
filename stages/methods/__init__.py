"""Distillation methods, by the name that a manifest calls them."""

from stages.methods.base import MethodConfig
from stages.methods.diffusion2gan.config import Diffusion2GANConfig
from stages.methods.knowledge_distillation.config import KnowledgeDistillationConfig
from stages.registry import Registry

METHODS: Registry[MethodConfig] = Registry(
    "retort.methods",
    MethodConfig,
    "name",
    {"knowledge_distillation": KnowledgeDistillationConfig, "diffusion2gan": Diffusion2GANConfig},
)
