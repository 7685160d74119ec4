"""The one training loop, and what it is told.

`players` says who is trained and with which loss: a method's whole interface to the loop. `loop` runs it, `checkpoint`
keeps its state, `figures` what it logs. Methods of distillation are in `stages.methods`. These names import no torch.
"""

from stages.training.players import Batch, Method, Player, TrainingExecution, TrainingSettings, Turn

__all__ = ["Batch", "Method", "Player", "TrainingExecution", "TrainingSettings", "Turn"]
