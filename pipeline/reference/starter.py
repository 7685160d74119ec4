"""The manifests that `retort init` writes: templates/*.yaml, filled in for a teacher and a method."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import Template

from pydantic import ValidationError

from pipeline.errors import UsageError, suggest
from pipeline.manifest.settings import Setting, settings_of
from stages.base import StageError
from stages.data.files import files_of
from stages.data.prompts.config import PATTERNS, Prompts
from stages.methods import METHODS
from stages.registry import PluginError
from stages.teacher import layout

TEMPLATES = Path(__file__).parent / "templates"
EMBEDDED = ("digits", "digit_scenes")
"""Teachers that need no download: templates of the same name."""
HUB_ID = r"[\w.-]+/[\w.-]+"
PLACEHOLDER = "prompts.txt"
LONGEST = 60
"""Characters of a comment that says what a setting may be; longer ones stay out."""


def manifest_text(teacher: str, method: str, prompts: str | None, file: str) -> str:
    """A commented manifest for `teacher`: digits, digit_scenes, a diffusers folder or a hub id.

    `file` is what it will be called. Raises UsageError for what cannot be a teacher, a method or prompts.
    """
    values = {"file": file, "teacher": teacher, "name": _run_name(teacher), **_method(method)}
    if teacher in EMBEDDED:
        if prompts is not None:
            raise UsageError(f"--prompts: the {teacher} teacher knows its own image set's captions only")
        return _filled(teacher, values)
    folder = Path(teacher).expanduser()
    if folder.is_dir():
        return _for_folder(folder.absolute(), prompts, values)
    if not re.fullmatch(HUB_ID, teacher):
        raise UsageError(
            f"--teacher {teacher}: give {', '.join(EMBEDDED)}, a diffusers folder, or a hub id such as owner/name"
        )
    revision = "    # revision: a full commit, and planning needs no network\n"
    return _filled("latent", {**values, "source": teacher, "revision": revision, "prompts": _prompts(prompts)})


def _for_folder(folder: Path, prompts: str | None, values: dict[str, str]) -> str:
    try:
        found = layout.check(folder)
        classes = layout.classes(folder) if found is layout.PIXELS else None
    except StageError as error:
        raise UsageError(str(error)) from None
    values = {**values, "source": _scalar(str(folder))}
    if found is layout.STABLE_DIFFUSION:
        return _filled("latent", {**values, "revision": "", "prompts": _prompts(prompts)})
    if classes is None:
        if prompts is not None:
            raise UsageError(f"--prompts: {folder} is unconditional and takes none")
        none = "    # no prompts: this teacher is unconditional"
        return _filled(
            "pixel", {**values, "prompts": none, "guidance": "1.0, for an unconditional teacher cannot be guided"}
        )
    guidance = "1.0 is none; more is possible if a class of the teacher stands for none"
    return _filled("pixel", {**values, "prompts": _prompts(prompts, "a class a line"), "guidance": guidance})


def _filled(template: str, values: dict[str, str]) -> str:
    return Template((TEMPLATES / f"{template}.yaml").read_text(encoding="utf-8")).substitute(values)


def _prompts(given: str | None, content: str = "a prompt a line") -> str:
    """The line of the manifest; where none are given, one that makes the plan say which file is missing."""
    if given is None:
        return f"    prompts: {PLACEHOLDER} # give a file of yours: {content}; or .csv, .jsonl, .parquet with a column"
    try:
        Prompts.model_validate(given)
        files_of(str(Path(given).expanduser()), PATTERNS)
    except ValidationError as error:
        raise UsageError(f"--prompts {given}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    except FileNotFoundError as error:
        raise UsageError(f"--prompts: {error}") from None
    path = _scalar(str(Path(given).expanduser().absolute()))
    if Path(given).suffix.lower() == ".txt":
        return f"    prompts: {path}"
    return f"    prompts: {{path: {path}, column: prompt}} # the column that holds the texts"


def _method(name: str) -> dict[str, str]:
    """The lines of the method, with all of its settings at their defaults, and words for how often it is called."""
    try:
        config = METHODS.get(name)
    except PluginError as error:
        raise UsageError(str(error)) from error
    if config is None:
        raise UsageError(f"--method {name}: there is no such method{suggest(name, METHODS)}")
    own = [_setting(setting) for setting in settings_of(config)]
    text = "\n".join(["    method:", f"      name: {name} # retort explain {name}", *own])
    few = "latents" in config.DATA
    return {
        "method": text,
        "calls": "a few network calls" if few else "one network call",
        "steps": "few steps" if few else "one step",
        "kind": "few-step" if few else "one-step",
    }


def _setting(setting: Setting) -> str:
    comment = f" # {setting.allowed if len(setting.allowed) <= LONGEST else f'retort explain {setting.name}'}"
    if setting.required:
        return f"      # {setting.name}: required, and without a default{comment}"
    if setting.config or setting.default is None:
        return f"      # {setting.name}:{comment}"
    value = setting.default
    return f"      {setting.name}: {_scalar(value) if isinstance(value, str) else json.dumps(value)}{comment}"


def _scalar(text: str) -> str:
    """A text as YAML: quoted unless it is a plain word or path."""
    plain = re.fullmatch(r"[A-Za-z/][\w./-]*", text) and text.lower() not in ("null", "true", "false")
    return text if plain else json.dumps(text, ensure_ascii=False)


WORDS = ("null", "true", "false")
"""What YAML takes for something else than a word; numbers are others."""


def _run_name(teacher: str) -> str:
    """A name for the run: of a path its last part."""
    last = Path(teacher).expanduser().absolute().name
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", last).strip("_-")[:80] or "retort"
    return name if re.fullmatch(r"[A-Za-z]*[A-Za-z_-]{2}[\w-]*", name) and name.lower() not in WORDS else f"run_{name}"
