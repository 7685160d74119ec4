"""LoRA students: what they share with their teacher, what they train, what is checkpointed, and what is exported."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from pipeline.errors import ManifestError, StageFailed
from stages.base import StageError
from stages.diffusion.form import Form
from stages.methods.base import Materials, StudentTraining
from stages.methods.consistency.config import ConsistencyConfig
from stages.methods.diffusion2gan.config import Diffusion2GANConfig
from stages.networks.lora import FILE, IN_FULL, LoraSettings
from stages.networks.student import Student, export, whole_network
from stages.training import TrainingExecution
from stages.training.loop import _Run
from tests.support.pipelines import TINY, execute, plan_of

V = Form(prediction="v_prediction")
RANK_3 = LoraSettings(rank=3, alpha=5)
PROMPTS = ["a red handwritten seven", "a blue handwritten two"]


def shaken(student):
    """Give the trainable weights random values: LoRA weights change nothing at first."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in student.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    return student.eval()


def noise(teacher, count=2):
    return torch.randn(count, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))


def places(module):
    """Where the parameters of a module lie in memory."""
    return {parameter.data_ptr() for parameter in module.parameters()}


def elements(parameters):
    return sum(parameter.numel() for parameter in parameters)


def trained(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@torch.no_grad()
def sampled(student, w=2.0):
    return student(noise(student.adapter), student.encode(PROMPTS), torch.full((2,), w))


@pytest.mark.parametrize("form", [V, Form(prediction="v_prediction", steps=2, w_range=(0.0, 4.0))], ids=["plain", "w"])
def test_a_new_student_equals_its_teacher_and_shares_its_weights(form, teacher):
    student = Student.from_teacher(teacher, form, lora=RANK_3)
    torch.testing.assert_close(sampled(student), sampled(Student.from_teacher(teacher, form)), rtol=0, atol=0)
    assert places(teacher.network) <= places(student.network)
    own = [name for name, value in student.named_parameters() if value.requires_grad]
    assert all(".lora_" in name or name == "network.time_embedding.cond_proj.weight" for name in own)
    assert any("cond_proj" in name for name in own) == bool(form.w_range)
    assert elements(student.parameters()) == elements(teacher.network.parameters()) + elements(trained(student))


def method(config, teacher, lora):
    training = StudentTraining(steps=4, batch_size=2, ema_decay=0.5, lora=lora)
    return config.create(Materials(teacher, training))


@pytest.mark.parametrize("config", [
    ConsistencyConfig(steps=2, solver_steps=4, guidance_scale=2.0), Diffusion2GANConfig(loss={"name": "mse"})
], ids=["consistency", "diffusion2gan"])  # fmt: skip
def test_all_networks_of_a_method_share_the_base(config, teacher):
    """The networks are the student, its average, and a target or discriminator. Only trained weights are in memory more
    than once."""
    made = method(config, teacher, RANK_3)
    run = _Run(made, TrainingExecution(device="cpu"))
    modules = [*(player.module for player in made.players.values()), *run.averages.values()]
    assert len(modules) == 3
    own = sum(elements(trained(module)) for module in modules) + elements(run.trainable["student"].values())
    base = elements(teacher.network.parameters())
    everywhere = {value.data_ptr(): value.numel() for module in modules for value in module.parameters()}
    assert sum(everywhere.values()) <= base + own


def test_checkpoints_hold_only_trained_weights(teacher, tmp_path):
    """Weights, average, and the two moments and the step count of AdamW, for each trainable tensor, in float32."""
    made = method(ConsistencyConfig(steps=2, solver_steps=4, guidance_scale=2.0), teacher, RANK_3)
    run = _Run(made, TrainingExecution(device="cpu"))
    latent = noise(teacher)
    run.run_turn(made.turns(0)[0], lambda _: {"latents": {"latent": latent, "prompts": PROMPTS}}, 0, 0)
    run.save(tmp_path, 1)
    tensors = load_file(tmp_path / "step-00000001" / "tensors.safetensors")
    sizes = [value.numel() for value in run.trainable["student"].values()]
    assert sum(4 * t.numel() for t in tensors.values()) == 4 * (
        5 * sum(sizes) + len(sizes)
    )  # the target's weights, too
    assert sum(sizes) < elements(teacher.network.parameters()) / 4


def test_a_student_with_all_weights_is_averaged_and_checkpointed_whole(teacher, tmp_path):
    made = method(ConsistencyConfig(steps=2, solver_steps=4, guidance_scale=2.0), teacher, None)
    run = _Run(made, TrainingExecution(device="cpu"))
    run.save(tmp_path, 1)
    tensors = load_file(tmp_path / "step-00000001" / "tensors.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 3 * elements(teacher.network.parameters())
    assert not places(run.averages["student"]) & places(made.student)


@pytest.mark.parametrize("merged", [False, True])
def test_the_exported_student_equals_the_trained_one(merged, teacher, tmp_path):
    lora = LoraSettings(rank=3, alpha=5, merged=merged)
    student = shaken(Student.from_teacher(teacher, V, lora=lora))
    export(student, tmp_path, "a card")
    wanted = sampled(student)
    assert (wanted - sampled(Student.from_teacher(teacher, V))).abs().max() > 0.01
    torch.testing.assert_close(sampled(Student.load(tmp_path, teacher)), wanted, rtol=1e-5, atol=1e-5)
    again = Student.from_student(tmp_path, teacher, V, lora=lora)
    torch.testing.assert_close(sampled(again), wanted, rtol=1e-5, atol=1e-5)
    assert elements(trained(again)) == elements(trained(student))
    whole = Student.from_student(tmp_path, teacher, V)
    torch.testing.assert_close(sampled(whole), wanted, rtol=1e-4, atol=1e-4)
    assert len(trained(whole)) == len(list(teacher.network.parameters())) and not (tmp_path / IN_FULL).exists()
    assert (tmp_path / "unet").exists() == merged
    pipeline = DiffusionPipeline.from_pretrained(tmp_path if merged else teacher.folder)
    if not merged:
        pipeline.load_lora_weights(tmp_path, weight_name=FILE)
        pipeline.scheduler = type(pipeline.scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        PROMPTS, latents=noise(teacher), num_inference_steps=1, guidance_scale=1.0, output_type="latent"
    ).images
    torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-4)


def test_a_guidance_embedding_is_trained_in_full_and_saved_separately(teacher, tmp_path):
    form = Form(prediction="v_prediction", steps=2, w_range=(0.0, 4.0))
    student = shaken(Student.from_teacher(teacher, form, lora=RANK_3))
    export(student, tmp_path, "a card")
    assert list(load_file(tmp_path / IN_FULL)) == ["time_embedding.cond_proj.weight"]
    assert all(".lora_" in name and name.startswith("unet.") for name in load_file(tmp_path / FILE))
    loaded = Student.load(tmp_path, teacher)
    for w in (0.5, 3.0):
        torch.testing.assert_close(sampled(loaded, w), sampled(student, w), rtol=1e-5, atol=1e-5)
    student.network = whole_network(tmp_path, teacher)
    torch.testing.assert_close(sampled(student, 3.0), sampled(loaded, 3.0), rtol=1e-4, atol=1e-4)


def test_targets_are_matched_with_the_ends_of_layer_names(teacher):
    student = Student.from_teacher(teacher, V, lora=LoraSettings(rank=2, targets=["attn2.to_k"]))
    assert all("attn2.to_k.lora_" in name for name, p in student.named_parameters() if p.requires_grad)
    with pytest.raises(StageError) as refused:
        Student.from_teacher(teacher, V, lora=LoraSettings(targets=["to_k", "to_x", "o_k"]))
    assert "no linear or convolution layer of the UNet2DConditionModel is called to_x, o_k; it has conv, conv1" in str(
        refused.value
    )
    assert "to_out.0" in str(refused.value)
    takes_w = Form(prediction="v_prediction", steps=2, w_range=(0.0, 4.0))
    with pytest.raises(StageError, match="is called cond_proj"):  # trained in full, because the teacher lacks it
        Student.from_teacher(teacher, takes_w, lora=LoraSettings(targets=["to_k", "cond_proj"]))


def test_a_guided_student_holds_the_base_once(teacher):
    """Its guidance embedding is added without another copy of the network or of the teacher's weights."""
    form = Form(prediction="v_prediction", steps=2, w_range=(0.0, 4.0))
    student = Student.from_teacher(teacher, form, lora=RANK_3)
    own = {value.data_ptr() for value in trained(student)}
    assert places(student.network) == places(teacher.network) | own and not places(teacher.network) & own
    full = Student.from_teacher(teacher, form)
    assert not places(full.network) & places(teacher.network) and all(p.requires_grad for p in full.parameters())


LORA = TINY.replace("steps: 24, batch_size: 16}", "steps: 24, batch_size: 16, learning_rate: 5e-3, lora: {rank: 4}}")


@pytest.fixture(scope="module")
def learned(tiny):
    return execute(LORA, tiny[0], name="lora")


def test_a_lora_student_learns(learned, tiny, teacher):
    metrics = learned["student"].artifact.record["metrics"]
    folder = tiny[1]["pairs"].artifact.folder
    unlearned = execute(LORA.replace("5e-3", "1e-9"), tiny[0], name="still")["student"].artifact.record["metrics"]
    assert metrics["held_out_mse"] < 0.9 * unlearned["held_out_mse"], folder
    about = json.loads((learned["student"].artifact.folder / "student.json").read_text())
    assert about["lora"] == {"rank": 4, "alpha": None, "targets": None, "merged": False}
    assert not (learned["student"].artifact.folder / "unet").exists()
    assert "LoRA weights of rank 4" in (learned["student"].artifact.folder / "README.md").read_text()


def test_training_can_start_from_a_lora_student(learned, tiny):
    further = "training: {steps: 2, batch_size: 16, learning_rate: 1e-9, ema_decay: 0.0"
    go_on = f"""
  further:
    kind: distill
    pairs: pairs
    start_from: student
    method: {{name: knowledge_distillation}}
    {further}, lora: {{rank: 4}}}}
    held_out: 32
  whole:
    kind: distill
    pairs: pairs
    start_from: student
    method: {{name: knowledge_distillation}}
    {further}}}
    held_out: 32
"""
    plan = execute(LORA + go_on, tiny[0], name="lora")
    before = learned["student"].artifact.record["metrics"]["held_out_mse"]
    for name in ("further", "whole"):
        assert plan[name].artifact.record["metrics"]["held_out_mse"] == pytest.approx(before, rel=1e-4)
    assert (plan["whole"].artifact.folder / "unet").exists()
    plan_of(LORA + go_on.replace("lora: {rank: 4}", "lora: {rank: 4, alpha: 4, merged: true}"), tiny[0])
    for other in ("lora: {rank: 8}", "lora: {rank: 4, alpha: 8}", "lora: {rank: 4, targets: [to_k]}"):
        with pytest.raises(ManifestError, match="start_from has another rank, alpha or targets; set the same in both"):
            plan_of(LORA + go_on.replace("lora: {rank: 4}", other), tiny[0])
    with pytest.raises(ManifestError, match=r"start_from has no LoRA weights; leave training\.lora out"):
        plan_of(TINY + go_on, tiny[0])


@pytest.mark.parametrize(("change", "words"), [
    (("knowledge_distillation}", "knowledge_distillation, prediction: epsilon}"),
     "keeps its teacher's prediction type, v_prediction, but the method has prediction: epsilon"),
    (("held_out: 32", "held_out: 32\n    start: {pipeline: digit_scenes}"),
     "training.lora adds to the teacher's weights: leave start out"),
    (("rank: 4", "rank: 0"), "greater than or equal to 1"),
    (("rank: 4", "targets: []"), "at least 1 item"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused_when_planning(change, words, tmp_path):
    with pytest.raises(ManifestError, match=words):
        plan_of(LORA.replace(*change), tmp_path)


def test_a_target_that_matches_no_layer_stops_the_stage(tiny):
    with pytest.raises(StageFailed, match=r"lora\.targets: no linear or convolution layer .* called to_x"):
        execute(LORA.replace("rank: 4", "rank: 4, targets: [to_x]"), tiny[0], name="refused")


def test_gradient_checkpointing_does_not_change_a_lora_student(learned, tiny, tmp_path):
    text = LORA.replace("checkpoint_every: 7", "checkpoint_every: 7, gradient_checkpointing: true")
    pairs = tiny[1]["pairs"].artifact.folder
    text = "name: t\nstages:\n" + text[text.index("  student:") :].replace("pairs: pairs", f"pairs: {pairs}")
    again = execute(text, tmp_path)["student"].artifact.folder
    ours, theirs = (load_file(folder / FILE) for folder in (again, learned["student"].artifact.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
