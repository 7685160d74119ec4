"""Adapter: the base class through which Retort uses a family of diffusers pipelines.

A new family is a subclass of Adapter in its own file, registered in `stages.networks.adapters`. Another package
registers one with an entry point of the group `retort.teachers`. The name of the entry point is the pipeline class that
`model_index.json` names.

Planning imports this module and reads only the JSON files of a pipeline. It must not import torch at module level.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stages.base import StageError
from stages.diffusion.form import Form
from stages.diffusion.prediction import Prediction
from stages.networks.lora import LoraSettings, adapted

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from stages.data.latents import LabelledLatents
    from stages.diffusion.grid import Grid
    from stages.diffusion.samplers import Guidance, Solver
    from stages.diffusion.schedule import Level, NoiseSchedule
    from stages.networks.condition import Condition
    from stages.networks.unet_features import Bottleneck, Features

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""The values of `beta_schedule` that diffusers' DDIMScheduler supports."""
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
"""The scheduler class of flow-matching pipelines."""
FLOW_OPTIONS = (
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
"""Options of FLOW_SCHEDULER that change its noise levels or its steps. NoiseSchedule.flow has none of them."""
INDEX = "model_index.json"
"""The file that names the components of a diffusers pipeline. A teacher folder without it holds no network."""
IGNORED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that a pipeline may have and that Retort does not use."""


class Unsupported(StageError):
    """The adapter does not support the pipeline in a folder. The message says what was found there."""


class Adapter(ABC):
    """A pipeline of one family, loaded from a diffusers folder, with its frozen denoising network.

    A sample that the network denoises is called a latent, (C, H, W). For a pipeline with a VAE it is the VAE's latent,
    multiplied by the VAE's scaling factor. For a pixel-space pipeline it is the image, in [-1, 1].

    Students, discriminators and fake scores are networks of the same family. The adapter of the teacher calls them too.
    A deep copy of an object that holds an adapter shares that adapter.

    A subclass sets COMPONENTS, FILES and SUPPORTS. It implements `network_class`, `encode_prompts`, `predict`,
    `save_pipeline`, `usage`, `down_sampling`, `decode`, `decode_with_gradient` and `encode`. It overrides other
    attributes and methods where the defaults do not fit.
    """

    COMPONENTS: ClassVar[Mapping[str, str | None]]
    """Component of the pipeline -> the class that it must have. None: any class."""
    FILES: ClassVar[tuple[str, ...]]
    """Glob patterns of the files that Retort copies, relative to the pipeline's folder. Each must match a file. List
    safetensors weights in one precision, and no files of IGNORED components."""
    SUPPORTS: ClassVar[str]
    """What the adapter supports, for error messages: `Stable Diffusion 1.x or 2.x layout (...)`."""
    NETWORK: ClassVar[str] = "unet"
    """The component that is distilled. A student's weights are in the subfolder of this name."""
    HEAD: ClassVar[str] = "conv_out"
    """The name of the network's last layer, a 3x3 convolution with padding 1. No activation follows it."""
    FURTHER_INPUTS: ClassVar[tuple[str, ...]] = ()
    """Keys of the network's config that require inputs which `predict` does not provide. `check` refuses a config that
    sets one of them."""
    FLOW: ClassVar[bool] = False
    """Whether the networks of this family are trained by flow matching. `check` requires a scheduler of that kind."""
    DROPPED: ClassVar[Mapping[str, Any]] = {}
    """Entries that are written to `model_index.json` to mark optional components as absent."""
    MICRO_CONDITIONING: ClassVar[bool] = False
    """Whether the networks are conditioned on the sizes in `micro_conditioning.json`, as those of SDXL are."""
    LORA_TARGETS: ClassVar[tuple[str, ...]] = ()
    """The layers that get LoRA weights by default: ends of their names. Names that match no layer are ignored. If there
    are no defaults, LoRA students need the setting `targets`."""
    FEATURES: ClassVar[bool] = False
    """Whether the adapter implements `features` and `bottleneck`, which discriminators need."""

    # --- Read from the JSON files of a folder ---

    @classmethod
    def check_index(cls, folder: Path) -> None:
        """Check that `model_index.json` names the components of this family and no unknown ones. Raises Unsupported."""
        index = read_json(folder / INDEX)
        for name, kind in cls.COMPONENTS.items():
            component = index.get(name)
            found = component[1] if isinstance(component, list) and len(component) == 2 else None
            if found is None or (kind is not None and found != kind):
                raise Unsupported(f"{folder} is a {index.get('_class_name')} whose {name} is {found or 'missing'}")
        known = {*cls.COMPONENTS, *IGNORED}
        for name, value in index.items():
            if name not in known and isinstance(value, list) and value[-1:] != [None]:
                raise Unsupported(f"{folder} has a {name}, which is not part of the layout")

    @classmethod
    def check(cls, folder: Path) -> None:
        """Check that the adapter can run the pipeline in `folder`. Reads only JSON files. Raises Unsupported if not."""
        cls.check_index(folder)
        for pattern in cls.FILES:
            if not any(folder.glob(pattern)):
                raise Unsupported(f"{folder} has no {pattern}")
        config = read_json(folder / cls.NETWORK / "config.json")
        if config.get("in_channels") != config.get("out_channels"):
            channels = f"{config.get('in_channels')} channels in and {config.get('out_channels')} out"
            raise Unsupported(f"{folder}'s {cls.NETWORK} has {channels}: it takes inputs other than noise and a prompt")
        if _sample_size(config) is None:
            given = config.get("sample_size")
            raise Unsupported(f"{folder}'s {cls.NETWORK} has sample_size: {given}, not an integer or two integers")
        wanted = next((name for name in cls.FURTHER_INPUTS if config.get(name) is not None), None)
        if wanted:
            raise Unsupported(f"{folder}'s {cls.NETWORK} has {wanted}: {config[wanted]}")
        cls._check_scheduler(folder)

    @classmethod
    def _check_scheduler(cls, folder: Path) -> None:
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        name = scheduler.get("_class_name")
        if (name == FLOW_SCHEDULER) != cls.FLOW:
            raise Unsupported(f"{folder}'s scheduler is {name}, which is {'not ' if cls.FLOW else ''}for flow matching")
        option = next((option for option in FLOW_OPTIONS if scheduler.get(option)), None)
        if cls.FLOW and option:
            raise Unsupported(f"{folder}'s scheduler has {option}: {scheduler[option]}")
        if not cls.FLOW and scheduler.get("beta_schedule") not in BETAS and not scheduler.get("trained_betas"):
            raise Unsupported(f"{folder}'s scheduler, {name}, has neither a supported beta_schedule nor trained_betas")

    @classmethod
    def timesteps_of(cls, folder: Path) -> int:
        """Return T, the number of training timesteps of the noise schedule. Raises Unsupported if a file is missing."""
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        betas = scheduler.get("trained_betas")
        return len(betas) if betas else int(scheduler["num_train_timesteps"])

    @classmethod
    def prediction_of(cls, folder: Path) -> Prediction:
        """Return the prediction type of the network. Raises Unsupported if a file is missing."""
        if cls.FLOW:
            return "flow_prediction"
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        found: Prediction = scheduler.get("prediction_type", "epsilon")  # diffusers' default
        return found

    @classmethod
    def image_size_of(cls, folder: Path) -> tuple[int, int] | None:
        """Return (height, width) of the images in pixels, or None if the config does not give it.

        The default is the network's `sample_size`, which is right for pixel-space pipelines only. Raises Unsupported if
        a file is missing."""
        return _sample_size(read_json(folder / cls.NETWORK / "config.json"))

    @classmethod
    def guidance_error(cls, folder: Path, as_input: bool) -> str | None:
        """Return why classifier-free guidance is impossible with this teacher, or None if it is possible.

        If `as_input`, its students must also be able to take the guidance strength w as an input. By default they
        cannot. Override it together with `with_guidance_embedding`. Raises Unsupported if a file is missing."""
        return f"{cls.__name__} has no students that take the guidance strength as an input" if as_input else None

    # --- The loaded pipeline ---

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, compile: bool = False
    ) -> None:
        """Load the pipeline from `folder` to `device`, with a frozen network that computes in `dtype`.

        `dtype` is float32 by default. `compile` compiles the network for the calls by `denoiser`. The attribute
        `latent_shape` is (C, H, W). The attribute `schedule` is the noise schedule of the folder's scheduler."""
        import torch

        from stages.networks.compute import device_name, show_no_progress_bars

        show_no_progress_bars()
        self.folder, self.device, self.dtype = folder, torch.device(device), dtype or torch.float32
        self.device_name = device_name(device)
        self.network = self._frozen(self.load_network(folder, self.dtype))
        self.schedule = self._read_schedule()
        self.prediction: Prediction = self.prediction_of(folder)
        height, width = _sample_size(self.network.config) or (0, 0)
        self.latent_shape = (int(self.network.config["in_channels"]), height, width)
        self._called = torch.compile(self.network) if compile else self.network
        self._timesteps: dict[float, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        return self

    @classmethod
    @abstractmethod
    def network_class(cls) -> Any:
        """Return the class of the network, a diffusers ModelMixin with a config."""

    @classmethod
    def load_network(cls, folder: Path, dtype: torch.dtype | None = None) -> Any:
        """Load the network from the folder of a teacher or student of this family, to the CPU.

        `dtype` is float32 by default."""
        return cls.network_class().from_pretrained(
            folder, subfolder=cls.NETWORK, use_safetensors=True, torch_dtype=dtype
        )

    def _frozen(self, module: Any) -> Any:
        return module.to(self.device).eval().requires_grad_(False)

    def _read_schedule(self) -> NoiseSchedule:
        from diffusers import DDIMScheduler

        from stages.diffusion.schedule import NoiseSchedule

        if self.FLOW:
            config = read_json(self.folder / "scheduler" / "scheduler_config.json")
            return NoiseSchedule.flow(config["num_train_timesteps"], config.get("shift", 1.0))
        scheduler = DDIMScheduler.from_pretrained(self.folder / "scheduler")
        return NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.double().numpy())

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Return the condition of the network for `prompts`, one row for each prompt.

        Raises StageError for a prompt that the network does not know."""

    def encode_dropped(self) -> Condition:
        """Return the unconditional condition of classifier-free guidance, one row.

        The default is the condition of the empty prompt. Raises StageError if the network cannot be guided."""
        return self.encode_prompts([""])

    @classmethod
    @abstractmethod
    def predict(cls, network: Any, z: Tensor, level: Level, condition: Condition, w: Tensor | None = None) -> Tensor:
        """Call `network`, a network of this family, at z (B, C, H, W) and return its output.

        The output is in the network's prediction type. Its shape is that of z, or (B, 2 C, H, W) for students that
        predict both x0 and the noise. Its dtype is that of z, except under autocast.

        z = alpha x0 + sigma noise, with alpha and sigma of `level`. `level.timestep` is a tensor on the device of z, ()
        or (B,). `condition` has B rows and was made by `encode_prompts`. w (B,) is guidance_scale - 1. It is None for
        networks that do not take w as an input.

        All calls of denoising networks go through this method: those of teachers, students, fake scores and
        discriminators."""

    def denoiser(self, prompts: Sequence[str], guidance_scale: Guidance) -> Callable[[Tensor, int], Tensor]:
        """Return `denoise(z, t)`, the teacher's output at z (B, C, H, W) and timestep t for B prompts.

        `guidance_scale` is one scale, or an array (B,) of one for each prompt. With a scale other than 1, and always
        with an array, the output is guided. The conditional and the unconditional output are then computed in one batch
        of 2 B.

        z and the output are float32. Only the network computes in the teacher's dtype, so that the state of a solver is
        not rounded at each step.
        """
        import torch

        from stages.diffusion.guidance import guide
        from stages.networks.condition import Condition

        condition = self.teacher_condition(prompts)
        if isinstance(guidance_scale, float | int) and guidance_scale == 1.0:
            return lambda z, t: self.output(z, self.schedule.at(t), condition)
        scale = (
            guidance_scale
            if isinstance(guidance_scale, float | int)
            else self.to_device(guidance_scale).view(-1, 1, 1, 1)
        )
        both = Condition.cat([self.teacher_dropped().expand(len(condition)), condition])

        def denoise(z: Tensor, t: int) -> Tensor:
            dropped, conditional = self.output(torch.cat([z, z]), self.schedule.at(t), both).chunk(2)
            return guide(dropped, conditional, scale)

        return denoise

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """The shape of the noise from which a trajectory starts: for most teachers, that of a latent."""
        return self.latent_shape

    def trajectory(
        self, solver: Solver, noise: Tensor, prompts: Sequence[str], guidance_scale: Guidance, grid: list[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Solve the probability-flow ODE from `noise` (B, C, H, W) at the timesteps of `grid`, in descending order.

        Yields (t, z_t) before the call at t, and finally (-1, x0)."""
        return solver(self.denoiser(prompts, guidance_scale), noise, self.schedule, self.prediction, grid)

    def output(self, z: Tensor, level: Level, condition: Condition) -> Tensor:
        """Return the teacher's output at z (B, C, H, W), float32: that of its network, computed in its dtype.

        `condition` has B rows and was made by `teacher_condition`. `level` is as in `predict`. Its timestep may also be
        a number. Autocast has no effect, because guidance amplifies rounding errors."""
        import torch

        if not isinstance(level.timestep, torch.Tensor):
            level = self.on_device(level)
        with torch.autocast(self.device.type, enabled=False):
            return self.predict(self._called, z.to(self.dtype), level, condition).float()

    def teacher_condition(self, prompts: Sequence[str]) -> Condition:
        """Return the condition for `prompts` that `output` takes. By default it is that of the network."""
        return self.encode_prompts(prompts)

    def teacher_dropped(self) -> Condition:
        """Return the unconditional condition that `output` takes, one row."""
        return self.encode_dropped()

    def on_device(self, level: Level) -> Level:
        """Return `level` with its timestep, a number, as a tensor () on the device.

        Tensors are cached, so that each timestep is copied to the device only once."""
        import torch

        from stages.diffusion.schedule import Level

        t = level.timestep
        if t not in self._timesteps:
            self._timesteps[t] = torch.tensor(t, device=self.device)
        return Level(level.alpha, level.sigma, self._timesteps[t])

    def at(self, timestep: float) -> Adapter:
        """Return the pipeline whose network the teacher calls at `timestep`. Most teachers have only one."""
        return self

    # --- Students and discriminators ---

    def student_network(self) -> Any:
        """Return a trainable copy of the network, from which a student starts."""
        return copy.deepcopy(self.network).requires_grad_(True)

    def lora_network(self, lora: LoraSettings, takes_w: bool = False) -> Any:
        """Return a copy of the network that trains only LoRA weights, and shares all other weights with the teacher.

        With `takes_w`, the copy also has the guidance strength as an input, with trainable weights. Raises StageError
        if the family has no such networks, or if a target of `lora` matches no layer."""
        from stages.networks.compute import tie

        network = self.network
        if takes_w:
            network = self.with_guidance_embedding(network)
            tie(network, self.network)
        return adapted(network, lora, self.LORA_TARGETS)

    def plain_lora_error(self, form: Form) -> str | None:
        """Return why plain diffusers cannot load the LoRA weights of a student of `form`, or None if it can."""
        return "the pipelines of its teacher's family load no LoRA weights"

    def random_network(self) -> Any:
        """Return a network with the config of the teacher's and random initial weights, on the CPU."""
        return self.network_class().from_config(self.network.config)

    def with_guidance_embedding(self, network: Any) -> Any:
        """Return a network with the weights of `network` and the guidance strength w as an additional input.

        The weights of the new input are zero, so that the output does not depend on w at first. Raises StageError if
        the family has no such networks."""
        raise StageError(f"{type(network).__name__} cannot take the guidance strength w as an input")

    def with_camera(self, network: Any) -> Any:
        """Give `network` the camera as a further input, with new trainable weights that change nothing at first.

        Its conditions then have the tensor CAMERA of `stages.networks.camera`. Raises StageError if the family has no
        such networks."""
        raise StageError(f"{type(network).__name__} cannot take the camera as an input")

    def features(self, network: Any, multi_scale: bool) -> Features:
        """Return the access to the intermediate features of `network` that a discriminator needs.

        It may remove the network's output layers. The network is then of no other use. Raises StageError if features
        of this network are not supported."""
        raise StageError(f"{type(network).__name__} has no features for a discriminator")

    def bottleneck(self, network: Any) -> Bottleneck:
        """Return the access to the smallest features of `network`, which stays a denoiser.

        Raises StageError if features of this network are not supported."""
        raise StageError(f"{type(network).__name__} has no features for a discriminator")

    def student_scheduler(self, form: Form, grid: Grid) -> Any:
        """Return the diffusers scheduler that is exported with a student of `form` and `grid`.

        With it, plain diffusers samples as Retort does, unless `plain_error` says why not."""
        from stages.networks.exporting import scheduler_of

        return scheduler_of(form, grid, self.folder)

    def plain_error(self, form: Form, grid: Grid, scheduler: Any) -> str | None:
        """Return why plain diffusers cannot sample a student of `form` as Retort does, or None if it can.

        `scheduler` is the one that `student_scheduler` returned."""
        from stages.networks.exporting import plain_error

        return plain_error(form, grid, scheduler)

    @abstractmethod
    def save_pipeline(self, network: Any, scheduler: Any, folder: Path) -> None:
        """Write a diffusers pipeline to `folder`: this one, with `network` and `scheduler` in place of its own.

        It has only components that stock diffusers can load. `load_network` loads its network."""

    @abstractmethod
    def usage(self, form: Form, scheduler: str, lora: bool = False) -> str:
        """Return Python code for the model card that generates an image with an exported student of `form`.

        The code uses diffusers and torch only. It loads the folder as "THIS FOLDER". `scheduler` is the class name of
        the student's scheduler. With `lora`, the folder holds LoRA weights for the pipeline "THE TEACHER". They are
        loaded only if `plain_lora_error` gives None."""

    @property
    def call_settings(self) -> Mapping[str, Any]:
        """The arguments that a pipeline of this teacher needs in each call, besides the prompt. Empty by default."""
        return {}

    def single_file(self, network: Any, form: Form) -> dict[str, Tensor]:
        """Return the weights of a student of `form` and of the pipeline's other components, for a single file. They
        have the names and shapes that programs other than diffusers expect. The student takes no w. Raises StageError
        if the family or the network has no such layout."""
        raise StageError(
            f"there is no single-file layout for {type(self).__name__} students, only for those of Stable Diffusion"
        )

    # --- Images and texts ---

    @property
    @abstractmethod
    def down_sampling(self) -> int:
        """The height of an image in pixels, divided by the height of its latent. 1 for pixel-space pipelines."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W), float32, clamped to [-1, 1], on the CPU."""

    @abstractmethod
    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) on the device to images (B, 3, H, W) on the device, for losses between images.

        Gradients flow to the latents. The images are not clamped."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] as latents (B, C, h, w), float32, on the device."""

    def encode_with_gradient(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) on the device as latents (B, C, h, w). Gradients flow to the images.

        It computes what `encode` does, in one batch. Raises StageError if the family does not support it."""
        raise StageError(f"{type(self).__name__} cannot encode images with gradients")

    def prompts_of(self, images: LabelledLatents) -> list[str]:
        """Return the prompt of each image of a set, in the form that `encode_prompts` takes.

        The default is the captions. Raises StageError if the teacher has no prompts for these images."""
        return images.captions

    def text_states(self, prompts: Sequence[str]) -> Tensor:
        """Return the hidden states (B, L, D) of the text encoder for B prompts, to be stored with pairs.

        Raises StageError if there is no text encoder."""
        raise StageError("text_embeddings: the teacher has no text encoder")

    # --- The device ---

    def release(self) -> None:
        """Move the network to the CPU to free memory of the device. Call it when the network is no longer needed."""
        self.network.to("cpu")

    def to_device(self, array: NDArray[np.floating]) -> Tensor:
        """Copy `array` to the device as float32, whatever the dtype of the network."""
        import torch

        return torch.from_numpy(array).to(self.device, torch.float32)

    def to_numpy(self, array: Tensor) -> NDArray[np.float32]:
        """Copy a tensor to the CPU as a float32 array."""
        return array.float().cpu().numpy()

    def inference(self) -> torch.inference_mode:
        """Return a context in which no gradients are recorded."""
        import torch

        return torch.inference_mode()


def _sample_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (height, width) of the network's samples, or None if `config` does not give them."""
    match config.get("sample_size"):
        case int(size):
            return size, size
        case [int(height), int(width)]:
            return height, width
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises Unsupported if the file is missing, StageError if it has no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unsupported(f"{path.parent} has no {path.name}: it is not a diffusers pipeline") from None
    except (ValueError, RecursionError) as error:
        raise StageError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise StageError(f"{path} has no JSON object")
    return value
