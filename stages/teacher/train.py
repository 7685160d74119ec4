"""Trains a small Stable Diffusion pipeline on an image set."""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn

from stages.base import SCRATCH, Progress, StageError
from stages.data.images.labelled import LabelledImages
from stages.data.images.load import load
from stages.data.latents import LabelledLatents
from stages.data.order import ShuffledOrder
from stages.data.prompts.vocabulary import prompt_warnings
from stages.diffusion.schedule import NoiseSchedule
from stages.networks import build
from stages.networks.adapters import adapter_of, family_of
from stages.networks.compute import device_of, prepare, remade, show_no_progress_bars
from stages.networks.condition import Condition
from stages.networks.stable_diffusion import ONE_FILE, StableDiffusion, encode
from stages.teacher.autoencoder import AutoencoderTraining, latents_of, reconstruction_mse
from stages.teacher.config import TrainedTeacher
from stages.teacher.denoiser import DenoiserTraining
from stages.teacher.encoding import encoded
from stages.training import Batch, TrainingExecution
from stages.training.loop import train

log = logging.getLogger(__name__)


def train_teacher(
    config: TrainedTeacher,
    seed: int,
    execution: TrainingExecution,
    output: Path,
    threads: int,
    shared_vae: Path | None = None,
    start: Path | None = None,
) -> Generator[Progress, None, dict[str, Any]]:
    """Train the VAE, then the denoiser on its latents. Write the pipeline to `output`, and return figures.

    shared_vae: the folder of a pipeline whose VAE is used in place of a new one. start: the folder of a pipeline.
    Training starts from its U-Net, text encoder and tokenizer. Raises StageError if they do not fit, or if the error
    of a trained VAE on held-out images is above `max_mse`.
    """
    prepare(threads)
    show_no_progress_bars()
    torch.manual_seed(seed)
    images, unseen = (load(config.dataset, held_out=held_out, scratch=output / SCRATCH) for held_out in (False, True))
    images = images.upscaled(config.upscaled, seed)
    side = config.latent_size
    vae: Any = None
    if shared_vae:
        vae = AutoencoderKL.from_pretrained(shared_vae, subfolder="vae", use_safetensors=True)
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        side = config.dataset.size // factor
        if config.dataset.size % factor or side % 2 ** (len(config.denoiser.channels) - 1):
            raise StageError(
                f"train.vae: this VAE and the U-Net cannot halve images of {config.dataset.size} pixels at every level"
            )
    tokenizer, networks = _networks(config, images.captions, side, start)
    if vae is None:
        vae = yield from _train_vae(config, images, seed, execution, output)
    mse = reconstruction_mse(vae, unseen)
    log.info("VAE reconstruction MSE on held-out images: %.5f", mse)
    if mse > config.vae.max_mse and not shared_vae:
        raise StageError(
            f"the VAE reconstructs held-out images with MSE {mse:.4f}, more than train.vae.max_mse = "
            f"{config.vae.max_mse}; raise train.vae.training.steps, or accept it by raising max_mse"
        )
    latents = latents_of(vae, images)
    if not shared_vae:
        vae.register_to_config(scaling_factor=float(1.0 / latents.std()))
    scaling: float = vae.config["scaling_factor"]
    latents = latents * scaling
    crop = config.crop and config.crop * side // config.dataset.size

    schedule = NoiseSchedule.stable_diffusion()
    order = ShuffledOrder(len(images), config.denoiser.training.batch_size, seed + 1)
    trained = yield from train(
        DenoiserTraining(
            networks,
            lambda texts: StableDiffusion.conditioned_on(encode(tokenizer, networks["text_encoder"], texts)[0]),
            partial(StableDiffusion.predict, networks["unet"]),
            schedule,
            config.prediction,
            config.drop_text,
            config.denoiser.training,
            config.times,
            crop,
        ),
        lambda step: _captioned(latents, images.captions, order, step),
        seed=seed + 1,
        checkpoints=output / SCRATCH / "denoiser",
        execution=execution,
        unit="U-Net steps",
    )
    averages = trained.averages["denoiser"].cpu()
    assert isinstance(averages, nn.ModuleDict)
    _seal(vae, tokenizer, averages, config, output)
    return {
        "device": trained.device,
        "vae_reconstruction_mse": mse,
        "scaling_factor": scaling,
        "denoiser_loss": trained.history[-1]["loss"],
        "parameters_millions": {name: build.parameters_millions(m) for name, m in {"vae": vae, **networks}.items()},
    }


def _networks(
    config: TrainedTeacher, captions: Sequence[str], side: int, start: Path | None
) -> tuple[Any, nn.ModuleDict]:
    """Return the tokenizer, the text encoder and the U-Net for latents of `side`, new or those of `start`."""
    if start is None:
        tokenizer = build.word_tokenizer(captions)
        text_encoder, unet = build.text_encoder(tokenizer), build.unet(side, build.TEXT_WIDTH, config.denoiser.channels)
        return tokenizer, nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    if family_of(adapter_of(start)) is not StableDiffusion:
        raise StageError("train.start: it is not a Stable Diffusion pipeline")
    of_start = StableDiffusion(start)
    found = list(of_start.network.config["block_out_channels"]), of_start.prediction
    if found != (config.denoiser.channels, config.prediction):
        raise StageError(
            f"train.start: its U-Net has denoiser.channels: {found[0]} and prediction: {found[1]}; set these"
        )
    for text in prompt_warnings(start, [sorted(set(captions))]):
        log.warning("train.start: %s", text)
    unet = of_start.student_network().cpu()
    unet.register_to_config(sample_size=side)
    text_encoder = copy.deepcopy(of_start.text_encoder).cpu().requires_grad_(True)
    return of_start.tokenizer, nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})


def _train_vae(
    config: TrainedTeacher, images: LabelledImages, seed: int, execution: TrainingExecution, output: Path
) -> Generator[Progress, None, nn.Module]:
    """Train the VAE. Returns its average, on the CPU."""
    order = ShuffledOrder(len(images), config.vae.training.batch_size, seed)
    fitted = yield from train(
        AutoencoderTraining(build.autoencoder(config.dataset.size, config.vae.channels), config.vae.training),
        lambda step: {"images": torch.from_numpy(images.pixels(order.batch(step)))},
        seed=seed,
        checkpoints=output / SCRATCH / "vae",
        execution=execution,
        unit="VAE steps",
    )
    return fitted.averages["vae"].cpu()


def train_network(
    config: TrainedTeacher, seed: int, execution: TrainingExecution, output: Path, threads: int
) -> Generator[Progress, None, dict[str, Any]]:
    """Train a network with `denoiser.channels` for the pipeline in `output`. Write it to a folder in SCRATCH.

    Returns figures. Raises StageError if the network cannot have these channels, or if the images have another size
    than the pipeline's."""
    prepare(threads)
    show_no_progress_bars()
    pipeline = adapter_of(output)(output, device=device_of(execution))
    torch.manual_seed(seed)
    try:
        network = remade(pipeline.network, block_out_channels=tuple(config.denoiser.channels))
    except ValueError as error:
        raise StageError(f"train.denoiser.channels: {error}") from None
    pipeline.release()
    images = load(config.dataset, scratch=output / SCRATCH)
    latents = yield from encoded(pipeline, images, "train.dataset")
    prompts = pipeline.prompts_of(LabelledLatents(latents.numpy(), images.captions, images.labels, images.origins))
    order = ShuffledOrder(len(images), config.denoiser.training.batch_size, seed)

    def condition(texts: Sequence[str]) -> Condition:
        """Encode prompts. The empty text is a dropped prompt, unless all prompts are empty."""
        some = any(prompts)
        return Condition.cat(
            [pipeline.encode_prompts([text]) if text or not some else pipeline.encode_dropped() for text in texts]
        )

    trained = yield from train(
        DenoiserTraining(
            network,
            condition,
            partial(pipeline.predict, network),
            pipeline.schedule,
            pipeline.prediction,
            config.drop_text,
            config.denoiser.training,
        ),
        lambda step: _captioned(latents, prompts, order, step),
        seed=seed,
        checkpoints=output / SCRATCH / "denoiser",
        execution=execution,
        unit="network steps",
    )
    average: Any = trained.averages["denoiser"].cpu()
    average.save_pretrained(output / SCRATCH / "network", max_shard_size=ONE_FILE)
    return {
        "device": trained.device,
        "denoiser_loss": trained.history[-1]["loss"],
        "parameters_millions": {pipeline.NETWORK: build.parameters_millions(network)},
    }


def _captioned(latents: Tensor, captions: Sequence[str], order: ShuffledOrder, step: int) -> Batch:
    index = order.batch(step)
    return {"latents": latents[index], "captions": [captions[i] for i in index]}


def _seal(vae: nn.Module, tokenizer: Any, networks: nn.ModuleDict, config: TrainedTeacher, output: Path) -> None:
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=copy.deepcopy(networks["text_encoder"]),
        tokenizer=tokenizer,
        unet=copy.deepcopy(networks["unet"]),
        scheduler=build.ddim_scheduler(config.prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output, safe_serialization=True)
