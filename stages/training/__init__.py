"""The training loop of teachers, perceptual networks and students.

`players` defines the interface between a method and the loop, `loop` runs the training, `checkpoint` saves its state,
and `figures` collects the scalars that it logs. Distillation methods are in `stages.methods`. Importing this package
does not import torch.
"""

from stages.training.players import Batch, Method, Player, StudentExecution, TrainingExecution, TrainingSettings, Turn

__all__ = ["Batch", "Method", "Player", "StudentExecution", "TrainingExecution", "TrainingSettings", "Turn"]
