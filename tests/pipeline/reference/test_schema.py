"""`retort schema`: editors accept the same manifests as Retort."""

import copy
import json

import jsonschema
import pytest

from pipeline.errors import ManifestError
from pipeline.manifest import document, dump, load, loads
from pipeline.reference.schema import FILE, LINE, schema, text
from tests.support.cli import ROOT, retort
from tests.support.pipelines import GAUSSIAN, PROGRESSIVE, TINY

MANIFESTS = sorted((ROOT / "manifests").glob("*.yaml"))
WRONG = {
    "sed": 1,
    "seed": -1,
    "stages.pairs.cuont": 3,
    "stages.pairs.count": "many",
    "stages.pairs.sampler.steps": 0,
    "stages.pairs.sampler.name": "euler",
    "stages.student.kind": "distil",
    "stages.student.methd": "x",
    "stages.student.method": "knowledge",
    "stages.student.method.name": "knowledge",
    "stages.student.method.los": "l1",
    "stages.student.method.loss": "l7",
    "stages.student.method.loss.name": "l7",
    "stages.student.training.learning_rate": "fast",
    "stages.teacher.train.dataset.size": 17,
    "stages.teacher.train.dataset.name": "mnist",
    "stages.teacher.train.vae.chanels": [8, 16],
}


@pytest.fixture(scope="module")
def validator():
    found = schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def read(text):
    return document.parse(text, "test.yaml").value


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_shipped_manifests_are_valid_and_name_the_schema(path, validator):
    written = path.read_text()
    assert written.startswith(LINE)
    validator.validate(read(written))
    try:
        resolved = dump(load(path).manifest)  # with every default written out
    except ManifestError as error:
        assert "lack" in str(error) or "does not exist" in str(error)  # a placeholder of the user's files
    else:
        validator.validate(read(resolved))


@pytest.mark.parametrize("text", [GAUSSIAN, TINY, TINY + PROGRESSIVE], ids=["gaussian", "tiny", "chain"])
def test_other_manifests_are_valid(text, validator):
    validator.validate(read(text))


@pytest.mark.parametrize("path", WRONG)
def test_the_schema_refuses_what_retort_refuses_at_the_same_key(path, validator):
    values = copy.deepcopy(read(TINY))
    values["stages"]["student"]["method"]["loss"] = {"name": "l1"}
    values["stages"]["teacher"]["train"]["dataset"] = {"name": "digits"}
    validator.validate(values)
    *inside, last = path.split(".")
    part = values
    for key in inside:
        part = part[key]
    part[last] = WRONG[path]
    with pytest.raises(ManifestError):
        loads(json.dumps(values), "test.yaml")
    [error] = validator.iter_errors(values)
    found = ".".join(map(str, error.absolute_path))
    assert found == path or (found == ".".join(inside) and last in error.message)


def test_a_matrix_can_give_a_required_setting(validator):
    values = read(GAUSSIAN)
    del values["stages"]["pairs"]["count"]
    assert not validator.is_valid(values)
    values["stages"]["pairs"]["matrix"] = {"count": [16, 32]}
    validator.validate(values)


def test_the_shipped_schema_is_current(tmp_path):
    """`retort init` writes the same schema."""
    there = (ROOT / "manifests" / FILE).read_text()
    assert there == text() == retort("schema").stdout, f"run: retort schema > manifests/{FILE}"
    retort("init", "m.yaml", cwd=tmp_path)
    assert (tmp_path / FILE).read_text() == there and (tmp_path / "m.yaml").read_text().startswith(LINE)
