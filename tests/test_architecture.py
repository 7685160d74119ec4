"""Checks the imports against the rows of docs/architecture.md, and other rules for every file."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.cli import ROOT

FLOORS = [
    # a room may import rooms of the rows below its own
    {"pipeline.cli", "pipeline.api"},
    {"pipeline.commands"},
    {"pipeline.views", "pipeline.jobs", "pipeline.reference"},
    {"pipeline.runs"},
    {"pipeline.planning", "pipeline.engines"},
    {"pipeline.manifest"},
    {"pipeline.store"},
    {"pipeline.errors"},
    {"stages", "stages.reports"},
    {"stages.evaluate"},
    {"stages.distill", "stages.optimize", "stages.perceptual"},
    {"stages.pairs", "stages.latents", "stages.probe", "stages.reference", "stages.methods"},
    {"stages.teacher"},
    {"stages.training", "stages.losses"},
    {"stages.networks"},
    {"stages.data", "stages.metrics", "stages.diffusion"},
    {"stages.base"},
    {"stages.registry"},
]

HOMES = {
    "ray": {"pipeline.engines"},
    "webdataset": {"stages.data"},
    "diffusers": {"stages.networks", "stages.teacher"},
    "torchvision": {"stages.networks"},
    "lpips": {"stages.losses", "stages.networks"},
    "torch_fidelity": {"stages.networks"},
    "transformers": {"stages.networks"},
    "accelerate": {"stages.training"},
    "click": {"pipeline.cli", "pipeline.commands", "pipeline.reference"},
    "trimesh": {"stages.optimize"},
}

DEFINE = {
    "pipeline",
    "stages",
    "stages.methods",
    "stages.optimize.objectives",
    "stages.optimize.representations",
    "stages.data.inspection",
}
"""Packages whose `__init__` defines something: a default, registries of names, `inspect_shards`."""

READ_WEIGHTS = {"stages.perceptual.importing", "stages.reference.measure"}
"""Modules that read published weights in PyTorch's format."""

FILES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").rglob("*.py")])
ROOMS = sorted(room for row in FLOORS for room in row)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The longest entry of FLOORS that a module, or a name in it, belongs to. `stages.KINDS` is of `stages`."""
    rooms = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    if len(module.split(".")) > 1 and module.split(".")[1].isupper():
        rooms = [room for room in rooms if "." not in room]
    return max(rooms, key=len, default=None)


def imports(path: Path) -> set[str]:
    """Return everything that a file imports, at its top or in a function, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: a relative import hides its row"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


IMPORTS = {path: imports(path) for path in FILES}


def row_of(room: str) -> int:
    return next(row for row, rooms in enumerate(FLOORS) if room in rooms)


def test_every_file_is_in_a_room():
    assert {module_of(path) for path in FILES if room_of(module_of(path)) is None} <= {"pipeline"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_rooms_below_it_only(room):
    for path in (path for path in FILES if room_of(module_of(path)) == room):
        for name in IMPORTS[path]:
            other = room_of(name)
            assert other in (None, room) or row_of(other) > row_of(room), f"{path} imports {name}, not below {room}"


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_has_one_home(library):
    for path, names in IMPORTS.items():
        if any(name.split(".")[0] == library for name in names):
            assert room_of(module_of(path)) in HOMES[library], f"{path} imports {library}"


def test_the_machine_imports_no_science_libraries():
    for path in (path for path in FILES if module_of(path).startswith("pipeline")):
        assert not {name.split(".")[0] for name in IMPORTS[path]} & {"torch", "diffusers", "transformers", "numpy"}, (
            path
        )


def test_the_machine_knows_no_lists_of_shards():
    for path in (path for path in FILES if module_of(path).startswith("pipeline")):
        assert not any(name.startswith("stages.data.pool") for name in IMPORTS[path]), path


def test_every_folder_says_what_it_holds_and_defines_nothing():
    for folder in {path.parent for path in FILES}:
        face = folder / "__init__.py"
        tree = ast.parse(face.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{face} says nothing"
        kinds = (ast.ImportFrom, ast.Expr)
        extra = [n for n in tree.body if not isinstance(n, kinds) and "__all__" not in ast.unparse(n)]
        assert not extra or module_of(face) in DEFINE, f"{face} defines something"


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not any(re.match(r"tests\..*\btest_", name) for name in imports(path)), f"{path} imports a test"


def test_nothing_pickles():
    for path, names in IMPORTS.items():
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in {name.split(".")[0] for name in names}
        loads = re.findall(r"torch\.load\(.*", text)
        safe = module_of(path) in READ_WEIGHTS and all("weights_only=True" in load for load in loads)
        assert not loads or safe, path
        assert "torch.save(" not in text and "allow_pickle=True" not in text, path
