"""Makes the manifests of `retort init`: fills in templates/*.yaml for a teacher and a method."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import Template

from pydantic import ValidationError

from pipeline.errors import UsageError, suggest
from pipeline.reference.schema import LINE
from pipeline.reference.settings import Setting, settings_of
from stages.base import StageError
from stages.data.files import files_of
from stages.data.prompts.config import PATTERNS, Prompts
from stages.methods import METHODS
from stages.networks.adapters import checked
from stages.networks.pixel import PixelDiffusion
from stages.registry import PluginError

TEMPLATES = Path(__file__).parent / "templates"
EMBEDDED = ("digits", "digit_scenes")
"""Teachers that need no download. Each has a template of the same name."""
HUB_ID = r"[\w.-]+/[\w.-]+"
PLACEHOLDER = "prompts.txt"
WORDS = ("null", "true", "false")
"""Words that YAML does not read as text."""
LONGEST = 60
"""Maximum length of a comment with a setting's type. Longer types are left out."""


def manifest_text(teacher: str, method: str, prompts: str | None, file: str) -> str:
    """Return a commented manifest. teacher: digits, digit_scenes, a diffusers folder or a hub id.

    file: the path that it will be written to. Raises UsageError for an invalid teacher, method or prompts.
    """
    values = {"file": file, "teacher": teacher, "name": _run_name(teacher), **_method(method)}
    if teacher in EMBEDDED:
        if prompts is not None:
            raise UsageError(f"--prompts: the {teacher} teacher knows only the captions of its own image set")
        return _filled(teacher, values)
    folder = Path(teacher).expanduser()
    if folder.is_dir():
        return _for_folder(folder.absolute(), prompts, values)
    if not re.fullmatch(HUB_ID, teacher):
        raise UsageError(
            f"--teacher {teacher}: give {', '.join(EMBEDDED)}, a diffusers folder, or a hub id such as owner/name"
        )
    revision = "    # revision: a full commit hash; planning then needs no network\n"
    return _filled("latent", {**values, "source": teacher, "revision": revision, "prompts": _prompts(prompts)})


def _for_folder(folder: Path, prompts: str | None, values: dict[str, str]) -> str:
    try:
        pixels = issubclass(checked(folder), PixelDiffusion)
        classes = PixelDiffusion.classes_of(folder) if pixels else None
    except (StageError, PluginError) as error:
        raise UsageError(str(error)) from None
    values = {**values, "source": _scalar(str(folder))}
    if not pixels:
        return _filled("latent", {**values, "revision": "", "prompts": _prompts(prompts)})
    if classes is None:
        if prompts is not None:
            raise UsageError(f"--prompts: {folder} is unconditional and takes no prompts")
        none = "    # no prompts: this teacher is unconditional"
        return _filled(
            "pixel", {**values, "prompts": none, "guidance": "1.0: an unconditional teacher cannot be guided"}
        )
    guidance = "1.0 is no guidance; more needs a teacher with an unconditional class"
    return _filled("pixel", {**values, "prompts": _prompts(prompts, "one class on each line"), "guidance": guidance})


def _filled(template: str, values: dict[str, str]) -> str:
    return LINE + Template((TEMPLATES / f"{template}.yaml").read_text(encoding="utf-8")).substitute(values)


def _prompts(given: str | None, content: str = "one prompt on each line") -> str:
    """Return the manifest's line for prompts. Without prompts, it names PLACEHOLDER, which plans report as missing."""
    if given is None:
        return f"    prompts: {PLACEHOLDER} # give your own file: {content}; or .csv, .jsonl, .parquet with a column"
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
    return f"    prompts: {{path: {path}, column: prompt}} # the column that holds the prompts"


def _method(name: str) -> dict[str, str]:
    """Return the method's lines, with all settings at their defaults, and texts about its number of steps."""
    try:
        config = METHODS.get(name)
    except PluginError as error:
        raise UsageError(str(error)) from error
    if config is None:
        raise UsageError(f"--method {name}: there is no such method{suggest(name, METHODS)}")
    if {"pairs"} not in config.DATA:
        wanted = " or ".join(" and ".join(sorted(streams)) for streams in config.DATA)
        raise UsageError(f"--method {name}: init writes manifests that train on pairs, but {name} needs {wanted}")
    own = [_setting(setting) for setting in settings_of(config)]
    text = "\n".join(["    method:", f"      name: {name} # retort explain {name}", *own])
    few = not {"steps", "end_steps"}.isdisjoint(config.model_fields)
    return {
        "method": text,
        "calls": "a few network calls" if few else "one network call",
        "steps": "few steps" if few else "one step",
        "kind": "few-step" if few else "one-step",
    }


def _setting(setting: Setting) -> str:
    comment = f" # {setting.allowed if len(setting.allowed) <= LONGEST else f'retort explain {setting.name}'}"
    if setting.required:
        return f"      # {setting.name}: required{comment}"
    if setting.config or setting.default is None:
        return f"      # {setting.name}:{comment}"
    value = setting.default
    return f"      {setting.name}: {_scalar(value) if isinstance(value, str) else json.dumps(value)}{comment}"


def _scalar(text: str) -> str:
    """Return a text as YAML. It is quoted unless it is a plain word or path."""
    plain = re.fullmatch(r"[A-Za-z/][\w./-]*", text) and text.lower() not in WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)


def _run_name(teacher: str) -> str:
    """Return a name for the run, made from the last part of a path."""
    last = Path(teacher).expanduser().absolute().name
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", last).strip("_-")[:80] or "retort"
    return name if re.fullmatch(r"[A-Za-z]*[A-Za-z_-]{2}[\w-]*", name) and name.lower() not in WORDS else f"run_{name}"
