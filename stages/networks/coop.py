"""Coop-Diffusion: two teachers of different latent spaces in one sampling process. They exchange decoded images. Either
a guest steers the host at each step (`Coop`), or it samples the noisy levels at another resolution (`Bridge`). See
PanGu-Draw, 2312.16486, section 3.2. Planning imports this module, so it imports neither torch nor NumPy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.base import Config, StageError
from stages.networks.adapter import Adapter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.diffusion.samplers import Guidance, Solver
    from stages.diffusion.schedule import Level
    from stages.networks.condition import Condition

HOST, GUEST = "host", "guest"
"""The folders of the two pipelines."""


class CoopSettings(Config):
    """How the guest's estimate of the clean image is mixed into the host's."""

    delta: float = Field(0.5, ge=0, le=1, description="share of the guest's estimate; 0: the host alone")
    first_delta: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share at sigma = 1; the share is linear in sigma, and is delta at sigma = 0; default: delta",
    )
    max_snr: float | None = Field(
        None,
        gt=0,
        description="signal-to-noise ratio alpha^2 / sigma^2 above which the guest has no share, because errors of the "
        "conversion are then large compared with the remaining noise; default: no limit",
    )
    refresh: Literal["own", "re_encode"] = Field(
        "re_encode",
        description="estimate of clean data that advances the guest's state; re_encode: the fused image, encoded by "
        "the guest's VAE, so that both teachers follow one image; own: the guest's own estimate, so that the guest "
        "stays on its own path and has more influence; the paper does not say which it uses",
    )

    def share(self, alpha: float, sigma: float) -> float:
        """Return delta at a noise level."""
        if self.max_snr is not None and alpha**2 > self.max_snr * sigma**2:
            return 0.0
        first = self.delta if self.first_delta is None else self.first_delta
        return self.delta + (first - self.delta) * sigma


class BridgeSettings(Config):
    """When the host takes over from the guest."""

    switch: int = Field(
        500, ge=1, lt=1000, description="the least timestep at which the guest is called; below it, the host is called"
    )
    finish: bool = Field(
        False,
        description="whether the guest first samples its image to the end, as in a cascade; by default, the host "
        "starts from the guest's estimate of the image at the switch",
    )


class Cooperating(Adapter):
    """A host and a guest. Students, latents and images are those of the host. A sample is a function of one noise,
    which has the shape of the larger latents. The teacher with the smaller latents starts from `shrunk` noise."""

    FILE: ClassVar[str]
    """The file of the settings. A folder that has it is a teacher of this kind."""
    SETTINGS: ClassVar[type[Config]]
    GUEST_FAMILY: ClassVar[type[Adapter]]
    """The adapter of the guest."""

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, compile: bool = False
    ) -> None:
        """Raises StageError if host and guest do not fit."""
        families = {HOST: type(self).__bases__[1], GUEST: self.GUEST_FAMILY}
        host, guest = (
            family(folder / name, device=device, dtype=dtype, compile=compile) for name, family in families.items()
        )
        self.join(host, guest, self.SETTINGS.model_validate_json((folder / self.FILE).read_text(encoding="utf-8")))

    def join(self, host: Adapter, guest: Adapter, settings: Any) -> None:
        """Initialise this teacher from a loaded host and guest. Raises StageError if they do not fit."""
        self.__dict__.update(vars(host))
        self.host, self.guest, self.settings = host, guest, settings
        self.check_both()

    @abstractmethod
    def check_both(self) -> None:
        """Raise StageError if host and guest do not fit."""

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        return max(self.host.latent_shape, self.guest.latent_shape)

    def starts(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noises of host and guest. Both are white, and a function of `noise` (B, *noise_shape).

        Raises StageError if the shapes of their latents do not allow this."""
        return shrunk(noise, self.host.latent_shape), shrunk(noise, self.guest.latent_shape)

    def output(self, z: Tensor, level: Level, condition: Condition) -> Tensor:
        raise StageError(
            "a teacher of host and guest can only sample whole trajectories: distil it with a method that reads pairs"
        )

    def release(self) -> None:
        super().release()
        self.guest.release()


def pixels(adapter: Adapter) -> list[int]:
    """Return height and width of an adapter's images."""
    return [side * adapter.down_sampling for side in adapter.latent_shape[1:]]


def shrunk(noise: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return white noise (B, *shape) that is a function of white noise (B, C, H, W).

    It is the sum of each block of k x k elements, over k. Raises StageError unless `shape` is (C, H / k, W / k)."""
    from torch.nn import functional

    channels, height, width = noise.shape[1:]
    k = height // shape[1]
    if (channels, height, width) != (shape[0], k * shape[1], k * shape[2]):
        raise StageError(
            f"the latents of host and guest have the shapes {shape} and {(channels, height, width)}: both cannot start "
            "from one noise"
        )
    return noise if k == 1 else functional.avg_pool2d(noise, k) * k


class Coop(Cooperating):
    """The host's pipeline, whose estimates of clean data are mixed with those of a guest (2312.16486, eq. 4 to 6).

    The equations mix estimates of the noise, delta eps~ + (1 - delta) eps with eps~ = (z - alpha z~0) / sigma. At one z
    this is the same as mixing those of clean data, delta z~0 + (1 - delta) z0. z~0 = E(D'(z'0)) is the estimate of the
    guest, decoded by the guest's VAE and encoded by the host's.

    A state of sampling holds the latents of both: (B, C h w + C' h' w'), at one level of the host's schedule."""

    FILE = "coop.json"
    SETTINGS = CoopSettings

    def check_both(self) -> None:
        host, guest = (pixels(one) for one in (self.host, self.guest))
        if host != guest:
            raise StageError(f"host and guest make images of different sizes: {host} and {guest} pixels")

    def trajectory(
        self, solver: Solver, noise: Tensor, prompts: Sequence[str], guidance_scale: Guidance, grid: list[int]
    ) -> Iterator[tuple[int, Tensor]]:
        start = self._state(*self.starts(noise))
        for t, state in solver(self.denoiser(prompts, guidance_scale), start, self.schedule, self.prediction, grid):
            yield t, self._split(state)[0]

    def denoiser(self, prompts: Sequence[str], guidance_scale: Guidance) -> Callable[[Tensor, int], Tensor]:
        """Return `denoise(state, t)`, the output for a state in the host's prediction type. Both are guided."""
        import torch

        from stages.diffusion.grid import Grid
        from stages.diffusion.prediction import target, to_x0
        from stages.networks.denoiser import TeacherDenoiser

        host = self.host.denoiser(prompts, guidance_scale)
        guest = TeacherDenoiser(self.guest, Grid.trailing(self.schedule, len(self.schedule)))
        scales = torch.as_tensor(guidance_scale, dtype=torch.float64).expand(len(prompts))
        w = (scales - 1).to(self.device) if (scales != 1).any() else None
        condition = guest.encode(prompts)

        def denoise(state: Tensor, t: int) -> Tensor:
            alpha, sigma = self.schedule.at(t)
            delta = self.settings.share(alpha, sigma)
            z, z_guest = self._split(state)
            output = host(z, t)
            x0 = to_x0(self.prediction, output, z, alpha, sigma)
            if delta or self.settings.refresh == "own":
                point = torch.full((len(z),), t + 1, device=z.device)  # timestep t of the host's schedule
                x0_guest = guest.x0(z_guest, point, condition, w)
            if delta:
                x0 = delta * self.host.encode(self.guest.decode(x0_guest)) + (1 - delta) * x0
                output = target(self.prediction, x0, (z - alpha * x0) / sigma, alpha, sigma)
            if self.settings.refresh == "re_encode":
                x0_guest = self.guest.encode(self.host.decode(x0))
            output_guest = target(self.prediction, x0_guest, (z_guest - alpha * x0_guest) / sigma, alpha, sigma)
            return self._state(output, output_guest)

        return denoise

    def _state(self, host: Tensor, guest: Tensor) -> Tensor:
        import torch

        return torch.cat([host.flatten(1), guest.flatten(1)], 1)

    def _split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        size = self.latent_shape[0] * self.latent_shape[1] * self.latent_shape[2]
        return state[:, :size].view(-1, *self.latent_shape), state[:, size:].view(-1, *self.guest.latent_shape)


class Bridge(Cooperating):
    """The guest samples at timesteps t >= `switch`, the host at t < `switch`, at another resolution (2312.16486, 3.2).

    The guest's estimate of clean data is decoded, scaled in pixels to the size of the host's images, encoded by the
    host's VAE, and noised with the host's noise. Scaling noisy latents would correlate the noise of neighbours."""

    FILE = "bridge.json"
    SETTINGS = BridgeSettings

    def check_both(self) -> None:
        if list(self.host.schedule.alpha) != list(self.guest.schedule.alpha):
            raise StageError("host and guest of a bridge need the same noise schedule")

    def trajectory(
        self, solver: Solver, noise: Tensor, prompts: Sequence[str], guidance_scale: Guidance, grid: list[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Solve the ODE. Yields as other adapters do, but nothing for the timesteps of the guest.

        If all timesteps of the grid are on one side of `switch`, one teacher samples alone."""
        switch = self.settings.switch
        noisy, rest = [t for t in grid if t >= switch], [t for t in grid if t < switch]
        z, noise_guest = self.starts(noise)
        if noisy:
            grid_guest = grid if self.settings.finish else noisy
            *_, (_, x0) = self.guest.trajectory(solver, noise_guest, prompts, guidance_scale, grid_guest)
            alpha, sigma = self.schedule.at(rest[0] if rest else -1)
            z = alpha * self.bridged(x0) + sigma * z
        if rest:
            yield from self.host.trajectory(solver, z, prompts, guidance_scale, rest)
        else:
            yield -1, z

    def bridged(self, x0: Tensor) -> Tensor:
        """Convert latents of the guest (B, C', h', w') to latents of the host (B, C, h, w), by way of images."""
        from torch.nn import functional

        images = functional.interpolate(self.guest.decode(x0), pixels(self.host), mode="bicubic", antialias=True)
        return self.host.encode(images.clamp(-1, 1))


@cache
def cooperating(kind: type[Cooperating], host: type[Adapter], guest: type[Adapter]) -> type[Adapter]:
    """Return the adapter of this kind whose host and guest have these adapters."""
    made: Any = type(f"{kind.__name__}{host.__name__}", (kind, host), {"GUEST_FAMILY": guest})
    return made
