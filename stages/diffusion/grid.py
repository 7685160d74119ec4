"""The points in time at which a student of few steps is called."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.diffusion.form import Schedule
from stages.diffusion.schedule import NoiseSchedule

LEAST_TIMESTEPS = 1000


@dataclass(frozen=True)
class Grid:
    """Points 0 (clean data) to N (pure noise), evenly spaced in time; the network is called at N, ..., 1.

    All are (N + 1,), float64: `timesteps` is what the network is told (-1 at point 0), `alpha` and `sigma` the level
    of noise. `train_steps` is T: point i of N is timestep T i / N - 1.

    At point N a student is trained on pure noise and called on it, whatever the schedule says of its last timestep.
    Stable Diffusion's ends at alpha = 0.068 and yet is always begun at N(0, 1): this is the map from noise to images
    that its users know, and the one that a student is to learn. So alpha[N] is the schedule's own, which says how the
    network's output is read, and only what is trained on differs from `alpha x0 + sigma noise` there.
    """

    timesteps: NDArray[np.float64]
    alpha: NDArray[np.float64]
    sigma: NDArray[np.float64]
    train_steps: int

    @classmethod
    def of(cls, schedule: Schedule, teacher: NoiseSchedule, steps: int) -> Grid:
        """Raises ValueError for more steps than the schedule has."""
        return cls.on(teacher, steps) if schedule == "teacher" else cls.cosine(steps)

    @classmethod
    def on(cls, teacher: NoiseSchedule, steps: int) -> Grid:
        """The teacher's own trailing timesteps. That of 2 N steps holds that of N steps. Raises ValueError."""
        count = len(teacher)
        if steps > count:
            raise ValueError(f"the teacher's schedule has {count} timesteps, too few for {steps} steps")
        timesteps = [round(count * i / steps) - 1 for i in range(steps + 1)]
        levels = np.array([teacher.at(t) for t in timesteps])
        return cls(np.array(timesteps, dtype=np.float64), levels[:, 0], levels[:, 1], count)

    @classmethod
    def cosine(cls, steps: int) -> Grid:
        """alpha = cos(pi t / 2), exactly 0 at t = 1 (Salimans and Ho 2022, 2202.00512, section 2).

        T is `steps` doubled until it is at least 1000, or halved as long as that leaves a whole number of at least
        1000: the same for a whole chain, a multiple of the steps of those of its students that diffusers, whose
        timesteps are whole numbers, can call; 1024 for powers of two."""
        i = np.arange(steps + 1)
        count = cosine_train_steps(steps)
        alpha, sigma = np.sin(np.pi / 2 * (steps - i) / steps), np.sin(np.pi / 2 * i / steps)
        return cls(count * i / steps - 1, alpha, sigma, count)

    @property
    def steps(self) -> int:
        return len(self.timesteps) - 1

    def level(self, i: int) -> tuple[float, float]:
        """(alpha, sigma) at point i."""
        return float(self.alpha[i]), float(self.sigma[i])

    def every(self, stride: int) -> Grid:
        """Of N points those of N / `stride` steps."""
        return Grid(self.timesteps[::stride], self.alpha[::stride], self.sigma[::stride], self.train_steps)


def cosine_train_steps(steps: int) -> int:
    count = steps
    while count >= 2 * LEAST_TIMESTEPS and count % 2 == 0:
        count //= 2
    while count < LEAST_TIMESTEPS:
        count *= 2
    return count
