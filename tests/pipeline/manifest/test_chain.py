"""Chains: their links, chains in matrices, and how other stages name them."""

import pytest

from pipeline.errors import ManifestError
from pipeline.manifest import loads
from pipeline.manifest.model import dump
from tests.support.pipelines import PROGRESSIVE, TINY, plan_of


def test_a_chain_has_a_stage_for_each_halving():
    loaded = loads(TINY + PROGRESSIVE, "m.yaml")
    names = ["fewer/4", "fewer/2", "fewer/1"]
    assert [n for n in loaded.order if n.startswith("fewer")] == names
    stages = loaded.manifest.stages
    assert [(stages[n].method.start_steps, stages[n].method.end_steps) for n in names] == [(8, 4), (4, 2), (2, 1)]
    assert [stages[n].start_from for n in names] == [None, "fewer/4", "fewer/2"]
    assert [stages[n].training.steps for n in names] == [4, 4, 6]
    assert [stages[f"quality/{n}"].student for n in (4, 2, 1)] == names
    assert loads(dump(loaded.manifest), "again.yaml").manifest == loaded.manifest


def test_each_member_of_a_matrix_has_its_own_chain():
    seeds = TINY + PROGRESSIVE.replace("    latents: latents\n", "    latents: latents\n    matrix: {seed: [0, 1]}\n")
    names = [n for n in loads(seeds, "m.yaml").order if n.startswith("quality")]
    assert sorted(names) == sorted(f"quality/{n}[seed={seed}]" for n in (4, 2, 1) for seed in (0, 1))
    teachers = (TINY + PROGRESSIVE).replace("    kind: teacher\n", "    kind: teacher\n    matrix: {seed: [0, 1]}\n")
    stages = loads(teachers, "m.yaml").manifest.stages
    assert stages["fewer/2[seed=1]"].start_from == "fewer/4[seed=1]"
    assert stages["quality/2[seed=1]"].student == "fewer/2[seed=1]"
    alone = (TINY + PROGRESSIVE).replace("student: fewer", "student: fewer/2")
    assert loads(alone, "m.yaml").manifest.stages["quality"].student == "fewer/2"


@pytest.mark.parametrize("varied", ["fewer", "teacher"])
def test_a_stage_can_read_one_link_of_all_members_or_all_links_of_one_member(varied):
    matrix = "    matrix: {seed: [0, 1]}\n"
    line = {"fewer": "    latents: latents\n", "teacher": "    kind: teacher\n"}[varied]
    text = (TINY + PROGRESSIVE).replace(line, line + matrix)
    text = text.replace("pairs: pairs\n    samples", "samples").replace("latents: latents\n", "pairs: pairs\n")

    def read(reference):
        stages = loads(text.replace("student: fewer", f"student: '{reference}'"), "m.yaml").manifest.stages
        return {n: s.student for n, s in stages.items() if n.startswith("quality")}

    assert read("fewer[seed=1]") == {f"quality/{n}": f"fewer/{n}[seed=1]" for n in (4, 2, 1)}
    link = "" if varied == "fewer" else "/2"  # the name then means several stages
    assert read("fewer/2") == {f"quality{link}[seed={seed}]": f"fewer/2[seed={seed}]" for seed in (0, 1)}
    assert read("fewer/2[seed=1]") == {"quality": "fewer/2[seed=1]"}
    assert len(read("fewer")) == 6
    for wrong in ("fewer/3", "fewer[seed=2]"):
        with pytest.raises(ManifestError, match="there is no stage"):
            read(wrong)


def test_a_link_does_not_depend_on_the_end_of_its_chain(tmp_path):
    """A chain of one link has a link label, too."""
    longer = plan_of(TINY + PROGRESSIVE, tmp_path)
    shorter = plan_of(
        (TINY + PROGRESSIVE).replace("end_steps: 1", "end_steps: 2").replace("{1: 6}", "{2: 4}"), tmp_path
    )
    by_hand = (TINY + PROGRESSIVE.split("  quality")[0]).replace(
        "start_steps: 8, end_steps: 1", "start_steps: 8, end_steps: 4"
    )
    by_hand = plan_of(by_hand.replace(", training_steps: {1: 6}", ""), tmp_path)
    assert longer["fewer/2"].artifact.fingerprint == shorter["fewer/2"].artifact.fingerprint
    assert by_hand["fewer/4"].artifact.fingerprint == longer["fewer/4"].artifact.fingerprint


def test_a_chain_can_start_from_another_chain(tmp_path):
    more = PROGRESSIVE.split("  quality")[0].replace("fewer:", "further:").replace("start_steps: 8", "start_steps: 4")
    more = more.split("{threads: 1}}\n")[1].replace(
        "    latents: latents", "    start_from: fewer/4\n    latents: latents"
    )
    plan = plan_of(TINY + PROGRESSIVE + more, tmp_path)
    assert plan["further/1"].artifact.fingerprint == plan["fewer/1"].artifact.fingerprint
    with pytest.raises(ManifestError, match="the student in start_from takes 2"):
        plan_of(TINY + PROGRESSIVE + more.replace("fewer/4", "fewer/2"), tmp_path)
