"""Shell completion: the words that are offered, and the shell scripts."""

import subprocess

import pytest

from tests.support.cli import ROOT, retort


def offered(words, cwd=ROOT, **environment):
    """Return what bash would offer for the last of `words`."""
    asked = {"_RETORT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = retort(cwd=cwd, **asked, **environment)
    assert done.stderr == "", done.stderr
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.fixture
def store(tmp_path):
    for name, plan in (("first", '{"teacher": {}, "pairs": {}}'), ("second", '{"student": {}}'), ("broken", "{")):
        folder = tmp_path / "retort-store" / "runs" / name
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(plan)
    (tmp_path / "retort-store" / "runs" / "not_yet").mkdir()
    return tmp_path / "retort-store"


def test_commands_and_names_are_offered():
    assert {"explain", "export"} <= set(offered("retort exp"))
    assert offered("retort explain know") == ["knowledge_distillation"]
    assert {"teacher", "digits", "sampler"} <= set(offered("retort explain "))
    assert offered("retort init --method k") == ["knowledge_distillation"]
    assert offered("retort import-weights sd") == ["sd15", "sd21", "sdxl", "sd3", "sd"]
    assert offered("retort completion ") == ["bash", "zsh", "fish"]


def test_runs_and_stages_are_offered_wherever_the_store_is_named(store, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    runs = ["broken", "first", "second"]
    assert offered("retort status ", tmp_path)[:3] == runs
    assert offered("retort status ", elsewhere) == [""]  # files: the shell completes them itself
    assert offered("retort resume f", elsewhere, RETORT_STORE=str(store)) == ["first", "f"]
    assert offered(f"retort resume --store {store} ", elsewhere)[:3] == runs
    assert offered("retort resume first ", tmp_path) == ["teacher", "pairs"]
    assert offered("retort logs first t", tmp_path) == ["teacher"]
    assert offered("retort stats s", tmp_path) == ["second", "s"]
    assert offered("retort resume first --only ", tmp_path) == ["teacher", "pairs", "student"]
    assert offered("retort compare first s", tmp_path) == ["second", "s"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_ask_retort(shell):
    done = retort("completion", shell)
    assert done.returncode == 0
    assert f"_RETORT_COMPLETE={shell}_complete" in done.stdout
    assert "retort completion bash" in retort("completion", "--help").stdout


def test_bash_accepts_its_script():
    script = retort("completion", "bash").stdout
    done = subprocess.run(["bash", "-c", script + "\ncomplete -p retort"], capture_output=True, text=True)
    assert done.returncode == 0 and "_retort_completion retort" in done.stdout
