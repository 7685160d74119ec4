"""`kind: teacher`: the many-step diffusion model to distil, saved as a standard diffusers folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from stages.base import SCRATCH, Artifact, Content, Neutral, Stage, StageContext, StageError
from stages.diffusion.prediction import Prediction
from stages.networks.adapter import IGNORED, INDEX, Adapter
from stages.networks.adapters import adapter_of, checked, checked_index, files_of
from stages.networks.stable_diffusion_xl import MICRO_CONDITIONING, MicroConditioning
from stages.registry import PluginError
from stages.teacher.config import TIMESTEPS, GaussianSettings, TrainedTeacher
from stages.training import TrainingExecution
from stages.training.players import training_progress

Answer = TypeVar("Answer")

NOT_CONDITIONED = "only Stable Diffusion XL is conditioned on sizes; leave it out"
SHIPPED = Path(__file__).parent / "shipped"
FROM = Content("revision", files_of, shipped={"digit_scenes": SHIPPED / "digit_scenes"})


class Teacher(Stage):
    """The many-step diffusion model to distil. Give exactly one of `train`, `from` and `gaussian`.

    `from` is a diffusers folder, a hub id, or digit_scenes, a teacher that is installed with Retort. For a folder with
    that name, write ./digit_scenes.
    """

    VERSION: ClassVar[int] = 2
    kind: Literal["teacher"]
    train: TrainedTeacher | None = Field(None, description="trains a small teacher on an image set")
    from_: Annotated[str | None, FROM] = Field(
        None,
        alias="from",
        description="a diffusers folder, a hub id such as owner/name, or the shipped teacher digit_scenes",
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of a hub id; with a full commit, planning needs no network"
    )
    micro_conditioning: Annotated[MicroConditioning | None, Neutral()] = Field(
        None,
        description="sizes on which a Stable Diffusion XL teacher is conditioned, in pixels; default: its images are "
        "neither resized nor cropped",
    )
    gaussian: GaussianSettings | None = Field(
        None, description="an exact teacher of normal data without a network, for tests"
    )
    execution: TrainingExecution = Field(
        TrainingExecution(), description="how the stage is run; changing it makes nothing stale"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("train", "from_", "gaussian") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of train, from and gaussian, not {len(given)} of them")
        for name in ("revision", "micro_conditioning"):
            if getattr(self, name) and not self.from_:
                raise ValueError(f"{name} needs `from`")
        return self

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        source = Path(FROM.source(self.from_)) if self.from_ else None
        conditioned = ask(source, lambda adapter, _folder: adapter.MICRO_CONDITIONING)
        if self.micro_conditioning and conditioned is False:
            yield "micro_conditioning", NOT_CONDITIONED

    def guidance_error(self, as_input: bool, sealed: Path) -> str | None:
        """Return why the teacher does not support guidance, as text. None if it does, or if that is not known yet.

        Guidance needs outputs without a prompt. With `as_input`, the student must also be able to take the guidance
        scale as an input. sealed: the teacher's folder, which may not exist yet.
        """
        if self.train and self.train.drop_text == 0:
            return "the teacher was trained with drop_text: 0, so never without a prompt"
        return self._ask(sealed, lambda adapter, folder: adapter.guidance_error(folder, as_input))

    def timesteps(self, sealed: Path) -> int | None:
        """Return the number of timesteps of the teacher's schedule; None if it is not known yet."""
        return TIMESTEPS if self.train else self._ask(sealed, lambda adapter, folder: adapter.timesteps_of(folder))

    def prediction(self, sealed: Path) -> Prediction | None:
        """Return what the teacher's network predicts; None if that is not known yet."""
        if self.train:
            return self.train.prediction
        return self._ask(sealed, lambda adapter, folder: adapter.prediction_of(folder))

    def image_size(self, sealed: Path) -> tuple[int, int] | None:
        """Return height and width of the teacher's images in pixels; None if they are not known yet."""
        if self.train:
            return self.train.dataset.size, self.train.dataset.size
        return self._ask(sealed, lambda adapter, folder: adapter.image_size_of(folder))

    def has_features(self, sealed: Path) -> bool | None:
        """Whether a discriminator can use features of the teacher's network; None if that is not known yet."""
        return True if self.train else self._ask(sealed, lambda adapter, _folder: adapter.FEATURES)

    def _ask(self, sealed: Path, question: Callable[[type[Adapter], Path], Answer | None]) -> Answer | None:
        """Ask the teacher's adapter a question about its folder. None if there is no readable folder yet."""
        return ask(self.known(sealed), question)

    def known(self, sealed: Path) -> Path | None:
        """Return an existing folder of the teacher: `sealed`, or the folder in `from`. None if there is none."""
        folders = [sealed, *([Path(FROM.source(self.from_))] if self.from_ else [])]
        return next((folder for folder in folders if (folder / INDEX).is_file()), None)

    def progress_in(self, work: Path, pool: Path) -> str | None:
        return training_progress(work / SCRATCH)

    def run(self, context: StageContext) -> Mapping[str, Any]:
        if self.gaussian:
            text = json.dumps(self.gaussian.model_dump(), indent=2) + "\n"
            (context.output / "gaussian.json").write_text(text, encoding="utf-8")
            return {}
        if self.from_:
            metrics = adopt(self.from_, context.contents["from_"], context.output)
            if self.micro_conditioning:
                if not adapter_of(context.output).MICRO_CONDITIONING:
                    raise StageError(f"micro_conditioning: {NOT_CONDITIONED}")
                text = self.micro_conditioning.model_dump_json(exclude_defaults=True)
                (context.output / MICRO_CONDITIONING).write_text(text + "\n", encoding="utf-8")
            return metrics
        return context.run(_train, self.train, context.seed, self.execution, context.output, context.threads)


def ask(folder: Path | None, question: Callable[[type[Adapter], Path], Answer | None]) -> Answer | None:
    """Ask the adapter of the pipeline in `folder` a question. The answer is None if there is no readable pipeline."""
    try:
        return question(adapter_of(folder), folder) if folder else None
    except (StageError, PluginError, KeyError):  # reported when the stage runs
        return None


def _train(*arguments: Any) -> Any:
    from stages.teacher.train import train_teacher

    return train_teacher(*arguments)


def adopt(source: str, identity: str, output: Path) -> Mapping[str, Any]:
    """Copy the pipeline `source` to `output`. Download a hub repository at the commit in `identity`.

    Returns the source, its commit and its licence. Raises StageError if the pipeline is unsupported or cannot be
    downloaded."""
    commit = identity.removeprefix("hub:") if identity.startswith("hub:") else None
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
    from huggingface_hub import snapshot_download

    try:
        index = Path(snapshot_download(source, revision=commit, allow_patterns=[INDEX]))
        files = checked_index(index).FILES
        return Path(snapshot_download(source, revision=commit, allow_patterns=[*files, "README.md"]))
    except StageError:
        raise
    except Exception as error:  # the hub's client raises many kinds; all mean: not reached, or not found
        first = (str(error).strip() or "no reason given").splitlines()[0]
        raise StageError(
            f"{source} cannot be downloaded ({type(error).__name__}: {first}); "
            "download it on a machine with a network, and give its folder"
        ) from error


def _licence(folder: Path) -> str | None:
    """Return the licence in the header of a model card, or None."""
    card = folder / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.M) if card.exists() else None
    return found[1] if found else None
