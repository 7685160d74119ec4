"""Access for discriminators to the intermediate features of a diffusers U-Net, in latent or pixel space."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from stages.base import StageError

Entry = Callable[[Tensor], Tensor]
"""A function from features (B, C, h, w) to what is added to them, of the same shape."""


class Features:
    """The features of a U-Net's decoder, and the points of its encoder at which further inputs are added.

    With `multi_scale`, each block of the decoder gives three features: its first skip connection, its input from the
    block below, and its output before up-sampling. Without `multi_scale` there is only the output of the last block,
    which the U-Net's output layer reads.

    Inputs are added after the first convolution and, with `multi_scale`, after each down-sampling layer.
    """

    def __init__(self, unet: Any, multi_scale: bool) -> None:
        """Replace the output layers of `unet` by identities, because nothing uses their output.

        Raises StageError if a block takes or returns more than features and skip connections."""
        strange = [type(block).__name__ for block in (*unet.down_blocks, *unet.up_blocks) if not _is_plain(block)]
        if strange:
            raise StageError(
                f"the teacher's U-Net cannot be a discriminator: its {strange[0]} passes an image beside the features"
            )
        unet.conv_norm_out = unet.conv_act = unet.conv_out = nn.Identity()
        self._unet = unet
        self._halving = [block for block in unet.down_blocks if block.downsamplers] if multi_scale else []
        below, channels = unet.config["block_out_channels"][-1], []
        for block in unet.up_blocks:
            out = block.resnets[-1].out_channels
            channels += [block.resnets[0].in_channels - below, below, out]
            below = out
        self._judged = slice(None) if multi_scale else slice(-1, None)
        self.channels: list[int] = channels[self._judged]
        """Number of channels of each feature, from the coarsest scale to the finest."""
        self.first: int = unet.conv_in.out_channels
        """Number of channels after the first convolution."""
        self.halved: list[int] = [block.resnets[-1].out_channels for block in self._halving]
        """Number of channels after each down-sampling layer. Empty without `multi_scale`."""
        self.groups: int = unet.config["norm_num_groups"]
        """Number of groups of the U-Net's group norms."""

    @contextmanager
    def listening(self, first: Entry | None, halved: Sequence[Entry]) -> Iterator[Callable[[], list[Tensor]]]:
        """Install hooks for one call of the U-Net. Yields a function that returns the features after that call.

        `first` is added after the first convolution, and `halved` after each down-sampling layer. The features are
        (B, C, h, w), in the order of `channels`.

        With gradient checkpointing, diffusers recomputes single resnets and attentions in the backward pass, and would
        call hooks inside them again. So hooks are on blocks, up-samplers and down-samplers only.
        """
        features: list[Tensor] = []

        def before(block: nn.Module, args: Any, kwargs: Any) -> None:
            given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
            features.extend([given["res_hidden_states_tuple"][-1], given["hidden_states"]])

        def enter(entry: Entry) -> Any:
            return lambda _module, _args, output: output + entry(output)

        with ExitStack() as hooks:
            if first is not None:
                hooks.enter_context(self._unet.conv_in.register_forward_hook(enter(first)))
            for block, entry in zip(self._halving, halved, strict=True):
                hooks.enter_context(block.downsamplers[-1].register_forward_hook(enter(entry)))
            for block in self._unet.up_blocks:
                hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(
                    block.upsamplers[0].register_forward_pre_hook(lambda _module, args: features.append(args[0]))
                    if block.upsamplers
                    else block.register_forward_hook(lambda _module, _args, output: features.append(output))
                )
            yield lambda: features[self._judged]


class Bottleneck:
    """The output of a U-Net's middle block, its smallest features. The U-Net is not changed, and stays a denoiser."""

    def __init__(self, unet: Any) -> None:
        """Raises StageError if the U-Net has no middle block."""
        if unet.mid_block is None:
            raise StageError("the teacher's U-Net has no middle block for a discriminator's head")
        self._middle = unet.mid_block
        self.channels: int = unet.config["block_out_channels"][-1]
        """Number of channels."""
        self.halvings: int = sum(bool(block.downsamplers) for block in unet.down_blocks)
        """How often the side of z is halved."""
        self.groups: int = unet.config["norm_num_groups"]
        """Number of groups of the U-Net's group norms."""

    def features(self, call: Callable[[], Any]) -> Tensor:
        """Run `call`, which calls the U-Net, and return the features (B, channels, h, w). The decoder is not run."""
        found: list[Tensor] = []

        def stop(_block: nn.Module, _args: Any, output: Tensor) -> None:
            found.append(output)
            raise _Reached

        hook = self._middle.register_forward_hook(stop)
        try:
            call()
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0]


class _Reached(Exception):
    """Raised to stop the U-Net when the features are computed."""


def _is_plain(block: Any) -> bool:
    """Whether a block takes and returns features and skip connections only, as in Stable Diffusion."""
    return not hasattr(block, "skip_conv") and not hasattr(block, "skip_norm")
