"""A mutation study: it changes signs and factors in the code, and checks whether a test fails.

    python -m tests.benchmarks.mutants [MODULE ...] [--survivors] [--list] [--seconds 90]

In each function of MODULES, one sign and one factor are changed. They are drawn at random, with the function's name as
the seed. First, the tests of TESTS run once with the unchanged code, to find out which functions each test calls. Then
a child process is forked for each mutant. It replaces the function's code, and runs the tests that call the function
until one fails. On disk, only mutants.json beside this file changes. It lists each mutant with the test that noticed
it, or `survived`, or `equivalent` with the reason given in EQUIVALENT. With MODULE, a path or the start of one, only
those entries are made again.

The fixture `tiny` is made before the fork, by the unchanged code. A mutant that hangs counts as noticed. On a busy
machine, a mutant that is merely slower than --seconds counts as noticed, too: check those that were `ended by SIGALRM`.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from _pytest.runner import runtestprotocol

from tests.benchmarks.equivalent_mutants import EQUIVALENT

ROOT = Path(__file__).parents[2]
OUTCOMES = Path(__file__).with_suffix(".json")
TESTS = {
    "stages/diffusion": "diffusion halving few_step guidance solvers denoiser student exporting consistency progressive"
    " guided halving_loss",
    "stages/losses": "augmentation diffusion2gan halving_loss consistency losses perceptual",
    "stages/metrics": "metrics two_afc triplets",
    "stages/methods": "training consistency diffusion2gan progressive guided halving_loss",
    "stages/training/loop.py": "training consistency diffusion2gan",
    "stages/training/checkpoint.py": "training consistency",
    "stages/training/figures.py": "training",
}
"""Modules that are changed, and the names of the tests (test_NAME.py) that import them."""
MOST = 200
SLOW = 5.0
"""Tests that take more seconds of CPU time are left out."""
HEAVY = {"plan", "chain", "made", "in_pixels", "varied"}
"""Fixtures that train and measure. Tests that use them are left out of the study."""
LEFT_OUT = ("killed", "manifest_for_stable", "plain_diffusers", "number_of_threads")
"""Words in the names of other tests that are left out, because they take long or need more than one thread."""
TERMINAL = os.dup(2)

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
}  # fmt: skip
FACTORS = (ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
NAMES = {"min": "max", "max": "min", "mean": "sum", "sum": "mean", "square": "abs"}


@dataclass(frozen=True)
class Mutant:
    module: str
    function: str
    line: int
    kind: str
    change: str
    outcome: str = ""
    by: str = ""
    """The test that noticed it, or why no test could."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.module, self.function, self.change


Place = tuple[str, str]
"""A file and the qualified name of a function in it."""
Change = tuple[str, ast.AST, Callable[[Any], ast.AST]]
"""The kind of a change, the node, and a function that makes the changed node from a copy of it."""


def changes(function: ast.AST) -> Iterator[Change]:
    """Yield all possible changes of a function, except in its errors, log lines and annotations."""
    for child in ast.iter_child_nodes(function):
        if isinstance(child, ast.Raise | ast.JoinedStr | ast.Assert | ast.arguments | ast.Global):
            continue
        if isinstance(child, ast.Call) and ast.unparse(child.func).startswith("log."):
            continue
        if isinstance(child, ast.AnnAssign):
            yield from changes(ast.Expr(child.value)) if child.value else ()
            continue
        yield from _changes_of(child)
        yield from changes(child)


def _changes_of(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.BinOp(op=ast.Div(), right=ast.Constant(value=str())):
            pass  # a path
        case ast.BinOp(op=ast.Div(), right=ast.Name(id=name)) if name.isupper():
            pass
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            yield "factor" if isinstance(op, FACTORS) else "sign", node, _swapped
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield "sign", node, _swapped_comparison
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield "sign", node, lambda copied: copied.operand
        case ast.Constant(value=bool()):
            yield "sign", node, lambda copied: ast.Constant(not copied.value)
        case ast.Constant(value=int() | float()):
            yield "factor", node, lambda copied: ast.Constant(2 * copied.value or type(copied.value)(1))
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)) if name in NAMES:
            yield "sign" if name in ("min", "max") else "factor", node, _renamed
        case ast.If(test=test) | ast.IfExp(test=test) if isinstance(test, ast.Name | ast.Attribute | ast.Call):
            yield "sign", test, lambda copied: ast.UnaryOp(ast.Not(), copied)


def _swapped(node: Any) -> ast.AST:
    node.op = SWAPS[type(node.op)]()
    return node


def _swapped_comparison(node: Any) -> ast.AST:
    node.ops = [SWAPS[type(node.ops[0])]()]
    return node


def _renamed(node: Any) -> ast.AST:
    field = "attr" if isinstance(node.func, ast.Attribute) else "id"
    setattr(node.func, field, NAMES[getattr(node.func, field)])
    return node


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield functions and methods with their qualified names. A nested function belongs to the outer one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")


def mutants_of(module: str) -> Iterator[tuple[Mutant, ast.AST]]:
    """Yield the mutants of a module, each with the module's changed syntax tree: at most one sign and one factor for
    each function."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    for name, function in functions(tree):
        found = list(changes(ast.Module(function.body, [])))  # type: ignore[attr-defined]
        for kind in ("sign", "factor"):
            of_kind = [change for change in found if change[0] == kind]
            if not of_kind:
                continue
            _, node, change = random.Random(f"{module}:{name}:{kind}").choice(of_kind)
            new = ast.copy_location(change(copy.deepcopy(node)), node)
            words = f"{_short(node)} -> {_short(new)}"
            changed = ast.fix_missing_locations(copy.deepcopy(tree, {id(node): new}))  # `new` stands where `node` did
            yield Mutant(module, name, node.lineno, kind, words), changed


def _short(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0]


def all_mutants() -> list[tuple[Mutant, ast.AST]]:
    """Return at most MOST mutants, in the order of their places. The choice depends only on the mutants."""
    paths = {
        path for start in TESTS for path in ([ROOT / start] if start.endswith(".py") else (ROOT / start).rglob("*.py"))
    }
    found = [mutant for path in sorted(paths) for mutant in mutants_of(str(path.relative_to(ROOT)))]
    drawn = {mutant for mutant, _ in sorted(found, key=lambda entry: random.Random(repr(entry[0].key)).random())[:MOST]}
    return [entry for entry in found if entry[0] in drawn]


def _tests_of(module: str) -> set[Path]:
    names = next(names for start, names in TESTS.items() if module.startswith(start))
    return {path for name in names.split() for path in (ROOT / "tests").rglob(f"test_{name}.py")}


def put_in_place(mutant: Mutant, tree: ast.AST, known: dict[Place, list[FunctionType]]) -> None:
    """Give all functions of that name in memory the changed code."""
    place = str(ROOT / mutant.module), mutant.function
    new = next(code for code in _codes(compile(tree, place[0], "exec")) if _place(code) == place)  # type: ignore[arg-type]
    for function in known[place]:
        function.__code__ = new


def functions_in_memory() -> dict[Place, list[FunctionType]]:
    found: dict[Place, list[FunctionType]] = {}
    for function in gc.get_objects():
        if type(function) is FunctionType:
            found.setdefault(_place(function.__code__), []).append(function)
    return found


def _place(code: CodeType) -> Place:
    return code.co_filename, code.co_qualname


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


class Study:
    """A pytest plugin. Its loop runs all tests once, and then the tests of each mutant in a child process."""

    def __init__(self, mutants: list[tuple[Mutant, ast.AST]], seconds: int) -> None:
        self.mutants, self.seconds = mutants, seconds
        self.outcomes: list[Mutant] = []
        self.called: set[Place] = set()
        self.elsewhere = 0.0
        """Seconds of CPU time for fixtures of the session."""
        self.by_fixtures: dict[Path, set[Place]] = {}

    def _profile(self, frame: Any, event: str, _: Any) -> None:
        if event == "call" and "/stages/" in frame.f_code.co_filename:
            self.called.add(_place(frame.f_code))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        before, self.called = self.called, set()
        started = time.process_time()
        yield
        if fixturedef.scope == "session":  # made once, for no test in particular
            self.elsewhere += time.process_time() - started
        if fixturedef.scope == "module":  # made once, and used by all tests of the file
            self.by_fixtures.setdefault(request.node.path, set()).update(self.called)
        self.called |= before

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [
            item
            for item in items
            if not HEAVY & set(item.fixturenames) and not any(word in item.name for word in LEFT_OUT)
        ]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        tests, self.functions = self._baseline(session), functions_in_memory()
        gc.collect()
        gc.freeze()  # so that children copy as little of the parent's memory as possible
        for mutant, tree in self.mutants:
            reason = EQUIVALENT.get(mutant.key)
            if reason:
                outcome = replace(mutant, outcome="equivalent", by=reason)
            else:
                place, files = (str(ROOT / mutant.module), mutant.function), _tests_of(mutant.module)
                outcome = self._child(
                    mutant, tree, session, [i for i, called in tests if i.path in files and place in called]
                )
            self.outcomes.append(outcome)
            _say(
                f"{outcome.outcome:10} {mutant.module}:{mutant.line} {mutant.function}: {mutant.change}  [{outcome.by}]"
            )
        return True

    def _baseline(self, session: pytest.Session) -> list[tuple[pytest.Item, set[Place]]]:
        """Return the tests, the quickest first, each with the functions that it calls."""
        found = []
        for item, following in zip(session.items, [*session.items[1:], session.items[0]], strict=True):
            self.called = set()
            started = time.process_time() - self.elsewhere
            threading.setprofile(self._profile)
            sys.setprofile(self._profile)
            reports = runtestprotocol(item, log=False, nextitem=following)
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            bad = next((report for report in reports if report.failed), None)
            if bad:
                raise pytest.UsageError(f"{item.nodeid} fails as it is: {bad.longreprtext}")
            found.append((time.process_time() - self.elsewhere - started, item, self.called))
        quick = sorted((entry for entry in found if entry[0] < SLOW), key=lambda entry: entry[0])
        left_out = [f"{item.nodeid} ({seconds:.0f} s)" for seconds, item, _ in found if seconds >= SLOW]
        _say(f"{len(quick)} tests; too slow: {', '.join(left_out) or 'none'}")
        return [(item, called | self.by_fixtures.get(item.path, set())) for _, item, called in quick]

    def _child(self, mutant: Mutant, tree: ast.AST, session: pytest.Session, tests: list[pytest.Item]) -> Mutant:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            try:
                put_in_place(mutant, tree, self.functions)
                os.write(writing, (_first_failure(session, tests, self.seconds) or "").encode())
            except BaseException as error:
                os.write(writing, f"({type(error).__name__}: {error})".encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            by = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return replace(mutant, outcome="noticed", by=f"ended by {signal.Signals(os.WTERMSIG(status)).name}")
        if not tests:
            by = ""
        return replace(mutant, outcome="noticed" if by else "survived", by=by if tests else "no test calls it")


def _say(line: str) -> None:
    """Print to the terminal directly, because pytest captures output."""
    os.write(TERMINAL, f"{line}\n".encode())


def _first_failure(session: pytest.Session, tests: list[pytest.Item], seconds: int) -> str | None:
    session._setupstate.teardown_exact(SimpleNamespace(listchain=lambda: [session]))  # type: ignore[arg-type]
    for place, item in enumerate(tests):
        following = tests[place + 1] if place + 1 < len(tests) else None
        signal.alarm(seconds)
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
            return item.nodeid
    return None


def _read() -> list[dict[str, Any]]:
    return json.loads(OUTCOMES.read_text(encoding="utf-8")) if OUTCOMES.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*")
    parser.add_argument(
        "--survivors", action="store_true", help="test only mutants that survived last time, and new ones"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--seconds", type=int, default=90, help="seconds that a test may take")
    given = parser.parse_args()
    mutants = [entry for entry in all_mutants() if entry[0].module.startswith(tuple(given.modules or [""]))]
    known = {m.key: m for m in (Mutant(**entry) for entry in _read())}
    if given.survivors:
        mutants = [entry for entry in mutants if entry[0].key not in known or known[entry[0].key].outcome == "survived"]
    if given.list:
        for mutant, _ in mutants:
            print(f"{mutant.module}:{mutant.line} {mutant.function} ({mutant.kind}): {mutant.change}")
        print(len(mutants))
        return
    torch.set_num_threads(1)  # otherwise a forked child would wait forever for threads of its parent
    torch.set_num_threads = lambda number: None
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None)
    hypothesis.settings.load_profile("mutants")
    files = sorted({str(path) for mutant, _ in mutants for path in _tests_of(mutant.module)})
    study = Study(mutants, given.seconds)
    code = pytest.main(["-q", *files], plugins=[study])
    if len(study.outcomes) < len(mutants):
        print(f"ended early, after {len(study.outcomes)} of {len(mutants)} mutants; pytest's exit code is {code}")
    known.update((outcome.key, outcome) for outcome in study.outcomes)
    entries = [
        asdict(replace(known[mutant.key], line=mutant.line)) for mutant, _ in all_mutants() if mutant.key in known
    ]
    OUTCOMES.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    counts = Counter(entry["outcome"] for entry in entries)
    matter = counts["noticed"] + counts["survived"]
    share = counts["survived"] / matter
    print(f"{len(entries)} mutants: {dict(counts)}; {share:.1%} of those that change results survived")


if __name__ == "__main__":
    main()
