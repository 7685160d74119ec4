"""Time grids: the points at which a student's network is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.diffusion.form import Form
from stages.diffusion.schedule import Level, NoiseSchedule

MIN_TIMESTEPS = 1000
"""The minimum number of training timesteps of a cosine grid."""


@dataclass(frozen=True)
class Grid:
    """Points 0 (clean data) to N (noise). The network is called at points N, ..., 1.

    The points are evenly spaced in time, unless a form names its levels.

    At point N a student is trained and sampled on pure noise, even if alpha[N] > 0. For example, Stable Diffusion's
    schedule ends at alpha = 0.068, but sampling always starts from N(0, 1). The student learns the map from N(0, 1).
    alpha[N] and sigma[N] stay those of the schedule. They convert the network's output to x0.
    """

    timesteps: NDArray[np.float64]
    """(N + 1,): the network's timestep at each point. It is -1 at point 0, where the network is not called. On evenly
    spaced grids it is T i / N - 1 at point i, rounded to a whole number if the grid is on a teacher's schedule."""
    alpha: NDArray[np.float64]
    """(N + 1,): from 1 at point 0, falling."""
    sigma: NDArray[np.float64]
    """(N + 1,): from 0 at point 0, rising."""
    train_steps: int
    """T, the number of training timesteps."""

    @classmethod
    def of(cls, form: Form, teacher: NoiseSchedule, steps: int | None = None) -> Grid:
        """Return the time grid for a student of `form`, with its number of steps.

        For training, `steps` gives a finer grid. It must be a multiple of `form.steps`. `teacher` is the schedule of
        the teacher.

        Raises ValueError if the teacher's schedule has too few timesteps, or if `steps` contradicts the levels."""
        steps = steps or form.steps
        if form.levels is None:
            return cls.trailing(teacher, steps) if form.schedule == "teacher" else cls.cosine(steps)
        if steps != form.steps or form.levels[0] >= len(teacher):
            raise ValueError(f"levels {list(form.levels)} do not fit {steps} steps and {len(teacher)} timesteps")
        return cls.at(teacher, [-1, *reversed(form.levels)])

    @classmethod
    def trailing(cls, teacher: NoiseSchedule, steps: int) -> Grid:
        """Return the grid of the trailing timesteps of a teacher's schedule, round(T i / N) - 1 at point i.

        See Lin et al. 2023, 2305.08891, table 2. N is `steps`, and T the number of the schedule's timesteps.

        The grid of 2 N steps contains the grid of N steps. Raises ValueError if T < N."""
        count = len(teacher)
        if steps > count:
            raise ValueError(f"the teacher's schedule has {count} timesteps, too few for {steps} steps")
        timesteps = [round(count * i / steps) - 1 for i in range(steps + 1)]
        return cls.at(teacher, timesteps)

    @classmethod
    def at(cls, teacher: NoiseSchedule, timesteps: Sequence[int]) -> Grid:
        """Return the grid of the given timesteps of a teacher's schedule. They must rise, and start with -1."""
        levels = np.array([tuple(teacher.at(t)) for t in timesteps])
        return cls(np.array(timesteps, dtype=np.float64), levels[:, 0], levels[:, 1], len(teacher))

    @classmethod
    def cosine(cls, steps: int) -> Grid:
        """Return the grid of the cosine schedule: alpha = cos(pi t / 2) and sigma = sin(pi t / 2) at t = i / N.

        alpha is exactly 0 at t = 1 (Salimans and Ho 2022, 2202.00512, section 2). T is `cosine_train_steps(N)`."""
        i = np.arange(steps + 1)
        count = cosine_train_steps(steps)
        alpha, sigma = np.sin(np.pi / 2 * (steps - i) / steps), np.sin(np.pi / 2 * i / steps)
        return cls(count * i / steps - 1, alpha, sigma, count)

    @property
    def steps(self) -> int:
        """N, the number of network calls."""
        return len(self.timesteps) - 1

    def level(self, i: int) -> Level:
        """Return the level at point i, as numbers."""
        return Level(float(self.alpha[i]), float(self.sigma[i]), float(self.timesteps[i]))

    def subsample(self, stride: int) -> Grid:
        """Return the grid of every `stride`-th point, with N / stride steps. `stride` must divide N."""
        return Grid(self.timesteps[::stride], self.alpha[::stride], self.sigma[::stride], self.train_steps)


def cosine_train_steps(steps: int) -> int:
    """Return T, the number of training timesteps of a cosine grid of `steps` steps.

    T is `steps`, doubled while it is below 1,000, and halved while it is even and the half is at least 1,000. So all
    links of a chain have the same T, which is 1,024 for powers of two. diffusers supports only whole timesteps. It can
    sample a student if its number of steps divides T."""
    count = steps
    while count >= 2 * MIN_TIMESTEPS and count % 2 == 0:
        count //= 2
    while count < MIN_TIMESTEPS:
        count *= 2
    return count
