"""`matrix:`: what it expands to, which stages are repeated with it, and problems that point at the text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ManifestError
from pipeline.manifest import loads
from pipeline.manifest.model import dump
from tests.support.cli import retort
from tests.support.pipelines import TINY, execute, plan_of

QUALITY = "  quality: {kind: evaluate, student: student, samples: 40}\n"


def manifest(student: str = "", pairs: str = "") -> str:
    text = TINY.replace("    kind: distill\n", f"    kind: distill\n    matrix: {student}\n") if student else TINY
    text = text.replace("    kind: pairs\n", f"    kind: pairs\n    matrix: {pairs}\n") if pairs else text
    return text + QUALITY


def problems(text: str) -> str:
    with pytest.raises(ManifestError) as caught:
        loads(text, "m.yaml")
    return str(caught.value)


def test_a_stage_and_its_readers_are_made_once_for_every_combination():
    loaded = loads(manifest("{method.loss: [l1, mse], seed: [0, 1]}"), "m.yaml")
    places = [f"[loss={loss},seed={seed}]" for loss in ("l1", "mse") for seed in (0, 1)]
    assert loaded.order == ["teacher", "pairs", *(f"{kind}{at}" for at in places for kind in ("student", "quality"))]
    stages = loaded.manifest.stages
    assert stages["student[loss=mse,seed=1]"].method.loss.name == "mse"
    assert loaded.manifest.seed_of("student[loss=mse,seed=1]") == 1
    assert stages["quality[loss=mse,seed=1]"].student == "student[loss=mse,seed=1]"


SHARED = """
name: shared
stages:
  teacher: {kind: teacher, from: digits}
  a: {kind: pairs, teacher: teacher, prompts: digits, count: 8, sampler: &sampler {steps: 4}, MATRIX}
  b: {kind: pairs, teacher: teacher, prompts: digits, count: 8, sampler: *sampler}
"""


@pytest.mark.parametrize("override", ["sampler.steps=9", "matrix.sampler.steps=[9]"])
def test_a_value_set_in_one_stage_does_not_change_another_stage_with_the_same_anchor(override):
    stages = loads(SHARED.replace(", MATRIX", ""), "m.yaml", [f"stages.a.{override}"]).manifest.stages
    first = next(stage for name, stage in stages.items() if name.startswith("a"))
    assert first.sampler.steps == 9 and stages["b"].sampler.steps == 4


def test_a_matrix_does_not_change_another_stage_with_the_same_anchor():
    stages = loads(SHARED.replace("MATRIX", "matrix: {sampler.steps: [1, 2]}"), "m.yaml").manifest.stages
    steps = {name: stages[name].sampler.steps for name in ("a[steps=1]", "a[steps=2]", "b")}
    assert steps == {"a[steps=1]": 1, "a[steps=2]": 2, "b": 4}


def test_a_matrix_member_equals_the_stage_written_by_hand(tmp_path):
    by_hand = plan_of(TINY + QUALITY, tmp_path, ["stages.student.method.loss=mse", "stages.student.seed=1"])
    member = plan_of(manifest("{method.loss: [l1, mse], seed: [0, 1]}"), tmp_path)
    for name in ("student", "quality"):
        found = member[f"{name}[loss=mse,seed=1]"].artifact.fingerprint
        assert found == by_hand[name].artifact.fingerprint


def test_a_reader_of_a_matrix_with_a_matrix_of_its_own_has_both_in_its_name():
    text = manifest("{seed: [0, 1]}", pairs="{sampler.steps: [5, 6]}").replace(
        "samples: 40", "samples: 40, matrix: {samples: [40, 50]}"
    )
    loaded = loads(text, "m.yaml")
    qualities = [name for name in loaded.order if name.startswith("quality")]
    assert len(qualities) == 8 and "quality[steps=6,seed=1,samples=50]" in qualities
    quality = loaded.manifest.stages["quality[steps=6,seed=1,samples=50]"]
    student = loaded.manifest.stages[quality.student]
    assert student.pairs[0].pairs == "pairs[steps=6]" and student.seed == 1


def test_two_inputs_of_one_matrix_are_paired_and_not_crossed():
    mixed = "[{pairs: pairs, weight: 1.0}, {pairs: other, weight: 1.0}]"
    other = "  other: {kind: pairs, teacher: teacher, prompts: digits, count: 96, shard_size: 32, seed: 9}\n"
    teachers = TINY.replace("    kind: teacher\n", "    kind: teacher\n    matrix: {seed: [0, 1]}\n")
    loaded = loads(teachers.replace("pairs: pairs", f"pairs: {mixed}") + other, "m.yaml")
    assert [name for name in loaded.order if name.startswith("student")] == ["student[seed=0]", "student[seed=1]"]
    assert [s.pairs for s in loaded.manifest.stages["student[seed=1]"].pairs] == ["pairs[seed=1]", "other[seed=1]"]


def test_a_stage_can_read_a_single_member():
    text = TINY.replace("    kind: pairs\n", "    kind: pairs\n    matrix: {sampler.steps: [5, 6]}\n").replace(
        "    pairs: pairs\n", '    pairs: "pairs[steps=6]"\n'
    )
    loaded = loads(text, "m.yaml")
    assert loaded.manifest.stages["student"].pairs[0].pairs == "pairs[steps=6]"
    assert "there is no stage 'pairs[steps=7]'; did you mean" in problems(
        text.replace('"pairs[steps=6]"', '"pairs[steps=7]"')
    )


def test_nested_axes_and_whole_settings():
    loaded = loads(
        manifest("{training: {steps: [3, 4]}, method: [{name: knowledge_distillation, loss: mse}]}"), "m.yaml"
    )
    stage = loaded.manifest.stages["student[steps=3,method=knowledge_distillation]"]
    assert (stage.training.steps, stage.training.batch_size, stage.method.loss.name) == (3, 16, "mse")


def test_values_with_many_settings_can_be_named():
    axis = "{method: [{as: plain, value: knowledge_distillation}, {as: large, value: {name: knowledge_distillation, "
    axis += "loss: mse}}, knowledge_distillation]}"
    text = manifest(axis).replace("    method: {name: knowledge_distillation}\n", "")
    stages = loads(text, "m.yaml").manifest.stages
    assert [name for name in stages if "student" in name] == [
        f"student[method={name}]" for name in ("plain", "large", "knowledge_distillation")
    ]
    assert stages["student[method=large]"].method.loss.name == "mse"
    found = problems(text.replace("loss: mse", "loss: msee"))
    assert "did you mean 'mse'" in found and "loss: msee" in found  # at its place in the text


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ("{seed: [{as: a, value: 1}, {as: a, value: 2}]}", "a is given twice"),
        ("{seed: ['a', {as: a, value: 2}]}", "a is given twice"),
        ("{seed: [{as: a, valeu: 1}]}", "a named value is `{as: NAME, value: ...}`"),
        ("{seed: [{as: 'a b', value: 1}]}", "a name has at most 40 characters"),
        ("{seed: [{as: 7, value: 1}]}", "a name has at most 40 characters"),
    ],
)
def test_problems_of_named_values(axis, words):
    assert words in problems(manifest(axis))


def test_the_resolved_manifest_holds_the_members():
    manifest_ = loads(manifest("{training.learning_rate: [1e-3, 2.5e-4]}"), "m.yaml").manifest
    assert "student[learning_rate=0.00025]" in manifest_.stages
    again = loads(dump(manifest_), "again.yaml")
    assert again.manifest == manifest_


def test_resources_of_a_matrix_are_shared():
    text = (
        manifest(pairs="{sampler.steps: [5, 6]}") + "resources: {pairs: {workers: 2}, 'pairs[steps=6]': {workers: 3}}"
    )
    loaded = loads(text, "m.yaml")
    assert loaded.manifest.resources_of("pairs[steps=5]").workers == 2
    assert loaded.manifest.resources_of("pairs[steps=6]").workers == 3
    assert loaded.manifest.resources_of("teacher").workers == 1


def test_resources_of_a_chain_of_every_member_and_of_one():
    chain = TINY.replace("{name: knowledge_distillation}", "{name: progressive, start_steps: 4, end_steps: 1}")
    chain = chain.replace("    held_out", "    matrix: {seed: [0, 1]}\n    held_out")
    given = {"student": 2.0, "student/2": 3.0, "student[seed=1]": 4.0}
    lines = "".join(f"  '{name}': {{gpus_per_worker: {gpus}}}\n" for name, gpus in given.items())
    of = loads(f"{chain}resources:\n{lines}", "m.yaml").manifest.resources_of
    found = [of(f"student/{steps}[seed={seed}]").gpus_per_worker for steps in (2, 1) for seed in (0, 1)]
    assert found == [3.0, 4.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ("{method.loss: [l1, l3]}", "m.yaml:21:32: stages.student.matrix.method.loss.1.name: unknown name 'l3'"),
        ("{training.stepz: [1]}", "stages.student.matrix.training.stepz.0: unknown key; did you mean 'steps'?"),
        ("{seed: 3}", "stages.student.matrix.seed: a list of values is needed"),
        ("{seed: []}", "a list of values is needed"),
        ("{kind: [a]}", "kind cannot be varied"),
        ("{seed: [1, 1]}", "1 is given twice"),
        ("{}", "names no setting"),
        ("3", "names no setting"),
        ("{held_out.x: [1]}", "held_out is not a mapping here"),
        (
            f"{{seed: [{', '.join(map(str, range(50)))}], training.steps: [{', '.join(map(str, range(1, 51)))}]}}",
            "2500",
        ),
    ],
)
def test_problems_of_a_matrix_are_reported_at_their_line(matrix, words):
    message = problems(manifest(matrix))
    assert words in message and message.startswith("m.yaml:21:")


def test_a_problem_of_every_member_is_reported_once():
    message = problems(manifest("{seed: [0, 1, 2]}").replace("steps: 24", "stepz: 24"))
    assert message.count("unknown key") == 1 and "m.yaml:24:16: stages.student.training.stepz" in message
    message = problems(manifest("{seed: [0, 1, 2]}").replace("pairs: pairs", "pairs: pears"))
    assert message.count("there is no stage 'pears'") == 1


def test_a_problem_of_one_member_is_reported_at_its_value(tmp_path):
    with pytest.raises(ManifestError) as caught:
        plan_of(manifest("{held_out: [32, 96]}"), tmp_path)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith("test.yaml:21:29: ")
    assert "stages.student.matrix.held_out.1: 96 pairs held out of 96" in str(caught.value)


def test_commands_accept_members_and_whole_matrices(tmp_path):
    path, store = tmp_path / "m.yaml", tmp_path / "s"
    path.write_text(manifest("{method.loss: [l1, mse]}"))

    def names(*options):
        done = retort("plan", path, "--store", store, "--json", *options)
        return list(json.loads(done.stdout)) if done.returncode == 0 else done.stderr

    everything = ("--only", "teacher", "--only", "pairs")
    assert names(*everything, "--only", "student") == ["teacher", "pairs", "student[loss=l1]", "student[loss=mse]"]
    assert names(*everything, "--only", "student[loss=mse]")[2:] == ["student[loss=mse]"]
    assert names("--from", "teacher") == names()
    assert "needs pairs, which is not made yet (never made)" in names("--only", "student")
    assert "no stage 'studnt'; did you mean 'student'?" in names("--only", "studnt")


@given(
    st.dictionaries(
        st.sampled_from(["seed", "held_out", "method.loss", "training.steps", "training.learning_rate"]),
        st.lists(st.one_of(st.integers(-2, 40), st.sampled_from(["l1", "mse"]), st.floats(), st.none()), max_size=3),
        max_size=3,
    )
)
@settings(max_examples=100, deadline=None)
def test_any_matrix_is_valid_or_refused_with_its_line(matrix):
    try:
        loaded = loads(manifest(json.dumps(matrix)), "m.yaml")
    except ManifestError as error:
        assert all(problem.startswith("m.yaml:") for problem in error.problems)
        return
    count = 1
    for values in matrix.values():
        count *= len(values)
    assert sum(name.startswith("student[") for name in loaded.order) == count


def test_members_of_a_matrix_share_their_inputs(tmp_path, tiny):
    plan = execute(manifest("{training.steps: [2, 3]}"), tiny[0], name="matrix")
    assert plan["student[steps=2]"].artifact.folder.joinpath("artifact.json").exists()
    assert plan["quality[steps=3]"].artifact.inputs["student"] == plan["student[steps=3]"].artifact
    assert plan["pairs"].artifact == tiny[1]["pairs"].artifact


def test_overriding_a_varied_setting_is_an_error():
    text = manifest("{training.steps: [2, 3]}")
    with pytest.raises(ManifestError, match=r"is varied by the matrix; set stages.student.matrix.training.steps"):
        loads(text, "m.yaml", ["stages.student.training.steps=5"])
    loaded = loads(text, "m.yaml", ["stages.student.matrix.training.steps=[7]"])
    assert loaded.manifest.stages["student[steps=7]"].training.steps == 7


def test_a_member_of_a_resolved_manifest_can_be_overridden():
    resolved = dump(loads(manifest("{training.learning_rate: [0.5, 0.25]}"), "m.yaml").manifest)
    loaded = loads(resolved, "again.yaml", ["stages.student[learning_rate=0.5].training.steps=9"])
    assert loaded.manifest.stages["student[learning_rate=0.5]"].training.steps == 9


def test_taken_names_are_refused_and_long_names_shortened():
    taken = manifest("{seed: [0, 1]}") + "  student[seed=1]: {kind: teacher, from: digit_scenes}\n"
    assert "the matrix of student makes a stage of this name" in problems(taken)
    long = "{" + ", ".join(f"training.{name}: [0.123456789]" for name in
                           ("learning_rate", "weight_decay", "clip_norm", "ema_decay")) + "}"  # fmt: skip
    names = [name for name in loads(manifest(long), "m.yaml").order if "[" in name]
    assert len(set(names)) == 2 and all(len(name) < 160 for name in names)


def test_the_number_of_combinations_is_limited():
    steps = ", ".join(map(str, range(5, 205)))
    text = manifest(pairs=f"{{sampler.steps: [{steps}]}}")
    text += "  other: {kind: pairs, teacher: teacher, prompts: digits, count: 128, matrix: {seed: [%s]}}\n"
    text = (text % steps).replace("    pairs: pairs\n", "    pairs: [pairs, other]\n")
    assert "would be made more than 2000 times" in problems(text)
