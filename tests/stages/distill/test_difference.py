"""Students exported as a LoRA: what it keeps, what it loses, and that plain diffusers samples the same as Retort."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stages.base import StageError
from stages.data.supply import PairSupply
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.distill.difference import _errors, _measured, write_lora
from stages.distill.train import _on_held_out
from stages.networks import build
from stages.networks.low_rank import add, differences, factors, share_kept
from stages.networks.student import FILE, Student, export

FULL = 1 << 20


def supply_of(artifact):
    return PairSupply([artifact.inputs["pairs.0.pairs"].folder], [None], artifact.stage.held_out, 1, 0, 2.0)


@pytest.fixture
def student(tiny):
    return tiny[1]["student"].artifact


@pytest.fixture
def remake(student, teacher, tmp_path):
    """A function that makes a copy of the sealed student, with another form or network."""

    def remade(network=None, **form):
        loaded = Student.load(student.folder, teacher)
        form = Form.model_validate({**loaded.form.model_dump(), **form})
        folder = tmp_path / "student"
        changed = Student(teacher, network or loaded.network, Grid.of(form, teacher.schedule), form)
        export(changed, folder, "")
        return replace(student, folder=folder)

    return remade


@pytest.fixture
def weights_only(remake, teacher):
    """A student of two steps that differs from its teacher in the weights of linear layers and convolutions only."""
    network = teacher.student_network()
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.weight.add_(0.05 * torch.randn_like(layer.weight))
    return remake(network, steps=2)


@pytest.mark.parametrize("shape", [(6, 9), (6, 4, 3, 3)])
def test_factors_are_the_best_approximation_of_their_rank(shape):
    torch.manual_seed(0)
    difference = torch.randn(shape)
    values = torch.linalg.svdvals(difference.flatten(1))
    for rank in (1, 3, 6):
        found = factors(difference, rank)
        lost = (difference - found.product).square().sum()
        torch.testing.assert_close(lost, values[rank:].square().sum(), atol=1e-5, rtol=1e-4)
    layers = [torch.nn.Conv2d(4, 6, 3, padding=1, bias=False) if len(shape) == 4 else torch.nn.Linear(9, 6, bias=False)]
    layers += [
        torch.nn.Conv2d(4, 3, 3, padding=1, bias=False) if len(shape) == 4 else torch.nn.Linear(9, 3, bias=False)
    ]
    layers += [torch.nn.Conv2d(3, 6, 1, bias=False) if len(shape) == 4 else torch.nn.Linear(3, 6, bias=False)]
    three = factors(difference, 3)
    with torch.no_grad():
        for layer, weight in zip(layers, (three.product, three.a, three.b), strict=True):
            layer.weight.copy_(weight)
        x = torch.randn(2, *shape[1:2], *((5, 5) if len(shape) == 4 else ()))
        torch.testing.assert_close(layers[2](layers[1](x)), layers[0](x))


def test_a_higher_rank_keeps_more_and_full_rank_keeps_all(weights_only, teacher):
    loaded = Student.load(weights_only.folder, teacher)
    shares, errors = [], []
    for rank in (1, 4, 16, FULL):
        lora = differences(loaded.network, teacher.network, rank)
        assert max(layer.rank for layer in lora.values()) <= rank
        shares.append(share_kept(loaded.network, teacher.network, lora))
        restored = Student(teacher, add(teacher.student_network(), lora), loaded.grid, loaded.form)
        errors.append(_errors(loaded, restored, teacher, supply_of(weights_only))[2])
    assert shares == sorted(shares) and 0 < shares[0] < 0.7 and shares[-1] == pytest.approx(1, abs=1e-5)
    assert (
        errors[0] > 1e-4 and errors[-1] < 1e-10
    )  # for ranks in between, a smaller weight difference may still give a larger error


def test_biases_and_norms_are_lost_and_counted(remake, teacher):
    network = teacher.student_network()
    with torch.no_grad():
        network.conv_in.weight.add_(0.1)
        network.conv_in.bias.add_(1.0)
        network.conv_norm_out.weight.add_(1.0)
    lora = differences(network, teacher.network, 1)
    assert list(lora) == ["conv_in"] and lora["conv_in"].rank == 1
    weights, others = 0.01 * network.conv_in.weight.numel(), network.conv_in.bias.numel() + 16
    assert share_kept(network, teacher.network, lora) == pytest.approx(weights / (weights + others), rel=1e-4)


@contextlib.contextmanager
def warnings_of_diffusers():
    """All log messages of diffusers and peft."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    diffusers.utils.logging.add_handler(handler)
    try:
        yield said
    finally:
        diffusers.utils.logging.remove_handler(handler)


def card_code(folder, taught_by):
    """Run the code in the card of a LoRA, and return its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    code = code.replace("THE TEACHER", str(taught_by)).replace("THIS FOLDER", str(folder))
    found: dict[str, object] = {}
    with warnings_of_diffusers() as said:
        exec(code.replace('"a prompt"', '"a red handwritten seven"'), found)
    assert "unexpected keys" not in said.getvalue() and "missing keys" not in said.getvalue(), said.getvalue()
    return found


@pytest.mark.parametrize("rank", [3, FULL])
def test_plain_diffusers_draws_the_same_images_as_retort(weights_only, tiny, teacher, tmp_path, rank):
    """At full rank, the LoRA has a different rank for each shape of layer."""
    write_lora(weights_only, rank, tmp_path / "lora")
    found = card_code(tmp_path / "lora", tiny[1]["teacher"].artifact.folder)
    pipeline = found["pipeline"]
    stored = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    loaded = {name for name, _ in pipeline.unet.named_parameters() if ".lora_A." in name}
    assert 2 * len(loaded) == len(stored)
    ranks = {name.removesuffix(".lora_A.weight"): len(value) for name, value in stored.items() if "lora_A" in name}
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    for value, pattern in (("unet.r", "unet.rank_pattern"), ("unet.lora_alpha", "unet.alpha_pattern")):
        given = {name: settings[pattern].get(name.removeprefix("unet."), settings[value]) for name in ranks}
        assert given == ranks, "alpha is the rank, so that nothing is scaled"
    assert stored["unet.conv_in.lora_A.weight"].ndim == stored["unet.conv_in.lora_B.weight"].ndim == 4

    ours = Student.load(weights_only.folder, teacher)
    lora = differences(ours.network, teacher.network, rank)
    restored = Student(teacher, add(teacher.student_network(), lora), ours.grid, ours.form)
    noise, prompts = torch.randn(2, *teacher.latent_shape), ["a red handwritten seven", "a blue handwritten one"]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(prompts, latents=noise, guidance_scale=1.0, num_inference_steps=2, output_type="latent").images
    with torch.no_grad():
        torch.testing.assert_close(images, restored(noise, teacher.encode_prompts(prompts)), atol=2e-4, rtol=1e-3)
        apart = (images - ours(noise, teacher.encode_prompts(prompts))).abs().max()
    assert (apart < 1e-3) == (rank == FULL)


def test_the_card_says_what_the_lora_loses(student, teacher, tmp_path):
    said = write_lora(student, 2, tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert said in card and "rank 2" in card and student.fingerprint in card and "num_inference_steps=1" in card
    (share,) = re.findall(r"keeps ([\d.]+)%", said)
    assert 0 < float(share) < 100
    supply = supply_of(student)
    mse = _on_held_out(Student.load(student.folder, teacher), teacher, supply, student.inputs["pairs.0.pairs"])
    assert f"on 32 held-out pairs: {mse['held_out_mse']:.4g} for the student" in said
    assert mse["held_out_mse"] == pytest.approx(student.record["metrics"]["held_out_mse"], rel=1e-4)
    name = "scheduler/scheduler_config.json"
    assert (tmp_path / "lora" / name).read_text() == (student.folder / name).read_text()


def test_errors_are_not_measured_if_the_student_should_not_reproduce_its_pairs(student, remake, teacher):
    loaded, other = Student.load(student.folder, teacher), remake(guidance_scale=5.0)
    assert "not meant to reproduce its pairs" in _measured(other, Student.load(other.folder, teacher), teacher, {})
    assert "the student has no pairs" in _measured(replace(student, inputs={}), loaded, teacher, {})


def test_students_that_cannot_be_a_lora_of_their_teacher_are_refused(tiny, teacher, remake, tmp_path):
    wide = remake(build.unet(8, 64, (24, 48)))
    with pytest.raises(StageError, match=r"other sizes than the teacher's \(`start:`\)"):
        write_lora(wide, 4, tmp_path / "lora")
    shutil.rmtree(wide.folder)
    w = remake(teacher.with_guidance_embedding(teacher.student_network()), w_range=(0.0, 4.0), guidance_scale=None)
    with pytest.raises(StageError, match="takes w as an input"):
        write_lora(w, 4, tmp_path / "lora")
    about = json.loads((w.folder / FILE).read_text())
    (w.folder / FILE).write_text(json.dumps({**about, "w_range": None, "prediction": "both"}))
    with pytest.raises(StageError, match="predicts both"):
        write_lora(w, 4, tmp_path / "lora")
    (w.folder / FILE).write_text(json.dumps({**about, "w_range": None, "steps": 4, "sampler": "stochastic"}))
    with pytest.raises(StageError, match="plain diffusers cannot sample this student: diffusers has no N-step stoch"):
        write_lora(w, 4, tmp_path / "lora")
    (w.folder / FILE).write_text(json.dumps({**about, "w_range": None}))
    with pytest.raises(StageError, match="there is no difference"):
        write_lora(w, 4, tmp_path / "lora")
    with pytest.raises(StageError, match="rank of at least 1"):
        write_lora(w, 0, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
