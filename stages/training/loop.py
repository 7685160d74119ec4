"""The training loop of teachers, perceptual networks and students."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn, optim

from stages.base import Progress, StageError
from stages.networks.compute import checkpoint_activations, device_name, device_of, shared_copy
from stages.training import checkpoint
from stages.training.figures import Figures
from stages.training.players import Batch, Method, TrainingExecution, TrainingSettings, Turn

log = logging.getLogger(__name__)

LOG_EVERY = 10
"""Training steps between two entries of the history."""


@dataclass(frozen=True)
class Trained:
    """The result of training."""

    averages: dict[str, nn.Module]
    """Player -> its averaged (EMA) network, for all players with `averaged`."""
    losses: dict[str, float]
    """Player -> its last loss, for all players that had turns."""
    history: list[dict[str, float]]
    """The logged figures, with an entry every LOG_EVERY steps. `step` is the number of finished steps."""
    device: str
    """The name of the device."""


def step_seed(seed: int, *counters: int) -> int:
    """Derive a seed from `seed` and counters, such as the number of the step.

    Each step has its own seed, so that checkpoints need not store the state of random number generators."""
    return int(np.random.SeedSequence([seed, *counters]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def train(
    method: Method,
    batches: Callable[[int], Batch],
    *,
    seed: int,
    checkpoints: Path,
    execution: TrainingExecution,
    unit: str = "steps",
    watch: Callable[[int, Mapping[str, nn.Module]], None] = lambda step, averages: None,
) -> Generator[Progress, None, Trained]:
    """Train `method.players`, starting from the newest checkpoint if there is one.

    `batches(i)` returns batch i. Yields progress every LOG_EVERY steps. The settings of the first player give the
    number of steps. `watch` is called whenever figures are logged, with the number of finished steps and the averaged
    networks. A resumed training gives the same result bit for bit as an uninterrupted one, if both run on the
    CPU with the same number of threads. Raises StageError if a figure is not finite, or if a loss is above 1e6.
    """
    run = _Run(method, execution)
    kept = max(player.training.accumulate for player in method.players.values())
    batches = Prefetched(batches, kept, pinned=run.accelerator.device.type == "cuda")
    total = next(iter(method.players.values())).training.steps
    start = run.restore(checkpoints)
    started = time.monotonic()
    for step in range(start, total):
        turns = method.turns(step)
        for place, turn in enumerate(turns):
            run.figures.add(run.run_turn(turn, batches, step, step_seed(seed, step, place)), step)
        method.after_step(step)
        for turn in turns:
            run.average(turn.player)  # after after_step, which may change the weights
        done = step + 1
        if done % LOG_EVERY == 0 or done == total:
            run.history.append({"step": done, **run.checked_figures(checkpoints)})
            watch(done, run.averages)
            rate = (done - start) / (time.monotonic() - started)
            yield Progress(done, total, unit, {**run.history[-1], "per_second": rate})
        if done % execution.checkpoint_every == 0 or done == total:
            run.checked_figures(checkpoints)
            run.save(checkpoints, done)
    last = run.history[-1]
    losses = {name: last[key] for name in run.players if (key := f"{run.prefix(name)}loss") in last}
    return Trained(run.averages, losses, run.history, device_name(run.accelerator.device.type))


class Prefetched:
    """Reads batches by number with the function `batches`. A thread reads the next batch while one is trained on.

    The last `kept` batches are kept. So a step's batches are read only once, even if the step has several turns. With
    `pinned`, batches are put in pinned memory, from which they are copied to a GPU while it computes."""

    def __init__(self, batches: Callable[[int], Batch], kept: int, pinned: bool) -> None:
        self._batches = (lambda number: _pinned(batches(number))) if pinned else batches
        self._thread = ThreadPoolExecutor(1, "batches")  # reads all batches, one at a time
        self._kept, self._read = kept, dict[int, Future[Batch]]()

    def __call__(self, number: int) -> Batch:
        for ahead in (number, number + 1):
            if ahead not in self._read:
                self._read[ahead] = self._thread.submit(self._batches, ahead)
        for old in [read for read in self._read if read <= number - self._kept]:
            del self._read[old]
        return self._read[number].result()


def _pinned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _pinned(one) for name, one in value.items()}
    return value.pin_memory() if isinstance(value, Tensor) else value


class _Run:
    """The state of a training: players, optimizers and averages. Checkpoints contain it."""

    def __init__(self, method: Method, execution: TrainingExecution) -> None:
        self.players = dict(method.players)
        settings = next(iter(self.players.values())).training
        AcceleratorState._reset_state(reset_partial_state=True)  # a reused worker may have trained with other settings
        self.accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=device_of(execution) == "cpu")
        self.trainable = {
            name: {key: value for key, value in player.module.named_parameters() if value.requires_grad}
            for name, player in self.players.items()
        }
        """Player -> its parameters that are trained. All others are frozen, and may be shared with other networks."""
        self.optimizers = {
            name: _optimizer(self.trainable[name].values(), player.training) for name, player in self.players.items()
        }
        for player in self.players.values():
            player.module.to(self.accelerator.device)
        if execution.gradient_checkpointing:
            checkpoint_activations([player.module for player in self.players.values()])
        self.averages = {
            name: shared_copy(player.module).eval().requires_grad_(False)
            for name, player in self.players.items()
            if player.averaged
        }
        self.average_updates = dict.fromkeys(self.averages, 0)
        """The number of updates of each average."""
        self.figures = Figures(settings.warmup_steps)
        self.history: list[dict[str, float]] = []

    def checked_figures(self, checkpoints: Path) -> dict[str, float]:
        """Return the figures as numbers. Raises StageError if a figure was invalid at any step so far.

        This method waits for the GPU, so the loop does not call it in each step."""
        invalid = self.figures.first_invalid()
        if invalid is None:
            return self.figures.numbers()
        kept = checkpoint.newest(checkpoints)
        raise StageError(
            f"{invalid.describe()}"
            f"{f' ({kept} is the last good checkpoint)' if kept else ', before the first checkpoint'}; lower "
            "learning_rate, or check the training data (for pairs, with `retort stats`)"
        )

    def run_turn(self, turn: Turn, batches: Callable[[int], Batch], step: int, seed: int) -> dict[str, Tensor]:
        """Take one optimizer step of `turn.player`, with all other players frozen. Return its figures.

        The loss and the other figures are means over the `accumulate` batches."""
        player, optimizer = self.players[turn.player], self.optimizers[turn.player]
        for name, other in self.players.items():
            other.module.train(name == turn.player)
            for parameter in self.trainable[name].values():
                parameter.requires_grad_(name == turn.player)
        accumulate = player.training.accumulate
        sums: dict[str, Tensor] = {}
        for part in range(accumulate):
            torch.manual_seed(step_seed(seed, part))
            with self.accelerator.autocast():
                loss, figures = turn.loss(self._on_device(batches(step * accumulate + part)))
            self.accelerator.backward(loss / accumulate)
            for name, value in {"loss": loss, **figures}.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / accumulate
        norm = self.accelerator.clip_grad_norm_(self.trainable[turn.player].values(), player.training.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = player.training.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        sums["gradient_norm"] = torch.as_tensor(norm)
        return {self.prefix(turn.player) + name: value for name, value in sums.items()}

    def prefix(self, player: str) -> str:
        """Return the prefix of the names of a player's figures: `PLAYER_`, or nothing if there is only one player."""
        return "" if len(self.players) == 1 else f"{player}_"

    @torch.no_grad()
    def average(self, name: str) -> None:
        """Update the player's EMA, if it has one: average = d average + (1 - d) weights. Called once for each turn.

        d = min(ema_decay, (1 + n) / (10 + n)) at the n-th update, as in TensorFlow's ExponentialMovingAverage. All
        updates of a step use the weights at the end of the step, even if a player has several turns."""
        if name not in self.averages:
            return
        self.average_updates[name] += 1
        n, player, average = self.average_updates[name], self.players[name], self.averages[name]
        decay = min(player.training.ema_decay, (1 + n) / (10 + n))
        means = dict(average.named_parameters())
        for parameter, value in self.trainable[name].items():
            means[parameter].lerp_(value, 1 - decay)
        for kept, now in zip(average.buffers(), player.module.buffers(), strict=True):
            if kept.is_floating_point():  # batch-norm statistics are averaged like the weights
                kept.lerp_(now, 1 - decay)
            else:
                kept.copy_(now)

    def save(self, folder: Path, step: int) -> None:
        """Save a checkpoint after `step` steps."""
        tensors: dict[str, Tensor] = {}
        for name, player in self.players.items():
            tensors |= checkpoint.module_tensors(f"{name}/module", player.module, self.frozen(name))
            tensors |= checkpoint.optimizer_tensors(f"{name}/optimizer", self.optimizers[name])
        for name, average in self.averages.items():
            tensors |= checkpoint.module_tensors(f"{name}/average", average, self.frozen(name))
        state = {
            "figures": self.figures.state(),
            "history": self.history,
            "averaged": self.average_updates,
            **self._machine(),
        }
        checkpoint.save(folder, step, tensors, state)

    def frozen(self, player: str) -> set[str]:
        """Return the names of the player's parameters that are not trained."""
        return dict(self.players[player].module.named_parameters()).keys() - self.trainable[player].keys()

    def restore(self, folder: Path) -> int:
        """Load the newest checkpoint and return the number of the next step. Return 0 if there is no checkpoint."""
        found = checkpoint.latest(folder)
        if found is None:
            return 0
        tensors, state = found
        for name, now in self._machine().items():
            if state[name] != now:
                log.warning(
                    "the checkpoint was made with %s %s and training resumes with %s: results will differ in the last "
                    "bits from an uninterrupted run",
                    *(name, state[name], now),
                )
        for name, player in self.players.items():
            checkpoint.load_module(f"{name}/module", player.module, tensors, self.frozen(name))
            checkpoint.load_optimizer(f"{name}/optimizer", self.optimizers[name], tensors)
        for name, average in self.averages.items():
            checkpoint.load_module(f"{name}/average", average, tensors, self.frozen(name))
        self.figures.restore(state["figures"])
        self.history, self.average_updates = state["history"], state["averaged"]
        return int(state["step"])

    def _machine(self) -> dict[str, Any]:
        """Return the properties of the machine that must be equal for bit-identical results."""
        return {"threads": torch.get_num_threads(), "device": device_name(self.accelerator.device.type)}

    def _on_device(self, value: Any) -> Any:
        """Return a batch with its tensors on the device of training. Nested mappings stay nested."""
        if isinstance(value, Mapping):
            return {name: self._on_device(one) for name, one in value.items()}
        return value.to(self.accelerator.device, non_blocking=True) if isinstance(value, Tensor) else value


def _optimizer(parameters: Iterable[nn.Parameter], settings: TrainingSettings) -> optim.Optimizer:
    return optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
