"""Distillation methods, by the name that a manifest calls them."""

from stages.methods.base import MethodConfig
from stages.methods.knowledge_distillation.config import KnowledgeDistillationConfig

METHODS: dict[str, type[MethodConfig]] = {
    "knowledge_distillation": KnowledgeDistillationConfig,
}
