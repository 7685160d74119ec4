"""The registry of adapters, by the pipeline class that `model_index.json` names. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from stages.base import StageError
from stages.networks import decoupled, exact
from stages.networks.adapter import INDEX, Adapter, Unsupported, read_json
from stages.networks.coop import GUEST, HOST, Bridge, Coop, Cooperating, cooperating
from stages.networks.decoupled import TimeDecoupled
from stages.networks.exact import Exact
from stages.networks.pixel import PixelDiffusion
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.stable_diffusion_xl import StableDiffusionXL
from stages.registry import PluginError, Registry

ADAPTERS: Registry[Adapter] = Registry(
    "retort.teachers",
    Adapter,  # type: ignore[type-abstract]
    None,
    {
        "StableDiffusionPipeline": StableDiffusion,
        "StableDiffusionXLPipeline": StableDiffusionXL,
        "DDPMPipeline": PixelDiffusion,
        "DDIMPipeline": PixelDiffusion,
    },
)


def adapter_of(folder: Path) -> type[Adapter]:
    """Return the adapter class of the pipeline in `folder`.

    Raises Unsupported if there is no pipeline or no adapter for it, and PluginError if a package's adapter cannot be
    imported."""
    for kind in (Coop, Bridge):
        if (folder / kind.FILE).exists():
            return cooperating(kind, adapter_of(folder / HOST), adapter_of(folder / GUEST))
    if (folder / decoupled.FILE).exists():
        return decoupled.time_decoupled(adapter_of(folder / decoupled.STRUCTURE))
    pipeline = read_json(folder / INDEX).get("_class_name", "pipeline")
    if not isinstance(pipeline, str) or pipeline not in ADAPTERS:
        raise Unsupported(f"{folder} is a {pipeline}")
    family = ADAPTERS[pipeline]
    return exact.exact(family) if (folder / exact.FILE).exists() else family


def family_of(adapter: type[Adapter]) -> type[Adapter]:
    """Return the family of an adapter. For an exact teacher, it is that of its pipeline. For a teacher of several
    pipelines, it is that of structure or host."""
    while issubclass(adapter, Exact | TimeDecoupled | Cooperating):
        adapter = adapter.__bases__[1]
    return adapter


def checked(folder: Path) -> type[Adapter]:
    """Return the adapter class of the pipeline in `folder`, after checking that the adapter can run the pipeline.

    Raises Unsupported if it cannot. The message lists what is supported."""
    found = checked_index(folder)
    try:
        found.check(folder)
    except Unsupported as error:
        raise Unsupported(f"{error}; {supported()}") from None
    return found


def checked_index(folder: Path) -> type[Adapter]:
    """Like `checked`, but read only `model_index.json`. It is called before the weights are downloaded."""
    try:
        found = adapter_of(folder)
        found.check_index(folder)
    except Unsupported as error:
        raise Unsupported(f"{error}; {supported()}") from None
    return found


def files_of(source: str) -> tuple[str, ...]:
    """Return the glob patterns of the files that Retort copies from the pipeline in the folder `source`.

    If its adapter is not known, return the patterns of all built-in adapters."""
    try:
        return adapter_of(Path(source)).FILES
    except (StageError, PluginError):  # reported when the teacher stage runs
        built_in = (adapter.FILES for adapter in ADAPTERS.built_in.values())
        return tuple(dict.fromkeys(pattern for files in built_in for pattern in files))


def supported() -> str:
    """Return a sentence that lists the supported teachers."""
    families = dict.fromkeys(adapter.SUPPORTS for adapter in ADAPTERS.built_in.values())
    families |= dict.fromkeys(name for name in ADAPTERS if name not in ADAPTERS.built_in)
    return f"supported teachers: folders or hub ids of {', '.join(families)}, `train:`, `exact:` and `gaussian:`"
