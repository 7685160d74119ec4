"""Compares fingerprints of artifacts, and hashes of the code behind results, with those recorded in recorded.json.

If a fingerprint changes, its artifact is stale for every user, and the stage runs again. If code changes, the
fingerprint stays the same: old results are reused, although the same settings may now give other results. Raising
VERSION prevents that. The tests here fail at either change, so that its author must decide.

RESULTS names the modules whose code decides the bytes of a stage's files or the numbers in its record: networks,
losses, methods, the training loop, samplers, the order of data, the formats of sealed files. It leaves out:

- `stage.py` and `config.py`, because settings are part of the fingerprint. A file of such a name is listed only if it
  computes something.
- Cards, pages, checks, warnings, progress, receipts and checkpoints, because they change no result.

The hash is of syntax trees. It leaves out comments, docstrings, imports, descriptions of settings, and the words of
errors and of the log. It leaves out file names, too: a module that is moved or renamed keeps its hash.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages import KINDS
from tests.support.cli import ROOT
from tests.support.pipelines import GAUSSIAN, TINY, plan_of

STAGES = ROOT / "stages"
RECORDED = Path(__file__).parent / "recorded.json"
REGENERATE = "run `python -m tests.pipeline.planning.test_recorded` and commit recorded.json"

TEACHER = [
    "networks/{adapter,adapters,camera,compute,condition,coop,decoupled,exact,lora,pixel}.py",
    "networks/{stable_diffusion,stable_diffusion_xl,teachers}.py",
    "diffusion/{guidance,mixture,prediction,schedule}.py",
]
"""A teacher's network, asked for its output."""
SOLVER = ["networks/{gaussian,solvers}.py", "diffusion/samplers.py"]
"""A teacher's ODE, solved in many steps."""
STUDENT = ["networks/student.py", "diffusion/{consistency,few_step,grid}.py"]
"""A student's network, sampled in few steps."""
TRAINING = ["training/{figures,loop,players}.py", "data/{order,shares}.py"]
"""The training loop, and the order in which samples are drawn."""
IMAGES = ["data/images/{digits,files,labelled,load,photographs}.py", "data/tars.py"]
"""Images, captions and classes of image sets."""

RESULTS = {
    "teacher": [
        "teacher/{autoencoder,denoiser,encoding,exact,lora,train}.py",
        "networks/{build,compute,condition,stable_diffusion}.py",
        "diffusion/{prediction,schedule}.py",
        *(*TRAINING, *IMAGES),
    ],
    "latents": [
        "latents/encoding.py",
        "networks/{adapter,adapters,compute,pixel,stable_diffusion,stable_diffusion_xl,teachers}.py",
        "data/{latents,statistics}.py",
        *IMAGES,
    ],
    "pairs": [
        "pairs/factory.py",
        "data/{noise,pool,records,shards,statistics}.py",  # pool: which samples a shard holds
        "data/prompts/{read,table}.py",
        "data/images/{digits,files,load}.py",  # captions
        *(*TEACHER, *SOLVER),
    ],
    "perceptual": [
        "perceptual/{calibration,classification,judgement,seen,source,train}.py",
        "networks/{adapter,adapters,compute,perceptual,pixel,stable_diffusion,stable_diffusion_xl,teachers,vgg}.py",
        "losses/regression.py",
        "metrics/two_afc.py",
        "data/latents.py",
        "data/triplets/{bapps,distortions,families,synthetic,triplets}.py",
        *(*TRAINING, *IMAGES),
    ],
    "distill": [
        "distill/{held_out,recipe,train}.py",
        "methods/{base,matching}.py",
        "methods/*/method.py",
        "methods/diffusion2gan/{config,mix_and_match}.py",  # config: how its discriminator is optimised
        "losses/*.py",
        "networks/{denoiser,discriminator,exporting,fake_score,head,perceptual,tiny,unet_features,vgg}.py",
        "diffusion/{halving,levels,weighting}.py",
        "data/{latents,reader,supply}.py",
        "data/prompts/{read,table}.py",
        "data/images/{digits,files,load}.py",  # captions
        *(*TEACHER, *STUDENT, *TRAINING),
    ],
    "optimize": [
        "optimize/{cameras,train}.py",
        "optimize/objectives/{sds,vsd}.py",
        "optimize/representations/{base,flat}.py",
        "optimize/representations/*/*.py",
        "losses/score.py",
        "networks/{denoiser,fake_score}.py",
        "diffusion/{levels,weighting}.py",
        *(*TEACHER, *STUDENT, *TRAINING),
    ],
    "probe": [
        "probe/stage.py",  # it trains and measures the classifier
        "networks/{compute,probe}.py",
        "data/{order,shares}.py",
        *IMAGES,
    ],
    "reference": [
        "reference/measure.py",
        "networks/{compute,standard}.py",
        "metrics/protocols.py",
        *IMAGES,
    ],
    "evaluate": [
        "evaluate/{measure,noises,particles,parts,real,run,sides}.py",
        "metrics/{distances,images,protocols}.py",
        "networks/{probe,standard}.py",
        "diffusion/config.py",  # it counts network calls
        "data/{noise,reader}.py",
        "data/prompts/table.py",
        *(*TEACHER, *SOLVER, *STUDENT, *IMAGES),
    ],
}
"""Stage kind -> globs below stages/, in which {a,b} stands for a and for b."""


def globs(pattern: str) -> Iterator[str]:
    """One glob for each name in braces."""
    before, _, rest = pattern.partition("{")
    names, _, after = rest.partition("}")
    return (before + name + after for name in names.split(","))


def code(node: object) -> object:
    """A syntax tree as JSON, without positions and without the parts that change no result."""
    if isinstance(node, list):
        return [code(one) for one in node if not decides_nothing(one)]
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return {"Raise": code(node.exc.func)}
    if isinstance(node, ast.AST):
        # newer releases of Python have more fields, which are empty here
        return {type(node).__name__: {name: code(v) for name, v in ast.iter_fields(node) if v not in (None, [])}}
    return repr(node)


def decides_nothing(node: object) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.If(test=ast.Name("TYPE_CHECKING")):
            return True
        case ast.Expr(ast.Constant(str())) | ast.Expr(ast.Call(ast.Attribute(ast.Name("log")))):
            return True
        case ast.keyword("description"):
            return True
    return False


def source_hash(kind: str) -> str:
    """SHA-256 of the code of all modules that RESULTS names for a stage kind. It does not depend on the names of the
    modules."""
    files = {file for pattern in RESULTS.get(kind, ()) for glob in globs(pattern) for file in STAGES.glob(glob)}
    codes = sorted(json.dumps(code(ast.parse(file.read_text(encoding="utf-8")))) for file in files)
    return hashlib.sha256("\n".join(codes).encode()).hexdigest()


def fingerprints(store: Path) -> dict[str, str]:
    return {
        f"{text.split()[1]}/{name}": stage.artifact.fingerprint
        for text in (GAUSSIAN, TINY)
        for name, stage in plan_of(text, store).items()
    }


def sources() -> dict[str, dict[str, object]]:
    return {kind: {"version": stage.VERSION, "sha256": source_hash(kind)} for kind, stage in KINDS.built_in.items()}


def test_fingerprints_equal_the_recorded_ones(tmp_path):
    assert fingerprints(tmp_path) == json.loads(RECORDED.read_text())["fingerprints"], (
        "Fingerprints changed. Every artifact of every user becomes stale and is made again. "
        "If you added a setting, mark it Neutral(): at its default it then changes no fingerprint. "
        f"If the change is meant, {REGENERATE}."
    )


def test_source_hashes_equal_the_recorded_ones():
    recorded, now = json.loads(RECORDED.read_text())["sources"], sources()
    changed = [kind for kind in now if now[kind] != recorded.get(kind)]
    assert not changed, (
        f"The code that decides the results of these stage kinds changed: {', '.join(changed)}. "
        "Does a stage with the same settings now give another result? Then raise VERSION of its class, or of the class "
        "of the one method, loss or image set that changed. "
        f"In either case {REGENERATE}."
    )


def test_every_stage_kind_has_an_entry_of_existing_modules():
    assert RESULTS.keys() == KINDS.built_in.keys(), (
        "RESULTS needs an entry for each stage kind: the modules whose code decides its results"
    )
    named = {glob for patterns in RESULTS.values() for pattern in patterns for glob in globs(pattern)}
    missing = sorted(glob for glob in named if not any(STAGES.glob(glob)))
    assert not missing, f"RESULTS names modules that do not exist: {', '.join(missing)}"


CODE = """
import torch

def loss(x):
    return x.square()

def check(x):
    raise ValueError("no")
"""


@pytest.mark.parametrize(("old", "new", "same"), [
    ("import torch", "from torch import nn\nfrom stages.elsewhere import other", True),
    ("def loss(x):", "# why\ndef loss(\n    x,\n):\n    'A docstring.'", True),
    ("    raise", "    log.warning('now')\n    raise", True),
    ('"no"', '"another sentence"', True),
    ("ValueError", "TypeError", False),
    ("square()", "abs()", False),
    ("    return x", "    x = x\n    return x", False),
])  # fmt: skip
def test_the_hash_ignores_code_that_changes_no_result(old, new, same):
    assert old in CODE
    assert (code(ast.parse(CODE)) == code(ast.parse(CODE.replace(old, new)))) == same


if __name__ == "__main__":
    recorded = {"fingerprints": fingerprints(Path("/nonexistent")), "sources": sources()}
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
