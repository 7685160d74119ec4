"""Manifests: parsing, and errors that name their line."""

import textwrap
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ManifestError, UsageError
from pipeline.manifest import document as yaml_document
from pipeline.manifest import load, loads
from pipeline.manifest.document import parse
from pipeline.manifest.model import dump
from tests.support.cli import ROOT
from tests.support.mutations import check, mutations
from tests.support.pipelines import GAUSSIAN, TINY, plan_of

MANIFESTS = sorted((ROOT / "manifests").glob("*.yaml"))


def problems(text: str, *overrides: str) -> str:
    with pytest.raises(ManifestError) as caught:
        loads(textwrap.dedent(text), "m.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_resolved_manifest_reads_back_equal(path):
    manifest = load(path).manifest
    assert loads(dump(manifest), "again.yaml").manifest == manifest


def test_scalars_follow_the_core_schema():
    value = parse(
        "a: 1e-4\nb: no\nc: 1.5E+3\nd: 010\ne: 0x1F\nf: ~\ng: 2024-01-01\nh: '1'\ni: on\nj: true\nk: 1:30", "x"
    ).value
    assert value == {
        "a": 1e-4, "b": "no", "c": 1500.0, "d": 10, "e": 31, "f": None,
        "g": "2024-01-01", "h": "1", "i": "on", "j": True, "k": "1:30",
    }  # fmt: skip


def test_anchors_and_merge_keys_work():
    value = parse("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3", "x").value
    assert value["b"] == {"x": 1, "y": 3}
    value = parse("a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: *b", "x").value
    assert value["c"] == {"x": 1, "y": 3}


@given(
    st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.text(),
            st.sampled_from(["08", "1e5", "no", "0x1", "~", "<<", "1:30", "🙂"]),
        ),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
        max_leaves=8,
    )
)
@settings(deadline=None)
def test_dumped_values_are_read_back_equal(value):
    assert parse(yaml_document.dump({"a": value}), "x").value == {"a": value}


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("name: a\nname: b\nstages: {}", "m.yaml:2:1", "duplicate key 'name', first given on line 1"),
        ("name: [", "m.yaml:1:8", "not YAML"),
        ("- a\n- b", "m.yaml:1:1", "a manifest is a mapping"),
        ("a: &a [*a]", "m.yaml:1:4", "an alias contains itself"),
        ("? [x]\n: 1", "m.yaml:1:3", "a key must be a plain word"),
        ("name: !!python/object:os.system x", "m.yaml:1:7", "cannot be read"),
        (f"seed: {'9' * 60_000}", "m.yaml:1:7", "an integer of 60,000 characters; at most 100 are read"),
        (f"seed: 0x{'f' * 4000}", "m.yaml:1:7", "an integer of 4,002 characters; at most 100 are read"),
    ],
)
def test_errors_of_invalid_yaml_name_the_place(text, place, words):
    message = problems(text)
    assert message.startswith(place) and words in message


def six_levels_of_lists():
    return "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 7))])


def six_levels_of_merges():
    text = "{x: 1, y: 2}"
    for i in range(6):
        text = f"{{<<: [&m{i} {text}{f', *m{i}' * 9}]}}"
    return f"a: {text}"


@pytest.mark.parametrize(
    ("text", "place"), [(six_levels_of_lists(), "m.yaml:6:"), (six_levels_of_merges(), "m.yaml:1:")]
)
def test_nested_aliases_are_refused_before_they_fill_the_memory(text, place):
    tracemalloc.start()
    try:
        message = problems(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message.startswith(place) and "more than 100,000 values, with aliases expanded" in message
    assert peak < 5e6


def test_every_problem_is_reported_with_its_line_and_a_caret():
    message = problems(
        """\
        name: x y
        stages:
          teacher: {kind: teacher, gaussian: {std: -1.0, man: 2}}
          pairs:
            kind: pairs
            teacher: teacher
            prompts: digits
            count: "40"
            sampler: {name: dimm, steps: 20.5}
        """
    )
    assert "m.yaml:1:7: name: " in message
    assert "m.yaml:3:44: stages.teacher.gaussian.std: should be greater than 0, not -1.0" in message
    assert "m.yaml:3:50: stages.teacher.gaussian.man: unknown key; did you mean 'mean'?" in message
    assert "m.yaml:8:12: stages.pairs.count: should be a valid integer, not '40'" in message
    assert "m.yaml:9:21: stages.pairs.sampler.name: unknown value 'dimm'; did you mean 'ddim'?" in message
    assert "m.yaml:9:34: stages.pairs.sampler.steps" in message
    lines = message.splitlines()
    at = next(i for i, line in enumerate(lines) if "did you mean 'ddim'" in line)
    assert lines[at + 1][4:] == "    sampler: {name: dimm, steps: 20.5}"
    assert lines[at + 2].index("^") == lines[at + 1].index("dimm")


def test_unknown_kinds_methods_and_missing_fields():
    message = problems(
        "name: x\nstages:\n  a: {kind: teecher}\n"
        "  b: {kind: distill, pairs: a, method: {name: knowledge_distilation}}\n  c: {}"
    )
    assert "m.yaml:3:13: stages.a.kind: unknown kind 'teecher'; did you mean 'teacher'?" in message
    assert (
        "stages.b.method.name: unknown name 'knowledge_distilation'; did you mean 'knowledge_distillation'?" in message
    )
    assert "stages.b.training: missing" in message
    kinds = "distill, evaluate, latents, optimize, pairs, perceptual, probe, reference, teacher"
    assert f"stages.c.kind: missing (allowed: {kinds})" in message


def test_references_are_checked():
    assert "there is no stage 'techer'; did you mean 'teacher'?" in problems(
        GAUSSIAN.replace("teacher: teacher", "teacher: techer")
    )
    assert "needs a stage of kind teacher; 'pairs' is of kind pairs" in problems(
        GAUSSIAN.replace("teacher: teacher", "teacher: pairs")
    )
    message = problems(TINY, "stages.pairs.teacher=pairs")
    assert "--set stages.pairs.teacher=pairs" in message


def test_cycles_are_found():
    text = """\
    name: x
    stages:
      a: {kind: evaluate, student: b}
      b: {kind: distill, pairs: a, method: {name: knowledge_distillation}, training: {steps: 1}}
    """
    assert "a cycle: a -> b -> a" in problems(text)


def test_errors_of_an_overridden_merge_key_name_the_overriding_line():
    text = """name: x
stages:
  a: {kind: teacher, train: &train {dataset: {name: digits, size: 16}}}
  b: {kind: teacher, train: {<<: *train, dataset: {size: 16}}}
"""
    assert "m.yaml:4:51: stages.b.train.dataset.name: missing" in problems(text)


def test_a_teacher_has_exactly_one_source():
    assert "give exactly one of train, from, exact, structure, coop, bridge and gaussian, not 0" in problems(
        "name: x\nstages: {t: {kind: teacher}}"
    )


def test_resources_that_a_stage_cannot_use_are_refused():
    assert "resources.pears: there is no such stage; did you mean 'pairs'?" in problems(
        GAUSSIAN + "resources: {pears: {}}"
    )
    assert "a stage of kind teacher runs on one worker" in problems(GAUSSIAN + "resources: {teacher: {workers: 2}}")


def test_overrides():
    loaded = loads(GAUSSIAN, "m.yaml", ["stages.pairs.count=7", "stages.pairs.sampler.guidance_scale=1", "seed=3"])
    assert loaded.manifest.stages["pairs"].count == 7
    assert loaded.manifest.stages["pairs"].sampler.guidance_scale == 1.0
    assert loaded.manifest.seed == 3
    assert "expected PATH=VALUE" in problems(GAUSSIAN, "nonsense")
    loaded = loads(TINY, "m.yaml", ["resources.pairs.workers=2", "stages.student.execution.device=cpu"])
    assert (
        loaded.manifest.resources["pairs"].workers == 2 and loaded.manifest.stages["student"].execution.device == "cpu"
    )
    message = problems(GAUSSIAN, "stages.pairs.samplr.steps=3")
    assert "--set stages.pairs.samplr.steps=3: stages.pairs.samplr: unknown key; did you mean 'sampler'?" in message
    assert "there is no 'pears' in stages; did you mean 'pairs'? (allowed: teacher, pairs)" in problems(
        GAUSSIAN, "stages.pears.count=1"
    )
    assert "--set stages.pairs.count=x: stages.pairs.count: should be a valid integer" in problems(
        GAUSSIAN, "stages.pairs.count=x"
    )


def test_unreadable_files(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: grün".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        load(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "override",
    ["seed=!!int abc", "seed=" + "9" * 5000, "seed=!!timestamp x", "seed=!!float ''", "seed=!!float 1:30",
     "seed=!!bool x", "stages.pairs.matrix={1: [2]}", "store=[",
     "stages.pairs.matrix=&a {x: *a}", "stages.pairs.count=" + "[" * 3000, "stages.pairs.prompts=''"],
)  # fmt: skip
def test_invalid_overrides_are_refused(override):
    assert problems(GAUSSIAN, override)


def test_paths_that_do_not_exist_block_the_plan(tmp_path):
    for path in ("x" * 400 + ".txt", "~nobody-of-that-name/x.txt"):
        assert plan_of(GAUSSIAN, tmp_path, [f"stages.pairs.prompts={path}"])["pairs"].state == "blocked"


def test_a_misspelt_kind_below_an_anchor_is_reported_at_its_line():
    text = "name: x\nstages:\n  a: &a\n    knid: pairs\n  b:\n    <<: *a\n"
    assert "m.yaml:4:5: stages.a.kind: missing" in problems(text)


def test_a_null_that_is_not_the_default_is_kept():
    text = """
    name: x
    stages:
      t: {kind: teacher, train: {dataset: {name: parquet, path: d/, size: 16, caption: null, label: c}}}
    """
    manifest = loads(textwrap.dedent(text), "m.yaml").manifest
    assert "caption: null" in dump(manifest) and loads(dump(manifest), "again.yaml").manifest == manifest


def test_problems_are_listed_in_the_order_of_the_file():
    message = problems(GAUSSIAN.replace("name: gaussian", "nam: gaussian").replace("count: 40", "cuont: 40"))
    lines = [int(line.split(":")[1]) for line in message.splitlines() if line.startswith("m.yaml:")]
    assert lines == sorted(lines) and len(lines) >= 3


@given(mutation=mutations())
@settings(max_examples=500, deadline=None)
def test_a_mutated_manifest_is_planned_or_refused_with_the_line(mutation, tmp_path_factory):
    check(mutation, tmp_path_factory.getbasetemp())
