"""Time grids: the points at which a student's network is called."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.diffusion.form import Schedule
from stages.diffusion.schedule import NoiseSchedule

MIN_TIMESTEPS = 1000
"""The minimum number of training timesteps of a cosine grid."""


@dataclass(frozen=True)
class Grid:
    """Points 0 (clean data) to N (noise), evenly spaced in time. The network is called at points N, ..., 1.

    At point N a student is trained and sampled on pure noise, even if alpha[N] > 0. Stable Diffusion's schedule, for
    example, ends at alpha = 0.068, but its users always start from N(0, 1), and the student learns that map. alpha[N]
    and sigma[N] stay those of the schedule. They convert the network's output to x0.
    """

    timesteps: NDArray[np.float64]
    """(N + 1,): the timestep that the network is given: T i / N - 1 at point i, so -1 at point 0. On a teacher's
    schedule it is rounded to a whole number."""
    alpha: NDArray[np.float64]
    """(N + 1,): from 1 at point 0, falling."""
    sigma: NDArray[np.float64]
    """(N + 1,): from 0 at point 0, rising."""
    train_steps: int
    """T, the number of training timesteps."""

    @classmethod
    def of(cls, schedule: Schedule, teacher: NoiseSchedule, steps: int) -> Grid:
        """A grid of `steps` steps on the teacher's schedule or on the cosine schedule.

        Raises ValueError if the teacher's schedule has fewer timesteps than `steps`."""
        return cls.trailing(teacher, steps) if schedule == "teacher" else cls.cosine(steps)

    @classmethod
    def trailing(cls, teacher: NoiseSchedule, steps: int) -> Grid:
        """The trailing timesteps of a teacher's schedule, round(T i / N) - 1 (Lin et al. 2023, 2305.08891, table 2).

        The grid of 2 N steps contains the grid of N steps. Raises ValueError if T < N."""
        count = len(teacher)
        if steps > count:
            raise ValueError(f"the teacher's schedule has {count} timesteps, too few for {steps} steps")
        timesteps = [round(count * i / steps) - 1 for i in range(steps + 1)]
        levels = np.array([teacher.at(t) for t in timesteps])
        return cls(np.array(timesteps, dtype=np.float64), levels[:, 0], levels[:, 1], count)

    @classmethod
    def cosine(cls, steps: int) -> Grid:
        """The cosine schedule: alpha = cos(pi t / 2) and sigma = sin(pi t / 2) at t = i / N.

        alpha is exactly 0 at t = 1 (Salimans and Ho 2022, 2202.00512, section 2). T is `cosine_train_steps(N)`."""
        i = np.arange(steps + 1)
        count = cosine_train_steps(steps)
        alpha, sigma = np.sin(np.pi / 2 * (steps - i) / steps), np.sin(np.pi / 2 * i / steps)
        return cls(count * i / steps - 1, alpha, sigma, count)

    @property
    def steps(self) -> int:
        """N, the number of network calls."""
        return len(self.timesteps) - 1

    def level(self, i: int) -> tuple[float, float]:
        """Return (alpha, sigma) at point i."""
        return float(self.alpha[i]), float(self.sigma[i])

    def subsample(self, stride: int) -> Grid:
        """The grid of every `stride`-th point, with N / stride steps. `stride` must divide N."""
        return Grid(self.timesteps[::stride], self.alpha[::stride], self.sigma[::stride], self.train_steps)


def cosine_train_steps(steps: int) -> int:
    """The number T of training timesteps of a cosine grid: `steps`, doubled or halved to at least 1,000.

    It is doubled while it is below 1,000, and halved while it is even and the half is at least 1,000. All links of a
    chain share T: 1,024 for powers of two. diffusers has whole timesteps only. It can run a student whose steps divide
    T."""
    count = steps
    while count >= 2 * MIN_TIMESTEPS and count % 2 == 0:
        count //= 2
    while count < MIN_TIMESTEPS:
        count *= 2
    return count
