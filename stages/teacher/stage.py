"""`kind: teacher`: the many-step diffusion model to distil, saved as a standard diffusers folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from stages.base import SCRATCH, Artifact, Input, Neutral, Stage, StageContext, StageError
from stages.data.hub import commit_of, snapshot
from stages.diffusion.prediction import Prediction
from stages.networks.adapter import IGNORED, INDEX, Adapter
from stages.networks.adapters import adapter_of, checked, checked_index
from stages.networks.coop import GUEST, HOST, Bridge, Coop
from stages.networks.decoupled import FILE as TIME_DECOUPLED
from stages.networks.decoupled import STRUCTURE, TEXTURE
from stages.networks.stable_diffusion_xl import MICRO_CONDITIONING, MicroConditioning
from stages.registry import PluginError
from stages.teacher.config import (
    EPSILON,
    FROM,
    TIMESTEPS,
    BridgeTeacher,
    CoopTeacher,
    ExactSettings,
    GaussianSettings,
    TeacherLora,
    TrainedTeacher,
)
from stages.training import TrainingExecution
from stages.training.players import training_progress

Answer = TypeVar("Answer")

HAND_OVER = """# A time-decoupled teacher

`structure/` and `texture/` are diffusers pipelines. One sample needs both of them: call the network of `structure/` at
timesteps t >= {switch}, and that of `texture/` at t < {switch}, each with the text encoder of its own folder. The VAE
and the scheduler are the same in both. `retort sample` draws with it.
"""
NOT_CONDITIONED = "only Stable Diffusion XL is conditioned on sizes; leave it out"


class Teacher(Stage):
    """The many-step diffusion model to distil. Give exactly one of `train`, `from`, `exact`, `coop`, `bridge` and
    `gaussian`, or both `structure` and `texture`.

    `from` is a diffusers folder, a hub id, or one of the teachers that ship with Retort: digits, digit_scenes. For a
    folder that is called digits, write ./digits.
    """

    VERSION: ClassVar[int] = 2
    kind: Literal["teacher"]
    train: TrainedTeacher | None = Field(None, description="trains a small teacher on an image set")
    from_: Annotated[str | None, FROM] = Field(
        None,
        alias="from",
        description="a diffusers folder, a hub id such as owner/name, or a teacher that ships with Retort: digits or "
        "digit_scenes",
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of a hub id; with a full commit, planning needs no network"
    )
    micro_conditioning: Annotated[MicroConditioning | None, Neutral()] = Field(
        None,
        description="sizes in pixels on which a Stable Diffusion XL teacher is conditioned; default: those of an image "
        "that was neither resized nor cropped",
    )
    lora: Annotated[TeacherLora | None, Neutral()] = Field(
        None, description="a LoRA of the pipeline in `from`; it is fused into the weights"
    )
    exact: Annotated[ExactSettings | None, Neutral()] = Field(
        None, description="the optimal denoiser of a set of images, without training"
    )
    structure: Annotated[str | None, Input("teacher"), Neutral()] = Field(
        None,
        description="teacher whose network is called at timesteps from `switch` on; structure and texture together are "
        "one time-decoupled teacher (PanGu-Draw, 2312.16486)",
    )
    texture: Annotated[str | None, Input("teacher"), Neutral()] = Field(
        None, description="teacher whose network is called at timesteps below `switch`"
    )
    switch: Annotated[int, Neutral()] = Field(
        500, ge=1, lt=TIMESTEPS, description="the least timestep at which the structure network is called"
    )
    coop: Annotated[CoopTeacher | None, Neutral()] = Field(
        None, description="two teachers that cooperate in one sampling process, as one teacher"
    )
    bridge: Annotated[BridgeTeacher | None, Neutral()] = Field(
        None, description="two teachers of images of different sizes along one trajectory, as one teacher"
    )
    gaussian: GaussianSettings | None = Field(
        None, description="an analytic teacher of normally distributed data, without a network, for tests"
    )
    execution: TrainingExecution = Field(
        TrainingExecution(), description="how the stage is run; changing it makes nothing stale"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = ("train", "from_", "exact", "structure", "coop", "bridge", "gaussian")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) != 1:
            names = "train, from, exact, structure, coop, bridge and gaussian"
            raise ValueError(f"give exactly one of {names}, not {len(given)} of them")
        if (self.structure is None) != (self.texture is None):
            raise ValueError("structure and texture need one another")
        if self.switch != type(self).model_fields["switch"].default and not self.structure:
            raise ValueError("switch needs structure and texture")
        for name in ("revision", "lora", "micro_conditioning"):
            if getattr(self, name) and not self.from_:
                raise ValueError(f"{name} needs `from`")
        return self

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        source = Path(FROM.source(self.from_)) if self.from_ else None
        conditioned = ask(source, lambda adapter, _folder: adapter.MICRO_CONDITIONING)
        if self.micro_conditioning and conditioned is False:
            yield "micro_conditioning", NOT_CONDITIONED
        for field in ("train.like", "train.vae.teacher", "train.start"):
            named = inputs.get(field)
            if named and isinstance(named.stage, Teacher) and (named.stage.gaussian or named.stage.of_several):
                yield field, "it is not a single pipeline; give a teacher of `train`, `from` or `exact`"
        if self.exact and self.exact.zero_terminal_snr:
            pipeline = Path(FROM.source(self.exact.pipeline))
            if ask(pipeline, lambda adapter, folder: adapter.prediction_of(folder)) == "epsilon":
                yield "exact.zero_terminal_snr", EPSILON
        if self.cooperating:
            yield from self._check_cooperating(inputs)
        if self.structure:
            yield from self._check_halves(inputs["structure"], inputs["texture"])
        if "train.start" in inputs:
            yield from self._check_start(inputs["train.start"], inputs.get("train.vae.teacher"))
        if self.lora:
            try:
                self.lora.found_in(Path(self.lora.weights))
            except StageError as error:
                yield "lora.weights", str(error)

    def _check_cooperating(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        """Yield a problem for each way in which host and guest do not fit."""
        switch = self.bridge.switch if self.bridge else None
        what = "timesteps" if self.bridge else "image_size"  # they must share it
        known = []
        for name, called in ((HOST, (0, switch or TIMESTEPS)), (GUEST, (switch or 0, TIMESTEPS))):
            field = f"{self._cooperation}.{name}"
            artifact = inputs[field].inputs.get(STRUCTURE, inputs[field])
            teacher = artifact.stage
            assert isinstance(teacher, Teacher)
            if teacher.gaussian or teacher.cooperating:
                yield field, "give a teacher of `train`, `from` or `exact`, or one of structure and texture"
            times = teacher.train.times if teacher.train and not inputs[field].inputs.get(STRUCTURE) else None
            if times and not (times[0] <= called[0] and called[1] <= times[1]):
                yield field, _untrained(times, called)
            known.append(getattr(teacher, what)(artifact.folder))
        if None not in known and known[0] != known[1]:
            yield (
                f"{self._cooperation}.guest",
                f"its {what.replace('_', ' ')} is {known[1]}, that of the host {known[0]}",
            )

    def _check_start(self, start: Artifact, vae: Artifact | None) -> Iterator[tuple[str, str]]:
        """Yield a problem for each way in which training cannot go on from the teacher `start`."""
        assert self.train and isinstance(start.stage, Teacher)
        if vae is None:
            yield "train.start", "its U-Net was trained on the latents of its own VAE: add `vae:` with the same teacher"
        elif None not in (vaes := {_vae_of(start), _vae_of(vae)}) and len(vaes) > 1:
            yield "train.vae", "it is not the VAE of train.start, on whose latents the U-Net was trained"
        of_start = start.stage.train
        if of_start and not of_start.like and of_start.denoiser.channels != self.train.denoiser.channels:
            yield "train.start", f"its U-Net has denoiser.channels: {of_start.denoiser.channels}; set these"

    def _check_halves(self, structure: Artifact, texture: Artifact) -> Iterator[tuple[str, str]]:
        """Yield a problem for each way in which the two teachers do not fit together."""
        halves = {"structure": (structure, (self.switch, TIMESTEPS)), "texture": (texture, (0, self.switch))}
        for name, (artifact, called) in halves.items():
            teacher = artifact.stage
            assert isinstance(teacher, Teacher)
            if teacher.gaussian or teacher.exact or teacher.of_several:
                yield name, "it has no network of its own; give one of `train` or `from`"
            times = teacher.train.times if teacher.train else None
            if times and times != called:
                yield name, _untrained(times, called)
        vaes = {_vae_of(artifact) for artifact in (structure, texture)}
        if None not in vaes and len(vaes) > 1:
            yield "texture", "its VAE is not that of structure: train both halves with one `train.vae: TEACHER`"
        for what, asked in (("image size", "image_size"), ("number of timesteps", "timesteps")):
            known = [getattr(one.stage, asked)(one.folder) for one in (structure, texture)]
            if None not in known and known[0] != known[1]:
                yield "texture", f"its {what} is {known[1]}, that of structure {known[0]}"

    def guidance_error(self, as_input: bool, sealed: Path) -> str | None:
        """Return why the teacher does not support guidance, as text. None if it does, or if that is not known yet.

        Guidance needs outputs without a prompt. With `as_input`, the student must also be able to take the guidance
        scale as an input. sealed: the teacher's folder, which may not exist yet.
        """
        if self.train and self.train.drop_text == 0:
            return "the teacher was trained with drop_text: 0, so never without a prompt"
        if self.exact and self.exact.captions == "none":
            return "the exact teacher has captions: none"
        return self._ask(sealed, lambda adapter, folder: adapter.guidance_error(folder, as_input))

    def timesteps(self, sealed: Path) -> int | None:
        """Return the number of timesteps of the teacher's schedule; None if it is not known yet."""
        return TIMESTEPS if self._whole else self._ask(sealed, lambda adapter, folder: adapter.timesteps_of(folder))

    def prediction(self, sealed: Path) -> Prediction | None:
        """Return what the teacher's network predicts; None if that is not known yet."""
        if self._whole:
            return self._whole.prediction
        return self._ask(sealed, lambda adapter, folder: adapter.prediction_of(folder))

    def image_size(self, sealed: Path) -> tuple[int, int] | None:
        """Return height and width of the teacher's images in pixels; None if they are not known yet."""
        if self.train:
            return self.train.dataset.size, self.train.dataset.size
        return self._ask(sealed, lambda adapter, folder: adapter.image_size_of(folder))

    def has_features(self, sealed: Path) -> bool | None:
        """Whether a discriminator can use features of the teacher's network; None if that is not known yet."""
        return True if self._whole else self._ask(sealed, lambda adapter, _folder: adapter.FEATURES)

    @property
    def _whole(self) -> TrainedTeacher | None:
        """The settings of `train`, if a whole pipeline is trained."""
        return self.train if self.train and not self.train.like else None

    def _ask(self, sealed: Path, question: Callable[[type[Adapter], Path], Answer | None]) -> Answer | None:
        """Ask the teacher's adapter a question about its folder. None if there is no readable folder yet."""
        return ask(self.known(sealed), question)

    def known(self, sealed: Path) -> Path | None:
        """Return an existing folder of the teacher: `sealed`, or the folder in `from`. None if there is none."""
        source = self.exact.pipeline if self.exact else self.from_
        inside = [sealed, sealed / STRUCTURE, sealed / HOST, sealed / HOST / STRUCTURE]
        folders = [*inside, *([Path(FROM.source(source))] if source else [])]
        return next((folder for folder in folders if (folder / INDEX).is_file()), None)

    @property
    def of_several(self) -> bool:
        """Whether the teacher consists of several pipelines."""
        return self.structure is not None or self.cooperating

    @property
    def cooperating(self) -> bool:
        """Whether the teacher is a host and a guest. Such a teacher only samples whole trajectories."""
        return self._cooperation is not None

    @property
    def _cooperation(self) -> str | None:
        """The name of the field that gives host and guest."""
        return next((name for name in ("coop", "bridge") if getattr(self, name)), None)

    def progress_in(self, work: Path, pool: Path) -> str | None:
        return training_progress(work / SCRATCH)

    def run(self, context: StageContext) -> Mapping[str, Any]:
        if self.gaussian:
            text = json.dumps(self.gaussian.model_dump(), indent=2) + "\n"
            (context.output / "gaussian.json").write_text(text, encoding="utf-8")
            return {}
        if self.exact:
            about = adopt(self.exact.pipeline, context.contents["exact.pipeline"], context.output)
            return {**about, **context.run(_exact, self.exact, self.execution, context.output, context.threads)}
        if self.structure:
            return _joined(context, self.switch)
        if self.coop:
            return _fused(context, Coop.FILE, "coop", self.coop)
        if self.bridge:
            return _fused(context, Bridge.FILE, "bridge", self.bridge)
        if self.from_:
            about = adopt(self.from_, context.contents["from_"], context.output)
            if self.micro_conditioning:
                if not adapter_of(context.output).MICRO_CONDITIONING:
                    raise StageError(f"micro_conditioning: {NOT_CONDITIONED}")
                text = self.micro_conditioning.model_dump_json(exclude_defaults=True)
                (context.output / MICRO_CONDITIONING).write_text(text + "\n", encoding="utf-8")
            return {**about, "lora": _fuse(self.lora, context)} if self.lora else about
        how = self.train, context.seed, self.execution, context.output, context.threads
        like = context.inputs.get("train.like")
        if like:
            return _like(like, context, *how)
        vae, start = (context.inputs.get(f"train.{field}") for field in ("vae.teacher", "start"))
        figures = context.run(_train, *how, vae and vae.folder, start and start.folder)
        taken = {name: teacher for name, teacher in (("vae", vae), ("start", start)) if teacher}
        sources = {name: teacher.fingerprint for name, teacher in taken.items()}
        return {**sources, **({"licence": _common_licence(taken.values())} if taken else {}), **figures}


def ask(folder: Path | None, question: Callable[[type[Adapter], Path], Answer | None]) -> Answer | None:
    """Ask the adapter of the pipeline in `folder` a question. The answer is None if there is no readable pipeline."""
    try:
        return question(adapter_of(folder), folder) if folder else None
    except (StageError, PluginError, KeyError):  # reported when the stage runs
        return None


def _untrained(times: tuple[int, int], called: tuple[int, int]) -> str:
    return f"it was trained with times: {list(times)}, but is called at times: {list(called)}"


def _vae_of(teacher: Artifact) -> str | None:
    """Return the fingerprint of the teacher that the VAE of `teacher` comes from, often `teacher` itself.

    None for a pipeline of `from`, because several of these may have the same VAE."""
    while shared := teacher.inputs.get("train.vae.teacher") or teacher.inputs.get("train.like"):
        teacher = shared
    own = isinstance(teacher.stage, Teacher) and not teacher.stage.from_
    return teacher.fingerprint if own else None


def _copy_pipeline(teacher: Artifact, output: Path) -> None:
    """Copy the pipeline of a sealed teacher to `output`, with the sizes that it is conditioned on."""
    adopt(str(teacher.folder), "", output)
    if (teacher.folder / MICRO_CONDITIONING).is_file():
        shutil.copyfile(teacher.folder / MICRO_CONDITIONING, output / MICRO_CONDITIONING)


def _joined(context: StageContext, switch: int) -> Mapping[str, Any]:
    """Copy both halves to the stage's folder, and write the timestep at which they switch. Return figures."""
    halves = {half: context.inputs[half] for half in (STRUCTURE, TEXTURE)}
    for half, teacher in halves.items():
        (context.output / half).mkdir(exist_ok=True)
        _copy_pipeline(teacher, context.output / half)
    text = json.dumps({"switch": switch}) + "\n"
    (context.output / TIME_DECOUPLED).write_text(text, encoding="utf-8")
    (context.output / "README.md").write_text(HAND_OVER.format(switch=switch), encoding="utf-8")
    found = {half: teacher.fingerprint for half, teacher in halves.items()}
    return {**found, "switch": switch, "licence": _common_licence(halves.values())}


def _fused(context: StageContext, file: str, field: str, settings: CoopTeacher | BridgeTeacher) -> Mapping[str, Any]:
    """Copy host and guest to the stage's folder, with the settings in `file`. Return figures."""
    teachers = {name: context.inputs[f"{field}.{name}"] for name in (HOST, GUEST)}
    for name, teacher in teachers.items():
        ignored = shutil.ignore_patterns("artifact.json")
        shutil.copytree(teacher.folder, context.output / name, ignore=ignored, dirs_exist_ok=True)
    text = json.dumps(settings.model_dump(exclude=set(teachers)), indent=2) + "\n"
    (context.output / file).write_text(text, encoding="utf-8")
    found = {name: teacher.fingerprint for name, teacher in teachers.items()}
    return {**found, "licence": _common_licence(teachers.values())}


def licence_of(teacher: Artifact) -> str:
    """Return the identifier of the licence of a teacher and of what is made from it."""
    about = teacher.record.get("metrics", {})
    return about.get("licence") or ("unknown" if about.get("source") else "apache-2.0")


def _common_licence(teachers: Iterable[Artifact]) -> str:
    """Return the licence that all teachers have, or "unknown" if they differ."""
    licences = {licence_of(teacher) for teacher in teachers}
    return licences.pop() if len(licences) == 1 else "unknown"


def _train(*arguments: Any) -> Any:
    from stages.teacher.train import train_teacher

    return train_teacher(*arguments)


def _like(like: Artifact, context: StageContext, *how: Any) -> Mapping[str, Any]:
    """Copy the pipeline of the teacher `like`, and put a newly trained network in place of its own. Return figures.

    A worker writes the network to a separate folder. So a second worker, which takes over from a lost one, finds the
    pipeline unchanged."""
    _copy_pipeline(like, context.output)
    figures = context.run(_train_like, *how)
    own = context.output / adapter_of(context.output).NETWORK
    shutil.rmtree(own)
    os.replace(context.output / SCRATCH / "network", own)
    return {"like": like.fingerprint, "licence": licence_of(like), **figures}


def _train_like(*arguments: Any) -> Any:
    from stages.teacher.train import train_network

    return train_network(*arguments)


def _exact(*arguments: Any) -> Any:
    from stages.teacher.exact import write_exact

    return write_exact(*arguments)


def _fuse(lora: TeacherLora, context: StageContext) -> Mapping[str, Any]:
    """Fuse `lora` into the pipeline in the stage's folder. Return the LoRA's source, commit, scale and licence.

    A worker writes the changed weights to a folder of their own. They replace the pipeline's when they are complete, so
    that a second worker, which takes over from a lost one, does not fuse the LoRA twice. Raises StageError."""
    commit = commit_of(context.contents["lora.weights"])
    source = Path(lora.weights)
    if commit:
        source = snapshot(lora.weights, commit, [lora.file or "*.safetensors", "README.md"], ["*/*"])
    file = lora.found_in(source)
    scratch = context.output / SCRATCH
    scratch.mkdir(exist_ok=True)
    copy = Path(shutil.copyfile(file, scratch / file.name))  # the worker may be on another machine
    context.run(_fuse_on_worker, context.output, copy, lora.scale, scratch / "fused", context.threads)
    for weights in (scratch / "fused").glob("*/*.safetensors"):
        os.replace(weights, context.output / weights.relative_to(scratch / "fused"))
    name = lora.weights if file == source else f"{lora.weights}/{file.relative_to(source)}"
    return {"source": name, "revision": commit, "scale": lora.scale, "licence": _licence(source)}


def _fuse_on_worker(*arguments: Any) -> Any:
    from stages.teacher.lora import fuse

    return fuse(*arguments)


def adopt(source: str, identity: str, output: Path) -> Mapping[str, Any]:
    """Copy the pipeline `source` to `output`. Download a hub repository at the commit in `identity`.

    Returns the source, its commit and its licence. Raises StageError if the pipeline is unsupported or cannot be
    downloaded."""
    commit = commit_of(identity)
    folder = _download(source, commit) if commit else Path(FROM.source(source))
    found = checked(folder)
    for pattern in found.FILES:
        for file in folder.glob(pattern):
            copy = output / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    kept = {name: value for name, value in index.items() if name not in IGNORED} | dict(found.DROPPED)
    (output / INDEX).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return {"source": source, "revision": commit, "licence": _licence(folder)}


def _download(source: str, commit: str) -> Path:
    files = checked_index(snapshot(source, commit, [INDEX])).FILES
    return snapshot(source, commit, [*files, "README.md"])


def _licence(folder: Path) -> str | None:
    """Return the licence in the header of a model card, or None."""
    card = folder / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.M) if card.exists() else None
    return found[1] if found else None
