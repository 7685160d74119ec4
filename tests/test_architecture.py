"""The floors of the house, read from the imports."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.cli import ROOT

FLOORS = [
    # a room may import rooms of the rows below its own
    {"pipeline.cli"},
    {"pipeline.commands"},
    {"pipeline.views", "pipeline.jobs", "pipeline.reference"},
    {"pipeline.runs"},
    {"pipeline.planning", "pipeline.engines"},
    {"pipeline.manifest"},
    {"pipeline.store"},
    {"pipeline.errors"},
    {"stages", "stages.reports"},
    {"stages.evaluate"},
    {"stages.distill", "stages.perceptual"},
    {"stages.pairs", "stages.latents", "stages.probe", "stages.methods"},
    {"stages.teacher"},
    {"stages.training", "stages.losses"},
    {"stages.networks"},
    {"stages.data", "stages.metrics", "stages.diffusion"},
    {"stages.base"},
    {"stages.registry"},
]

HOMES = {
    "ray": {"pipeline.engines", "pipeline.jobs"},
    "webdataset": {"stages.data"},
    "diffusers": {"stages.networks", "stages.teacher"},
    "torchvision": {"stages.networks"},
    "lpips": {"stages.losses"},
    "transformers": {"stages.networks"},
    "accelerate": {"stages.training"},
    "click": {"pipeline.cli", "pipeline.commands", "pipeline.reference"},
}

FILES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").rglob("*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: a relative import hides its floor"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str | None:
    """The longest entry of FLOORS that `module` lies in."""
    rooms = [r for floor in FLOORS for r in floor if module == r or module.startswith(r + ".")]
    if module.count(".") == 0 or (module.startswith("stages.") and module.split(".")[1].isupper()):
        rooms = [r for r in rooms if r == module.split(".")[0]]
    return max(rooms, key=len, default=None)


def level(name: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if name in floor)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path):
    own = room(module_of(path))
    if own is None:  # pipeline/__init__ and the like
        assert not imports(path) or module_of(path) in ("pipeline", "stages")
        return
    for name in imports(path):
        other = room(name)
        if other is None or other == own:
            continue
        assert level(other) > level(own), f"{module_of(path)} imports {name}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_heavy_libraries_have_one_home(path):
    for name in imports(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or room(module_of(path)) in homes, f"{module_of(path)} imports {name}"


def test_the_machine_imports_no_science_libraries():
    for path in (ROOT / "pipeline").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "diffusers", "transformers", "numpy"}


def test_the_machine_knows_no_lists_of_shards():
    for path in (ROOT / "pipeline").rglob("*.py"):
        assert not any(name.startswith("stages.data.pool") for name in imports(path)), path


def test_nothing_pickles():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in {name.split(".")[0] for name in imports(path)}
        loads = re.findall(r"torch\.load\(.*", text)
        assert not loads or (
            module_of(path) == "stages.perceptual.importing" and all("weights_only=True" in x for x in loads)
        )
        assert "torch.save(" not in text and "allow_pickle=True" not in text
