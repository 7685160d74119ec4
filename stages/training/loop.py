"""The one training loop: for teachers, perceptual networks and students alike."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn, optim

from stages.base import Progress, StageError
from stages.networks.compute import checkpoint_activations, device_name, device_of
from stages.training import checkpoint
from stages.training.figures import Figures
from stages.training.players import Batch, Method, Player, TrainingExecution, Turn

log = logging.getLogger(__name__)

LOG_EVERY = 10
"""Steps between two lines of the history."""


@dataclass(frozen=True)
class Trained:
    """Averaged (EMA) weights of each player that keeps them, the figures logged on the way, and the device's name."""

    averages: dict[str, nn.Module]
    losses: dict[str, float]
    """The last of each player that had turns."""
    history: list[dict[str, float]]
    device: str


def step_seed(seed: int, *counters: int) -> int:
    """A seed for this one step: with every step seeded, a resumed run needs no generator's state."""
    return int(np.random.SeedSequence([seed, *counters]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def train(
    method: Method,
    batches: Callable[[int], Batch],
    *,
    seed: int,
    checkpoints: Path,
    execution: TrainingExecution,
    unit: str = "steps",
) -> Generator[Progress, None, Trained]:
    """Optimise `method.players` on `batches(0), batches(1), ...`, from the last checkpoint if there is one.

    On CPU the result is the same bit for bit wherever it was interrupted, at an equal number of threads.
    Raises StageError when a loss or a gradient is not finite.
    """
    run = _Run(method, execution)
    total = next(iter(method.players.values())).training.steps
    start = run.restore(checkpoints)
    started = time.monotonic()
    for step in range(start, total):
        turns = method.turns(step)
        for place, turn in enumerate(turns):
            run.figures.add(run.take(turn, batches, step, step_seed(seed, step, place)), step)
        method.after_step(step)
        for turn in turns:
            run.average(turn.player)  # what is averaged is what the method leaves
        done = step + 1
        if done % LOG_EVERY == 0 or done == total:
            run.history.append({"step": done, **run.checked(checkpoints)})
            rate = (done - start) / (time.monotonic() - started)
            yield Progress(done, total, unit, {**run.history[-1], "per_second": rate})
        if done % execution.checkpoint_every == 0 or done == total:
            run.save(checkpoints, done, run.checked(checkpoints))
    last = run.history[-1]
    losses = {name: last[key] for name in run.players if (key := f"{run.prefix(name)}loss") in last}
    return Trained(run.averages, losses, run.history, device_name(run.accelerator.device.type))


class _Run:
    """Players, their optimizers and averages, on their device: what a checkpoint holds."""

    def __init__(self, method: Method, execution: TrainingExecution) -> None:
        self.players = dict(method.players)
        settings = next(iter(self.players.values())).training
        AcceleratorState._reset_state(reset_partial_state=True)  # a warm worker may have trained otherwise before
        self.accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=device_of(execution) == "cpu")
        self.optimizers = {name: _optimizer(player) for name, player in self.players.items()}
        for player in self.players.values():
            player.module.to(self.accelerator.device)
            if execution.gradient_checkpointing:
                checkpoint_activations(player.module)
        self.averages = {
            name: copy.deepcopy(player.module).eval().requires_grad_(False)
            for name, player in self.players.items()
            if player.averaged
        }
        self.averaged = dict.fromkeys(self.averages, 0)
        """How often each average has moved."""
        self.figures = Figures()
        self.history: list[dict[str, float]] = []

    def checked(self, checkpoints: Path) -> dict[str, float]:
        """The figures as numbers: read now and then only, since reading waits for the GPU. Raises StageError if one
        has not been finite, or a loss was out of all proportion, at any step since."""
        wrong = self.figures.first_wrong()
        if wrong is None:
            return self.figures.numbers()
        name, step, value = wrong
        kept = checkpoint.newest(checkpoints)
        raise StageError(
            f"the {name.replace('_', ' ')} is {value:.4g} at step {step}"
            f"{f' ({kept} is the last good checkpoint)' if kept else ', before the first checkpoint'}; lower "
            "learning_rate, or see what is in the training data (`retort stats` for pairs)"
        )

    def take(self, turn: Turn, batches: Callable[[int], Batch], step: int, seed: int) -> dict[str, Tensor]:
        """One optimizer step of `turn.player`, all others frozen."""
        player, optimizer = self.players[turn.player], self.optimizers[turn.player]
        for name, other in self.players.items():
            other.module.requires_grad_(name == turn.player).train(name == turn.player)
        accumulate = player.training.accumulate
        sums: dict[str, Tensor] = {}
        for part in range(accumulate):
            torch.manual_seed(step_seed(seed, part))
            with self.accelerator.autocast():
                loss, figures = turn.loss(self._on_device(batches(step * accumulate + part)))
            self.accelerator.backward(loss / accumulate)
            for name, value in {"loss": loss, **figures}.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / accumulate
        norm = self.accelerator.clip_grad_norm_(player.module.parameters(), player.training.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = player.training.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        sums["gradient_norm"] = torch.as_tensor(norm)
        return {self.prefix(turn.player) + name: value for name, value in sums.items()}

    def prefix(self, player: str) -> str:
        """Of its figures' names: none if there is no other."""
        return "" if len(self.players) == 1 else f"{player}_"

    @torch.no_grad()
    def average(self, name: str) -> None:
        """Move the player's EMA, if it keeps one, towards its weights, once for each of its turns.

        The decay is at most (1 + n) / (10 + n) after n turns of that player, as in TensorFlow's warm-up. A player that
        had several turns in a step is averaged as often, each time with the weights that the step leaves."""
        if name not in self.averages:
            return
        self.averaged[name] += 1
        n, player, average = self.averaged[name], self.players[name], self.averages[name]
        decay = min(player.training.ema_decay, (1 + n) / (10 + n))
        for mean, value in zip(average.parameters(), player.module.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)
        for kept, now in zip(average.buffers(), player.module.buffers(), strict=True):
            if kept.is_floating_point():  # statistics of batch norms belong to the weights of their time
                kept.lerp_(now, 1 - decay)
            else:
                kept.copy_(now)

    def save(self, folder: Path, step: int, figures: dict[str, float]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, player in self.players.items():
            tensors |= checkpoint.module_tensors(f"{name}/module", player.module)
            tensors |= checkpoint.optimizer_tensors(f"{name}/optimizer", self.optimizers[name])
        for name, average in self.averages.items():
            tensors |= checkpoint.module_tensors(f"{name}/average", average)
        state = {"figures": figures, "history": self.history, "averaged": self.averaged, **self._machine()}
        checkpoint.save(folder, step, tensors, state)

    def restore(self, folder: Path) -> int:
        """Load the newest checkpoint; return the step to go on from."""
        found = checkpoint.latest(folder)
        if found is None:
            return 0
        tensors, state = found
        for name, now in self._machine().items():
            if state[name] != now:
                log.warning(
                    "the checkpoint was made with %s %s and training goes on with %s: results will differ "
                    "in the last bits from an uninterrupted run",
                    *(name, state[name], now),
                )
        for name, player in self.players.items():
            checkpoint.load_module(f"{name}/module", player.module, tensors)
            checkpoint.load_optimizer(f"{name}/optimizer", self.optimizers[name], tensors)
        for name, average in self.averages.items():
            checkpoint.load_module(f"{name}/average", average, tensors)
        self.figures.restore(state["figures"])
        self.history, self.averaged = state["history"], state["averaged"]
        return int(state["step"])

    def _machine(self) -> dict[str, Any]:
        """What must be equal for equal bits."""
        return {"threads": torch.get_num_threads(), "device": device_name(self.accelerator.device.type)}

    def _on_device(self, batch: Batch) -> dict[str, Any]:
        device = self.accelerator.device
        return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}


def _optimizer(player: Player) -> optim.Optimizer:
    settings = player.training
    return optim.AdamW(
        player.module.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
