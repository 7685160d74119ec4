"""`kind: teacher`: the many-step model to distil, saved as a plain diffusers folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import SCRATCH, Content, Stage, StageContext, StageError
from stages.diffusion.prediction import Prediction
from stages.teacher import layout
from stages.teacher.config import TIMESTEPS, GaussianSettings, TrainedTeacher
from stages.training import TrainingExecution
from stages.training.players import training_progress

SHIPPED = Path(__file__).parent / "shipped"
FROM = Content("revision", layout.FILES, shipped={"digit_scenes": SHIPPED / "digit_scenes"})


class Teacher(Stage):
    """The many-step model to distil. Exactly one of `train`, `from` and `gaussian` says where it comes from.

    `from` is a diffusers folder, a hub id, or the name of a teacher that ships with Retort: digit_scenes. A folder of
    that name is ./digit_scenes.
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
        if self.revision and not self.from_:
            raise ValueError("revision belongs to a teacher with `from`")
        return self

    def why_unguided(self, as_input: bool, sealed: Path) -> str | None:
        """Why it has no output without a prompt, which guidance needs, or no student that takes guidance as an input,
        as far as can be known; None if there is one, or if nobody knows. `sealed`: its folder, once it is made."""
        if self.train and self.train.drop_text == 0:
            return "the teacher was trained with drop_text: 0, never without a prompt"
        folder = self.known(sealed)
        return layout.why_unguided(folder, as_input) if folder else None

    def timesteps(self, sealed: Path) -> int | None:
        """How many its schedule has; None if nobody knows."""
        if self.train:
            return TIMESTEPS
        folder = self.known(sealed)
        return layout.timesteps(folder) if folder else None

    def prediction(self, sealed: Path) -> Prediction | None:
        """What its network predicts; None if nobody knows."""
        if self.train:
            return self.train.prediction
        folder = self.known(sealed)
        return layout.prediction(folder) if folder else None

    def image_size(self, sealed: Path) -> tuple[int, int] | None:
        """How many pixels high and wide what it makes is; None if nobody knows."""
        if self.train:
            return self.train.dataset.size, self.train.dataset.size
        folder = self.known(sealed)
        return layout.image_size(folder) if folder else None

    def known(self, sealed: Path) -> Path | None:
        """A diffusers folder of it that can be read already; None if there is none. `sealed`: its own."""
        folders = [sealed, *([Path(FROM.source(self.from_))] if self.from_ else [])]
        return next((folder for folder in folders if (folder / "model_index.json").is_file()), None)

    def progress_in(self, work: Path, pool: Path) -> str | None:
        return training_progress(work / SCRATCH)

    def run(self, context: StageContext) -> Mapping[str, Any]:
        if self.gaussian:
            text = json.dumps(self.gaussian.model_dump(), indent=2) + "\n"
            (context.output / "gaussian.json").write_text(text, encoding="utf-8")
            return {}
        if self.from_:
            return _adopt(self.from_, context.contents["from_"], context.output)
        return context.run(_train, self.train, context.seed, self.execution, context.output, context.threads)


def _train(*arguments: Any) -> Any:
    from stages.teacher.train import train_teacher

    return train_teacher(*arguments)


def _adopt(source: str, identity: str, output: Path) -> Mapping[str, Any]:
    commit = identity.removeprefix("hub:") if identity.startswith("hub:") else None
    folder = _download(source, commit) if commit else Path(FROM.source(source))
    found = layout.check(folder)
    for pattern in found.files:
        for file in folder.glob(pattern):
            copy = output / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in index.items() if name not in layout.IGNORED}
    if found is layout.STABLE_DIFFUSION:
        kept |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (output / "model_index.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return {"source": source, "revision": commit, "licence": _licence(folder)}


def _download(source: str, commit: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        index = Path(snapshot_download(source, revision=commit, allow_patterns=["model_index.json"]))
        files = layout.check_index(index).files
        return Path(snapshot_download(source, revision=commit, allow_patterns=[*files, "README.md"]))
    except StageError:
        raise
    except Exception as error:  # the hub's client raises many kinds, all meaning: not reached or not there
        first = (str(error).strip() or "no reason given").splitlines()[0]
        raise StageError(
            f"{source} cannot be downloaded ({type(error).__name__}: {first}); "
            "download it where there is a network and name the folder"
        ) from error


def _licence(folder: Path) -> str | None:
    """The licence that a model card's header names."""
    card = folder / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.M) if card.exists() else None
    return found[1] if found else None
