"""Coop-Diffusion: a guest teacher steers a host teacher of another latent space, through images.

PanGu-Draw, 2312.16486, section 3.2. Planning imports this module, so it imports neither torch nor NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.base import Config, StageError
from stages.networks.adapter import Adapter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.diffusion.schedule import Level
    from stages.networks.condition import Condition

FILE, HOST, GUEST = "coop.json", "host", "guest"
"""The file that makes a folder a fused teacher, and the folders of its two pipelines."""


class CoopSettings(Config):
    """How the guest's estimate of the clean image is mixed into the host's."""

    delta: float = Field(0.5, ge=0, le=1, description="share of the guest's estimate; 0: the host alone")
    first_delta: float | None = Field(
        None, ge=0, le=1, description="share at sigma = 1; linear in sigma from delta to it; default: delta"
    )
    max_snr: float | None = Field(
        None,
        gt=0,
        description="signal-to-noise ratio alpha^2 / sigma^2 above which the host is alone; default: none. Close to "
        "clean images, an error of the conversion is large beside the noise that is left",
    )
    refresh: Literal["own", "re_encode"] = Field(
        "re_encode",
        description="the estimate of clean data by which the guest's state goes on: re_encode, the fused image in the "
        "guest's latents, so that both look at one image; own, the guest's, which keeps to its own path and so pulls "
        "harder; the paper does not say which",
    )

    def share(self, alpha: float, sigma: float) -> float:
        """Return delta at a noise level."""
        if self.max_snr is not None and alpha**2 > self.max_snr * sigma**2:
            return 0.0
        first = self.delta if self.first_delta is None else self.first_delta
        return self.delta + (first - self.delta) * sigma


class Coop(Adapter):
    """The host's pipeline, whose estimates of clean data are mixed with those of a guest (2312.16486, eq. 4 to 6).

    The equations mix estimates of the noise, delta eps~ + (1 - delta) eps with eps~ = (z - alpha z~0) / sigma. At one z
    this is the same as mixing those of clean data, delta z~0 + (1 - delta) z0. z~0 = E(D'(z'0)) is the estimate of the
    guest, decoded by the guest's VAE and encoded by the host's.

    A state of sampling holds the latents of both: (B, C h w + C' h' w'), at one level of the host's schedule. `begin`
    makes it from the host's noise alone, so that samples are a function of that noise."""

    GUEST_FAMILY: ClassVar[type[Adapter]]
    """The adapter of the guest."""

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, compile: bool = False
    ) -> None:
        """Raises StageError if the images of the two have different sizes."""
        families = {HOST: type(self).__bases__[1], GUEST: self.GUEST_FAMILY}
        host, guest = (
            family(folder / name, device=device, dtype=dtype, compile=compile) for name, family in families.items()
        )
        self.join(host, guest, CoopSettings.model_validate_json((folder / FILE).read_text(encoding="utf-8")))

    def join(self, host: Adapter, guest: Adapter, mixing: CoopSettings) -> None:
        """Make this the fusion of two loaded teachers. Students and images are those of the host. Raises StageError."""
        self.__dict__.update(vars(host))
        self.host, self.guest, self.mixing = host, guest, mixing
        sizes = [[side * one.down_sampling for side in one.latent_shape[1:]] for one in (self, self.guest)]
        if sizes[0] != sizes[1]:
            raise StageError(f"host and guest make images of different sizes: {sizes[0]} and {sizes[1]} pixels")

    def begin(self, noise: Tensor) -> Tensor:
        """Return the state that starts from the host's noise (B, C, h, w).

        A guest of the same shape starts from the same noise. One of half the size starts from the sums of 2x2 blocks
        over 2, which are white noise again. Raises StageError for other shapes."""
        from torch.nn import functional

        own = noise
        if self.guest.latent_shape != self.latent_shape:
            channels, height, width = self.latent_shape
            if self.guest.latent_shape != (channels, height // 2, width // 2):
                raise StageError(
                    f"the guest's latents are {self.guest.latent_shape}, the host's {self.latent_shape}: the guest's "
                    "noise cannot be made from the host's, so that there are no pairs"
                )
            own = functional.avg_pool2d(noise, 2) * 2
        return self._state(noise, own)

    def end(self, state: Tensor) -> Tensor:
        """Return the host's latents (B, C, h, w) in a state."""
        return self._split(state)[0]

    def denoiser(self, prompts: Sequence[str], guidance_scale: float) -> Callable[[Tensor, int], Tensor]:
        """Return `denoise(state, t)`, the output for a state in the host's prediction type. Both are guided."""
        import torch

        from stages.diffusion.grid import Grid
        from stages.diffusion.prediction import target, to_x0
        from stages.networks.denoiser import TeacherDenoiser

        host = self.host.denoiser(prompts, guidance_scale)
        guest = TeacherDenoiser(self.guest, Grid.trailing(self.schedule, len(self.schedule)), guidance_scale)
        condition = guest.encode(prompts)

        def denoise(state: Tensor, t: int) -> Tensor:
            alpha, sigma = self.schedule.at(t)
            delta = self.mixing.share(alpha, sigma)
            z, z_guest = self._split(state)
            output = host(z, t)
            x0 = to_x0(self.prediction, output, z, alpha, sigma)
            x0_guest = guest.x0(z_guest, torch.full((len(z),), t + 1, device=z.device), condition)  # t, by its SNR
            if delta:
                x0 = delta * self.host.encode(self.guest.decode(x0_guest)) + (1 - delta) * x0
                output = target(self.prediction, x0, (z - alpha * x0) / sigma, alpha, sigma)
            if self.mixing.refresh == "re_encode":
                x0_guest = self.guest.encode(self.host.decode(x0))
            own = target(self.prediction, x0_guest, (z_guest - alpha * x0_guest) / sigma, alpha, sigma)
            return self._state(output, own)

        return denoise

    def output(self, z: Tensor, level: Level, condition: Condition) -> Tensor:
        raise StageError("a fused teacher is called along a whole trajectory: distil it with a method that reads pairs")

    def release(self) -> None:
        super().release()
        self.guest.release()

    def _state(self, host: Tensor, guest: Tensor) -> Tensor:
        import torch

        return torch.cat([host.flatten(1), guest.flatten(1)], 1)

    def _split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        own = self.latent_shape[0] * self.latent_shape[1] * self.latent_shape[2]
        return state[:, :own].view(-1, *self.latent_shape), state[:, own:].view(-1, *self.guest.latent_shape)


@cache
def coop(host: type[Adapter], guest: type[Adapter]) -> type[Adapter]:
    """Return the adapter of fused teachers whose host and guest have these adapters."""
    made: Any = type(f"Coop{host.__name__}", (Coop, host), {"GUEST_FAMILY": guest})
    return made
