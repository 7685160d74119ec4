"""Checks that commands, manifests, Python code and links in README.md, CONTRIBUTING.md, CHANGELOG.md and docs/*.md
work.

Each block runs in its own folder. There, `manifests/` is that of the repository, `retort-store/` holds one small sealed
run under the name of every manifest, and the manifests and files that the document describes exist. Commands that would
take minutes (`submit`) are planned instead. Commands that need another machine are only parsed. Of benchmarks, only the
module and its options are checked.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CalledProcessError, run
from typing import Annotated, Any
from urllib.parse import unquote

import click
import pytest
import yaml
from pydantic import TypeAdapter

from pipeline.cli import cli
from pipeline.manifest.matrix import base_of
from pipeline.reference.explain import REGISTRIES, built_in
from tests.support import tour
from tests.support.cli import ROOT, retort
from tests.support.pipelines import execute

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MANIFESTS = {path.stem: path for path in sorted((ROOT / "manifests").glob("*.yaml"))}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PARAMETERS = {"set": "overrides", "only": "only", "from": "onward", "force": "force"}
"""Options of `submit` that `plan` takes, and their parameters."""
ELSEWHERE = ("stop", "import-weights")
"""Commands that need another machine or a download."""
RUN = """
name: digits
stages:
  teacher: {kind: teacher, from: digit_scenes, execution: {threads: 1}}
  pairs:
    kind: pairs
    teacher: teacher
    prompts: digit_scenes
    count: 64
    shard_size: 32
    sampler: {steps: 2, guidance_scale: 2.0}
    execution: {threads: 1}
  student:
    kind: distill
    pairs: pairs
    method: {name: knowledge_distillation}
    training: {steps: 2, batch_size: 8}
    held_out: 32
    execution: {threads: 1}
  quality: {kind: evaluate, student: student, samples: 20, teacher_steps: [], execution: {threads: 1}}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block, with the text of its document above it."""

    document: str
    line: int
    language: str
    text: str
    above: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that a TOML or Python block shows, if the paragraph above names it."""
        suffix = {"toml": "toml", "python": "py"}.get(self.language, "none")
        found = re.findall(rf"`([\w/]+\.{suffix})`", self.above.rstrip().rpartition("\n\n")[2])
        return found[-1] if found else None


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(path.name, text.count("\n", 0, found.start()) + 1, found[1], found[2], text[: found.start()])
        for found in FENCE.finditer(text)
    ]


BLOCKS = {path.name: blocks_of(path) for path in DOCUMENTS}
ALL_BLOCKS = [block for blocks in BLOCKS.values() for block in blocks]


# --- The folder that blocks run in ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the run `digits`."""
    store = tmp_path_factory.mktemp("documents")
    execute(RUN, store)
    return store


@pytest.fixture
def place(tmp_path: Path, sealed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "manifests").symlink_to(ROOT / "manifests")
    (tmp_path / "docs").mkdir()  # figures and charts are written there
    store = tmp_path / "retort-store"
    shutil.copytree(sealed, store, copy_function=os.link, ignore=shutil.ignore_patterns("runs"))
    shutil.copytree(sealed / "runs", store / "runs")  # copies instead of links, because commands append to these files
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETORT_STORE", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # stages take one thread: another test runs beside this one
    return tmp_path


def furnish(place: Path, block: Block) -> None:
    """Write the files that the document describes, and name the sealed run after each manifest that the block names."""
    for other in BLOCKS.get(block.document, []):
        manifest = complete(other)
        if manifest:
            (place / f"{manifest['name']}.yaml").write_text(other.text, encoding="utf-8")
        elif other.file and not (place / other.file).exists():
            (place / other.file).parent.mkdir(exist_ok=True)
            (place / other.file).write_text(other.text, encoding="utf-8")
    runs = place / "retort-store" / "runs"
    for name in (*MANIFESTS, *(path.stem for path in place.glob("*.yaml"))):
        if name in block.text and not (runs / name).exists():
            shutil.copytree(runs / "digits", runs / name)


@contextlib.contextmanager
def package_of(place: Path) -> Iterator[None]:
    """The package that the document's pyproject.toml describes, as if it were installed."""
    project = place / "pyproject.toml"
    if not project.exists():
        yield
        return
    described = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    information = place / f"{described['name'].replace('-', '_')}-{described['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Name: {described['name']}\nVersion: {described['version']}\n")
    lines = [
        line
        for group, entries in described["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (information / "entry_points.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        for registry in REGISTRIES.values():
            patch.setitem(registry.__dict__, "_loaded", {})
            registry.__dict__.pop("_offered", None)
        try:
            yield
        finally:
            for registry in REGISTRIES.values():
                registry.__dict__.pop("_offered", None)
            for module in [
                name for name in sys.modules if name.partition(".")[0] == described["name"].replace("-", "_")
            ]:
                del sys.modules[module]


# --- Commands -------------------------------------------------------------------------------------------


def check_commands(text: str, place: Path) -> None:
    """Check each line that begins with `retort`, `python` or `pytest`, perhaps after a prompt, variables or a path."""
    for line in text.replace("\\\n", " ").splitlines():
        if re.match(r"(\$ )?(\w+=\S+ )*(\S*/)?(retort|python3?|pytest) ", line):
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if re.fullmatch(r"[&|;]+", word):
                    check_command(words, place)
                    words = []
                else:
                    words.append(word)


def check_command(words: list[str], place: Path) -> None:
    words = words[: words.index(">")] if ">" in words else words
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    program = words[0].rpartition("/")[2]
    if program == "retort":
        check_retort(words[1:], place)
    elif program.startswith("python") and words[1] == "-m" and words[2].startswith("tests."):
        check_module(words[2], words[3:])
    elif program.startswith("python") and words[1] == "-c":
        path = {"PYTHONPATH": os.pathsep.join([str(place), str(ROOT)])}
        run([sys.executable, *words[1:]], cwd=place, env=os.environ | path, check=True)
    elif program == "pytest":
        missing = [word for word in words if word.startswith("tests") and not (ROOT / word).exists()]
        assert not missing, f"there is no {missing[0]}"


def check_retort(words: list[str], place: Path) -> None:
    given = parsed(words)
    rows = set(given.get("row_names") or ()) - {"student"}  # the sealed run has no others of these names
    if given.get("address") or rows or words[0] in ELSEWHERE or any("://" in word for word in words):
        return
    if given.get("store"):
        words = [word for word in words if word not in ("--store", given["store"], f"--store={given['store']}")]
    if words[0] == "submit":
        words = ["plan", str(given["manifest"])]
        for option, parameter in PARAMETERS.items():
            words += [word for value in given[parameter] for word in (f"--{option}", value)]
    elif words[0] == "resume":
        words = [*words, "--engine", "inline"]
    done = retort(*words, cwd=place)
    assert done.returncode == 0, f"retort {shlex.join(words)}\n{done.stdout}{done.stderr}"


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that the words after `retort` name, and its arguments. Raises AssertionError if there is
    none."""
    found: click.Command = cli
    while isinstance(found, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in found.commands, f"there is no command {words[0]!r}"
        found, words = found.commands[words[0]], words[1:]
    return found, words


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters that a command line gives."""
    found, arguments = command_of(words)
    if found is cli:  # `retort --help`
        return {}
    try:
        return found.make_context(str(found.name), list(arguments)).params
    except click.UsageError as error:
        raise AssertionError(f"retort {shlex.join(words)}: {error.format_message()}") from None


def check_module(module: str, arguments: list[str]) -> None:
    """Check that a module of the tests exists and takes the options."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert path.exists(), f"there is no module {module}"
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    known = {arg.value for call in added for arg in call.args if isinstance(arg, ast.Constant)}
    unknown = [word for word in arguments if word.startswith("--") and word not in known]
    assert not unknown, f"{module} has no option {unknown[0]}"


# --- Manifests ------------------------------------------------------------------------------------------


def complete(block: Block) -> dict[str, Any] | None:
    """Return the content of a block that is a whole manifest, or None."""
    if block.language != "yaml" or not re.search("^name:", block.text, re.M):
        return None
    content: dict[str, Any] = yaml.safe_load(block.text)
    return content


def check_yaml(block: Block, place: Path) -> None:
    """Plan a whole manifest, or stages with those that they read; validate settings that stand alone."""
    if complete(block):
        plan(block.text, place)
        return
    stages: dict[str, Any] = {}
    for key, value in entries(block.text):
        if key == "stages":
            stages |= value
        elif isinstance(value, dict) and "kind" in value:
            stages[key] = value
        else:
            check_setting(key, value)
    if stages:
        known = stages_before(block)
        added = True
        while added:
            added = {base_of(text) for text in texts(stages)} & (known.keys() - stages.keys())
            stages |= {name: known[name] for name in added}
        plan(yaml.safe_dump({"name": "x", "stages": stages}), place)


def entries(text: str) -> Iterator[tuple[str, Any]]:
    """Return all keys and values of a mapping, also keys that are given several times."""
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    assert isinstance(node, yaml.MappingNode), "no mapping"
    for key, value in node.value:
        yield loader.construct_object(key), loader.construct_object(value, deep=True)


def stages_before(block: Block) -> dict[str, Any]:
    """Return the stages of the document up to this block, and those of manifests/digits.yaml."""
    stages: dict[str, Any] = yaml.safe_load(MANIFESTS["digits"].read_text(encoding="utf-8"))["stages"]
    for other in BLOCKS.get(block.document, []):
        if other.line < block.line and (manifest := complete(other)):
            stages |= manifest["stages"]
    return stages


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)


def plan(text: str, place: Path) -> None:
    (place / "plan.yaml").write_text(text, encoding="utf-8")
    done = retort("plan", "plan.yaml", cwd=place)
    assert done.returncode == 0, done.stderr


def check_setting(key: str, value: Any) -> None:
    """Check that some class of settings has a setting of this name that takes the value."""
    fields = [info for topic in built_in() for name, info in topic.config.model_fields.items() if name == key]
    assert fields, f"nothing has a setting {key!r}"
    errors = []
    for info in fields:
        try:
            TypeAdapter(Annotated[info.annotation, info]).validate_python(value)
            return
        except ValueError as error:
            errors.append(error)
    raise errors[0]


# --- Python ---------------------------------------------------------------------------------------------


def check_python(block: Block, place: Path) -> None:
    """Run a block, or import it if it is a module."""
    if block.file:
        importlib.import_module(block.file.removesuffix(".py").replace("/", "."))
    else:
        exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})


# --- Every block ----------------------------------------------------------------------------------------

CHECKS = {
    "": lambda block, place: check_commands(block.text, place),
    "sh": lambda block, place: check_commands(block.text, place),
    "yaml": check_yaml,
    "python": check_python,
    "json": lambda block, place: json.loads(block.text),
    "toml": lambda block, place: tomllib.loads(block.text),
    "text": lambda block, place: None,
}


def check(block: Block, place: Path) -> None:
    furnish(place, block)
    with package_of(place):
        CHECKS[block.language](block, place)


@pytest.mark.parametrize("block", ALL_BLOCKS, ids=str)
def test_every_block_works(block: Block, place: Path) -> None:
    check(block, place)


def test_the_notebook_equals_the_page() -> None:
    made = json.loads(tour.NOTEBOOK.read_text(encoding="utf-8"))
    assert [(cell["cell_type"], cell["source"]) for cell in made["cells"]] == tour.cells(), (
        "python -m tests.support.tour"
    )
    outputs = [output for cell in made["cells"] for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


# --- Words between blocks -------------------------------------------------------------------------------


def check_code(code: str) -> None:
    """Check that a command in a sentence has an existing name and options, and that a path in the repository exists."""
    words = code.partition(";")[0].split()
    if words[:1] == ["retort"]:
        command, arguments = command_of(words[1:])
        known = {option for parameter in command.get_params(click.Context(command)) for option in parameter.opts}
        unknown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(arguments))) - known
        assert not unknown, f"retort {command.name} has no option {unknown.pop()}"
    elif words[:2] == ["python", "-m"] and words[2].startswith("tests."):
        check_module(words[2], words[3:])
    elif re.fullmatch(r"(docs|manifests|pipeline|stages|tests)/[\w./*-]+", code):
        assert list(ROOT.glob(re.sub("[A-Z]{2,}", "*", code.rstrip("/")))), f"there is no {code}"


def check_link(target: str, document: Path) -> None:
    if re.match(r"https?://", target):
        return
    path, _, anchor = unquote(target).partition("#")
    file = document.parent / path if path else document
    assert file.exists(), f"there is no {path}"
    assert not anchor or anchor in anchors(file), f"{file.name} has no heading #{anchor}"


def anchors(file: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, without punctuation, hyphens for spaces."""
    found: list[str] = []
    for heading in re.findall("^#+ (.+)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_in_sentences_and_links_exist(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    assert "```" not in text, "a fence is indented, or not closed: its block is not checked"
    wrong = []
    for code in re.findall(r"`([^`]+)`", text):
        with noting(wrong, code):
            check_code(code)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]+`", "", text)):
        with noting(wrong, target):
            check_link(target, path)
    assert not wrong, "\n".join(wrong)


@contextlib.contextmanager
def noting(wrong: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        wrong.append(f"{what}: {error}")


# --- The package of docs/plugins.md, and what must fail ---------------------------------------------------


def test_manifests_named_in_code_and_manifests_exist() -> None:
    sources = {
        path: r"manifests/(\w+)\.yaml" for folder in ("pipeline", "stages") for path in (ROOT / folder).rglob("*.py")
    }
    sources |= {path: r"\b(\w+)\.yaml" for path in MANIFESTS.values()}
    named = {(path.name, name) for path, pattern in sources.items() for name in re.findall(pattern, path.read_text())}
    assert len(named) > 15
    assert {(path, name) for path, name in named if name not in MANIFESTS} == set()


def test_the_method_of_the_package_in_plugins_trains_a_student(place: Path) -> None:
    block = next(block for block in BLOCKS["plugins.md"] if block.language == "yaml")
    furnish(place, block)
    method = json.dumps(yaml.safe_load(block.text)["student"]["method"])
    with package_of(place):
        manifest = RUN.partition("  quality:")[0].replace("{name: knowledge_distillation}", method)
        assert execute(manifest, place / "retort-store")["student"].artifact.record["metrics"]


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("sh", "retort submit manifests/nothing.yaml"),
        ("sh", "retort submit manifests/digits.yaml --set stages.pairs.cuont=1"),
        ("sh", "retort submit manifests/digits.yaml --only nothing"),
        ("sh", "retort submit manifests/digits.yaml --nothing"),
        ("sh", "retort submit manifests/digits.yaml --addres http://HEAD:8265"),
        ("sh", "retort runs && retort nothing"),
        ("sh", "A=1 .venv/bin/retort shards mend digits/pairs"),
        ("sh", "retort stats nothing # no such run"),
        ("sh", "retort resume \\\n  digits nothing"),
        ("sh", "retort status nothing --store /shared/store"),
        ("", "$ retort sample digits/nothing -p a"),
        ("sh", "python -m tests.benchmarks.nothing"),
        ("sh", "python -m tests.benchmarks.gan_step --nothing 2"),
        ("sh", "python -c 'import nothing'"),
        ("sh", ".venv/bin/pytest tests/nothing"),
        ("yaml", "name: x\nstages:\n  teacher: {kind: teacher, form: digit_scenes}"),
        ("yaml", "stages:\n  quality: {kind: evaluate, student: nothing}"),
        ("yaml", "  probe: {kind: probe, images: nothing}"),
        ("yaml", "resources:\n  pairs: {worker: 8}"),
        ("yaml", "dataset: digits\ndataset: nothing"),
        ("yaml", "nothing: 1"),
        ("yaml", "dataset: [digits"),
        ("python", "import nothing"),
        ("python", "from stages.data.pool import nothing"),
        ("json", "{"),
        ("toml", "nothing"),
        ("nothing", ""),
    ],
)
def test_an_invalid_block_is_noticed(language: str, text: str, place: Path) -> None:
    with pytest.raises(
        (AssertionError, OSError, ValueError, LookupError, ImportError, yaml.YAMLError, CalledProcessError)
    ):
        check(Block("nothing.md", 1, language, text, ""), place)


@pytest.mark.parametrize(
    "code",
    [
        "retort nothing",
        "retort shards nothing ARTIFACT",
        "retort logs RUN [STAGE] [-x]",
        "retort compare RUN... --nothing",
        "python -m tests.nothing",
        "python -m tests.benchmarks.stats --nothing",
        "pipeline/nothing.py",
        "tests/nothing/test_NAME.py",
    ],
)
def test_invalid_code_in_a_sentence_is_noticed(code: str) -> None:
    with pytest.raises(AssertionError):
        check_code(code)


@pytest.mark.parametrize("target", ["nothing.md", "methods.md#nothing", "#nothing", "../README.md#nothing"])
def test_a_broken_link_is_noticed(target: str) -> None:
    with pytest.raises(AssertionError):
        check_link(target, ROOT / "docs" / "data.md")
