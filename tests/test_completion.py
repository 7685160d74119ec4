"""What a shell offers, asked as the shell's own script asks; and the scripts."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, retort


def offered(words, cwd=ROOT, **environment):
    """What bash would offer for the last of `words`."""
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
    assert {"explain", "export"} & set(offered("retort exp")) == {"explain"}
    assert offered("retort explain know") == ["knowledge_distillation"]
    assert {"teacher", "digits", "sampler"} <= set(offered("retort explain "))
    assert offered("retort init --method k") == ["knowledge_distillation"]
    assert offered("retort completion ") == ["bash", "zsh", "fish"]


CALLBACKS = """
import click, sys
from pipeline.completion import complete_runs, complete_runs_or_paths, complete_stages
from pipeline.commands.console import store_option

@click.group()
def cli(): pass

@cli.command()
@click.argument("run_name", required=False, shell_complete=complete_runs)
@click.argument("stage", required=False, shell_complete=complete_stages)
@store_option
def resume(run_name, stage, store): pass

@cli.command()
@click.argument("target", shell_complete=complete_runs_or_paths)
@store_option
def stats(target, store): pass

@cli.command()
@click.option("--only", shell_complete=complete_stages)
@store_option
def only(only, store): pass

cli.main(prog_name="retort")
print({"torch", "ray", "pydantic", "yaml"} & set(sys.modules))
"""


def asked_of_callbacks(words, cwd, **environment):
    asked = {"_RETORT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", CALLBACKS],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **asked, **environment},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "", done.stderr
    return done.stdout.split()


def test_runs_and_stages_are_offered_from_every_place_a_store_may_be_named(store, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    runs = ["plain,broken", "plain,first", "plain,second"]
    assert asked_of_callbacks("retort resume ", tmp_path) == runs
    assert asked_of_callbacks("retort resume ", elsewhere) == []
    assert asked_of_callbacks("retort resume f", elsewhere, RETORT_STORE=str(store)) == ["plain,first"]
    assert asked_of_callbacks(f"retort resume --store {store} ", elsewhere) == runs
    assert asked_of_callbacks("retort resume first ", tmp_path) == ["plain,teacher", "plain,pairs"]
    assert asked_of_callbacks("retort resume first t", tmp_path) == ["plain,teacher"]
    assert asked_of_callbacks("retort resume broken ", tmp_path) == []
    assert asked_of_callbacks("retort resume none ", tmp_path) == []
    assert asked_of_callbacks("retort stats s", tmp_path) == ["plain,second", "file,s"]
    assert asked_of_callbacks("retort only --only ", tmp_path) == []
    for name in ("broken", "second"):
        shutil.rmtree(store / "runs" / name)
    assert asked_of_callbacks("retort only --only ", tmp_path) == ["plain,teacher", "plain,pairs"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_ask_retort(shell):
    done = retort("completion", shell)
    assert done.returncode == 0
    assert f"_RETORT_COMPLETE={shell}_complete" in done.stdout
    assert "retort completion bash" in retort("completion", "--help").stdout


def test_bash_takes_its_script():
    script = retort("completion", "bash").stdout
    done = subprocess.run(["bash", "-c", script + "\ncomplete -p retort"], capture_output=True, text=True)
    assert done.returncode == 0 and "_retort_completion retort" in done.stdout
