"""Teachers that are a base with a LoRA fused into its weights."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from pipeline.errors import ManifestError, StageFailed
from stages.base import StageError
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.student import Student
from stages.teacher.lora import fuse
from tests.support.cli import BLOCKER, ROOT, retort
from tests.support.networks import pixel_unet, stable_diffusion_layout, stable_diffusion_xl_layout
from tests.support.pipelines import execute, plan_of

TEACHER = (
    "name: lora\nstages:\n  teacher: {{kind: teacher, from: {base}, lora: {{{lora}}}, execution: {{threads: 1}}}}\n"
)
PAIRS = """
  pairs:
    kind: pairs
    teacher: teacher
    prompts: {path: PROMPTS}
    count: 8
    shard_size: 8
    storage_dtype: float32
    sampler: {steps: 4, guidance_scale: 3.0}
    execution: {threads: 1}
"""
STUDENT = """
  student:
    kind: distill
    pairs: pairs
    method: knowledge_distillation
    training: {steps: 1, batch_size: 2}
    held_out: 2
    execution: {threads: 1}
"""
ATTENTION = ["to_q", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv_in"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return stable_diffusion_layout(tmp_path_factory.mktemp("base") / "sd")


def with_lora(network, targets, alpha=6.0, dtype=torch.float32):
    """Add a LoRA of rank 3, far from zero, to some layers of the network. Return its weights, in peft's names."""
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=alpha, target_modules=targets), network)
    for name, value in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.1)
            value.data = value.data.to(dtype).float()
    return {name: value.detach().to(dtype) for name, value in get_peft_model_state_dict(network).items()}


def peft_file(folder, base, text=False, dtype=torch.float32, targets=ATTENTION + CONVOLUTIONS, convert=dict):
    """A file as diffusers writes it, with alpha in its metadata, and a pipeline with the LoRA that it holds, not fused.
    `convert` gives the tensors other names."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    networks = {"unet": with_lora(pipeline.unet, targets, dtype=dtype)}
    if text:
        networks["text_encoder"] = with_lora(pipeline.text_encoder, ["q_proj", "fc1"], dtype=dtype)
    layers = {f"{name}_lora_layers": convert(state) for name, state in networks.items()}
    config = {f"{name}_lora_adapter_metadata": getattr(pipeline, name).peft_config["default"] for name in networks}
    about = {name: one.to_dict() for name, one in config.items()}
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **about)
    return folder / "pytorch_lora_weights.safetensors", pipeline


def kohya_file(folder, base, dtype=torch.float32):
    """A file in the format of kohya's sd-scripts (underscores for dots, alpha as a tensor), and a pipeline with the
    LoRA."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    written = {}
    for prefix, network, targets, alpha in (
        ("lora_unet_", pipeline.unet, [*ATTENTION, "ff.net.2", "conv1"], {"conv1": 0.5}),
        ("lora_te_text_model_", pipeline.text_encoder, ["q_proj", "fc2"], {}),
    ):
        for name, value in with_lora(network, targets, alpha=1.5, dtype=dtype).items():
            place, _, matrix = name.removesuffix(".weight").rpartition(".")
            own = alpha.get(place.rpartition(".")[2], 1.5)
            network.get_submodule(place).scaling["default"] = own / 3
            layer = prefix + place.removeprefix("text_model.").replace(".", "_")
            written[f"{layer}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = value.contiguous()
            written[f"{layer}.alpha"] = torch.tensor(own)
    save_file(written, folder / "kohya.safetensors")
    return folder / "kohya.safetensors", pipeline


def text_of(base, lora, more=""):
    return TEACHER.format(base=base, lora=lora) + more


def adopted(base, lora, store):
    return execute(text_of(base, lora), store)["teacher"].artifact


def scaled(pipeline, scale):
    """The pipeline with a LoRA, which adds the LoRA's output times `scale` to that of each layer."""
    for network in (pipeline.unet, pipeline.text_encoder):
        for module in network.modules():
            if isinstance(module, BaseTunerLayer):
                module.scale_layer(scale)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FILES = {
    "peft": peft_file,
    "text": partial(peft_file, text=True),
    "scripts": partial(peft_file, targets=ATTENTION, text=True, convert=convert_state_dict_to_diffusers),
    "half": partial(peft_file, dtype=torch.float16),
    "kohya": kohya_file,
    "kohya_half": partial(kohya_file, dtype=torch.float16),
}
Z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def prediction(folder):
    """What Retort's teacher predicts at Z, and its text states."""
    teacher = StableDiffusion(folder)
    condition = teacher.encode_prompts(["a", "b"])
    with torch.no_grad():
        output = teacher.predict(teacher.network, Z, teacher.on_device(teacher.schedule.at(500)), condition)
    return output, condition.tensors["text"]


@pytest.mark.parametrize("layout", FILES)
def test_the_sealed_teacher_predicts_like_plain_diffusers_with_the_lora(base, tmp_path, layout):
    file, pipeline = FILES[layout](tmp_path, base)
    sealed = adopted(base, f"weights: {file}, scale: 0.8", tmp_path / "store")
    assert {path.name for path in sealed.folder.iterdir()} == {
        "artifact.json", "model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler",
    }  # fmt: skip
    weights = [path.name for name in ("unet", "text_encoder") for path in (sealed.folder / name).glob("*.safetensors")]
    assert weights == ["diffusion_pytorch_model.safetensors", "model.safetensors"]
    (found, text), (_, text_without) = prediction(sealed.folder), prediction(base)
    plain = scaled(pipeline, 0.8)
    with torch.no_grad():
        states = plain.encode_prompt(["a", "b"], "cpu", 1, False)[0]
        expected = plain.unet(Z, 500, states).sample
        without = StableDiffusion(base).network(Z, 500, states).sample
    torch.testing.assert_close(text, states, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - without).abs().max() > 0.05
    assert (text - text_without).abs().max() > 0.05 or layout in ("peft", "half")


@pytest.mark.parametrize("layout", ["peft", "half"])
def test_the_sealed_teacher_predicts_like_load_lora_weights(base, tmp_path, layout):
    file, _ = FILES[layout](tmp_path, base)
    sealed = adopted(base, f"weights: {file}, scale: 0.8", tmp_path / "store")
    plain = StableDiffusionPipeline.from_pretrained(base)
    plain.load_lora_weights(file.parent, weight_name=file.name, adapter_name="it")
    plain.set_adapters("it", 0.8)
    found, states = prediction(sealed.folder)
    with torch.no_grad():
        torch.testing.assert_close(found, plain.unet.float()(Z, 500, states).sample, rtol=0, atol=1e-5)


def test_a_lora_in_half_precision_is_fused_in_float32(base, tmp_path):
    file, _ = peft_file(tmp_path, base, dtype=torch.float16)
    sealed = adopted(base, f"weights: {file}", tmp_path / "store")
    lora, before, after = (
        load_file(path)
        for path in (
            file,
            base / "unet/diffusion_pytorch_model.safetensors",
            sealed.folder / "unet/diffusion_pytorch_model.safetensors",
        )
    )
    assert before.keys() == after.keys()
    layer = next(name for name in lora if name.endswith("to_q.lora_A.weight")).removesuffix(".lora_A.weight")
    weight = f"{layer.removeprefix('unet.')}.weight"
    up, down = (lora[f"{layer}.lora_{one}.weight"].float() for one in ("B", "A"))
    torch.testing.assert_close(after[weight], before[weight] + 6 / 3 * up @ down, rtol=0, atol=1e-7)


def test_pairs_and_card_describe_the_base_with_the_lora(base, tmp_path):
    file, pipeline = peft_file(tmp_path, base, text=True)
    (tmp_path / "prompts.txt").write_text("a\nb\nab\nba\n" * 2)
    more = (PAIRS + STUDENT).replace("PROMPTS", str(tmp_path / "prompts.txt"))
    made = execute(text_of(base, f"weights: {file}, scale: 0.5", more), tmp_path / "store")
    batch = PairReader(read_list(made["pairs"].artifact.folder)).batch(np.arange(8))
    plain = scaled(pipeline, 0.5)
    ending = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config, **ending)
    noise = torch.from_numpy(batch.noise)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    latents = plain(list(batch.prompts), latents=noise, **settings).images
    torch.testing.assert_close(torch.from_numpy(batch.latent), latents, rtol=0, atol=1e-4)
    card = (made["student"].artifact.folder / "README.md").read_text()
    assert f"with the LoRA {file} at scale 0.5 (licence: not stated) solved by" in card
    assert f"({base}; teacher/{made['teacher'].artifact.fingerprint}; licence: not stated)" in card


def test_the_card_of_a_lora_student_loads_both_loras(base, tmp_path):
    """Onto the base: the teacher's LoRA at its scale, then the student's."""
    file, _ = peft_file(tmp_path, base)
    (tmp_path / "prompts.txt").write_text("a b\nb\n")
    training = "training: {steps: 2, batch_size: 2, learning_rate: 1e-2, lora: {rank: 2, alpha: 4}}"
    student = STUDENT.replace("training: {steps: 1, batch_size: 2}", training)
    student = student.replace(
        "method: knowledge_distillation", "method: {name: knowledge_distillation, prediction: epsilon}"
    )
    pairs = PAIRS.replace("PROMPTS", str(tmp_path / "prompts.txt"))
    plan = execute(text_of(base, f"weights: {file}, scale: 0.5", pairs + student), tmp_path / "store")
    folder = plan["student"].artifact.folder
    lines = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert "fuse_lora(lora_scale=0.5)" in lines
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    namespace = {"noise": noise}
    lines = lines.replace("THIS FOLDER", str(folder)).replace("THE TEACHER", str(base))
    exec(lines.replace('"a prompt"', '"a b", latents=noise, output_type="latent"'), namespace)
    teacher = StableDiffusion(plan["teacher"].artifact.folder)
    with torch.no_grad():
        ours = Student.load(folder, teacher)(noise, teacher.encode_prompts(["a b"]))
    torch.testing.assert_close(namespace["image"][None], ours, atol=1e-3, rtol=1e-4)


def test_the_record_names_base_and_lora(base, tmp_path):
    folder = tmp_path / "repository"
    peft_file(folder, base)
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n")
    about = adopted(base, f"weights: {folder}, scale: -1", tmp_path / "store").record["metrics"]
    lora = {"source": f"{folder}/pytorch_lora_weights.safetensors", "revision": None, "scale": -1.0}
    assert about == {"source": str(base), "revision": None, "licence": None, "lora": lora | {"licence": "openrail++"}}


def test_scale_and_content_decide_the_fingerprint_but_not_the_name(base, tmp_path):
    def fingerprint(lora):
        return plan_of(text_of(base, lora), tmp_path / "store")["teacher"].artifact.fingerprint

    file, _ = peft_file(tmp_path, base)
    other = shutil.copyfile(file, tmp_path / "other.safetensors")
    plain = plan_of(text_of(base, "").replace("lora: {}, ", ""), tmp_path / "store")["teacher"].artifact.fingerprint
    assert len({plain, *(fingerprint(f"weights: {file}, scale: {scale}") for scale in (1.0, 0.8))}) == 3
    assert fingerprint(f"weights: {file}") == fingerprint(f"weights: {other}")
    save_file({name: 2 * value for name, value in load_file(file).items()}, other)
    assert fingerprint(f"weights: {file}") != fingerprint(f"weights: {other}")
    commit = f"weights: owner/name, revision: {'a' * 40}"
    planned = plan_of(text_of(base, commit), tmp_path / "store")["teacher"]
    assert planned.state == "run" and planned.contents["lora.weights"] == "hub:" + "a" * 40


def test_a_retry_does_not_fuse_the_lora_twice(base, tmp_path):
    file, _ = peft_file(tmp_path, base)
    folder = shutil.copytree(base, tmp_path / "copy")
    bytes_of = []
    for _ in range(2):
        list(fuse(folder, file, 1.0, tmp_path / "fused", 1))
        bytes_of.append((tmp_path / "fused/unet/diffusion_pytorch_model.safetensors").read_bytes())
    assert bytes_of[0] == bytes_of[1]


def test_a_resumed_attempt_seals_the_same_bytes_after_a_kill_between_two_networks(base, tmp_path, monkeypatch):
    file, _ = peft_file(tmp_path, base, text=True)
    text, moved, replace = text_of(base, f"weights: {file}"), [], os.replace

    def killed(source, target):
        if "fused" in Path(source).parts:
            moved.append(source)
            if len(moved) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        execute(text, tmp_path / "killed")
    left = next((tmp_path / "killed" / "work").rglob("unet/diffusion_pytorch_model.safetensors"))
    assert len(moved) == 2 and left.exists()
    again = execute(text, tmp_path / "killed")["teacher"].artifact
    assert again.sha256 == execute(text, tmp_path / "other")["teacher"].artifact.sha256


def test_planning_imports_no_torch(base, tmp_path, write_manifest):
    manifest = write_manifest(text_of(base, f"weights: {peft_file(tmp_path, base)[0]}"))
    arguments = ["plan", manifest, "--store", tmp_path / "store"]
    done = subprocess.run([sys.executable, "-c", BLOCKER, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "teacher" in done.stdout, done.stderr


SDXL = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k":
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "lora_unet_output_blocks_0_1_proj_in": "unet.up_blocks.0.attentions.0.proj_in",
    "lora_unet_input_blocks_1_0_in_layers_2": "unet.down_blocks.0.resnets.0.conv1",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj":
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
}  # fmt: skip
"""Layers of kohya's LoRAs of SDXL, which have the names of Stability's own code, and where they are in diffusers."""


def weights_of(folder, component):
    """The weights by names without `text_model.`, because only some releases of transformers write this prefix."""
    (file,) = folder.joinpath(component).glob("*.safetensors")
    return {f"{component}.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}


def test_an_sdxl_lora_in_kohyas_format_changes_the_right_layers(tmp_path):
    folder, written, change = stable_diffusion_xl_layout(tmp_path / "sdxl"), {}, {}
    components = ("unet", "text_encoder", "text_encoder_2")
    before = {name: value for one in components for name, value in weights_of(folder, one).items()}
    for rank, (layer, there) in enumerate(SDXL.items(), start=2):
        weight = f"{there}.weight".replace("text_model.", "")
        outward, inward, *kernel = before[weight].shape
        down, up = torch.randn(rank, inward, *kernel), torch.randn(outward, rank, *[1] * len(kernel))
        written |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        written[f"{layer}.alpha"] = torch.tensor(1.0 + rank)
        change[weight] = 0.5 * (1 + rank) / rank * (up.flatten(1) @ down.flatten(1)).view(before[weight].shape)
    save_file(written, tmp_path / "it.safetensors")
    list(fuse(folder, tmp_path / "it.safetensors", 0.5, tmp_path / "fused", 1))
    after = {name: value for one in components for name, value in weights_of(tmp_path / "fused", one).items()}
    assert after.keys() == before.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, before[name] + change.get(name, 0), rtol=0, atol=1e-5)


# --- What is refused --------------------------------------------------------------------------------------


def changed(base, folder, change):
    """A LoRA file with other tensors: `change` makes them of those of a valid file."""
    file, _ = peft_file(folder, base)
    save_file(change(load_file(file)), folder / "my_style.safetensors")
    return folder / "my_style.safetensors"


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def wider(tensors):
    """Cross attention of a base with other text states, such as SDXL's."""
    return {n: torch.randn(3, 2048) if "attn2.to_v.lora_A" in n else v for n, v in tensors.items()}


UNREAD = "has no LoRA format that diffusers reads; it holds "


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (wider, r"another base: its layer unet.*attn2.to_v has weights of \d+ x 2048, the teacher's has \d+ x 32$"),
        (renamed("mid_block", "middle"), r"another base: \d of its layers are not in the teacher, such as unet.middle"),
        (renamed("unet.", "transformer."), "another base: none of its layers is in the teacher, such as transformer."),
        (renamed("unet.", "base."), "another base: none of its layers is in the teacher, such as base.conv_in"),
        (renamed("unet.", ""), f"{UNREAD}conv_in.lora_A.weight and the like"),
        (renamed("unet.", "text_encoder_2."), "another base: none of its layers is in the teacher, such as text_enc"),
        (lambda tensors: {"conv_in.weight": torch.zeros(2)}, "is not a LoRA; it holds conv_in.weight and the like$"),
        (lambda tensors: {}, "is not a LoRA; it holds nothing"),
        (lambda tensors: tensors | {"unet.conv_in.weight": torch.zeros(2)}, f"{UNREAD}unet.conv_in"),
        (lambda tensors: tensors | {"unet.conv_in.dora_scale": torch.zeros(2)}, "is a DoRA of kohya's format, which"),
        (lambda tensors: {"lora_unet_mid_block.hada_w1_a": torch.zeros(2)}, f"{UNREAD}lora_unet_mid_block.hada_w1_a"),
        (lambda tensors: tensors | {"lora_unet_conv_in.alpha": torch.ones(())}, UNREAD),
        (renamed("lora_B", "lora_C"), UNREAD),
    ],
)
def test_loras_that_do_not_fit_are_refused_in_one_sentence(base, tmp_path, change, words):
    file = changed(base, tmp_path, change)
    with pytest.raises(StageError, match=f"my_style.safetensors .*{words}") as caught:
        list(fuse(base, file, 1.0, tmp_path / "fused", 1))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "fused").exists()


def test_a_lora_of_another_base_stops_the_stage(base, tmp_path, write_manifest):
    manifest = write_manifest(text_of(base, f"weights: {changed(base, tmp_path, wider)}"))
    done = retort("submit", manifest, "--store", tmp_path / "store", "--engine", "inline")
    assert done.returncode == 1
    assert "my_style.safetensors is a LoRA for another base: its layer unet." in done.stderr


def test_a_family_without_lora_is_refused(base, tmp_path):
    DDPMPipeline(unet=pixel_unet(), scheduler=DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(StageFailed, match="a DDPMPipeline loads no LoRA weights"):
        adopted(tmp_path / "ddpm", f"weights: {peft_file(tmp_path, base)[0]}", tmp_path / "store")


def test_a_file_of_another_format_is_refused(base, tmp_path):
    (tmp_path / "it.safetensors").write_bytes(b"no tensors")
    with pytest.raises(StageFailed, match=r"it.safetensors is not a safetensors file; Retort reads LoRA weights in no"):
        adopted(base, f"weights: {tmp_path / 'it.safetensors'}", tmp_path / "store")
    with pytest.raises(ManifestError, match=r"pytorch_lora_weights.bin may hold a pickle, .* give a safetensors file"):
        plan_of(text_of(base, "weights: x/pytorch_lora_weights.bin"), tmp_path / "store")


def test_a_missing_file_blocks_the_plan(base, tmp_path):
    def why(lora):
        planned = plan_of(text_of(base, f"weights: {lora}"), tmp_path / "store")["teacher"]
        assert planned.state == "blocked"
        return planned.why

    assert why(tmp_path / "no.safetensors") == f"{tmp_path}/no.safetensors does not exist"
    for relative in ("no.safetensors", "loras/no.safetensors"):
        assert why(relative).startswith(f"'{relative}' is neither a file or folder that exists nor a hub id")


def test_a_folder_needs_exactly_one_file_or_the_setting_file(base, tmp_path):
    folder = tmp_path / "loras"
    first, _ = peft_file(folder, base)
    (folder / "notes.txt").write_text("not read")
    lora = f"weights: {folder}"
    expected = adopted(base, lora, tmp_path / "store").record["files"]
    shutil.copyfile(first, folder / "other.safetensors")
    with pytest.raises(ManifestError, match=r"holds other.safetensors, pytorch_lora.*; set `file` to one"):
        plan_of(text_of(base, lora), tmp_path / "store")
    with pytest.raises(ManifestError, match=r"holds no third.safetensors; it holds other.safetensors, pytor"):
        plan_of(text_of(base, f"{lora}, file: third.safetensors"), tmp_path / "store")
    chosen = adopted(base, f"{lora}, file: other.safetensors", tmp_path / "store").record
    assert chosen["files"] == expected
    assert chosen["metrics"]["lora"]["source"] == f"{folder}/other.safetensors"
    with pytest.raises(ManifestError, match="is a file; leave `file` out"):
        plan_of(text_of(base, f"weights: {first}, file: other.safetensors"), tmp_path / "store")
    planned = plan_of(text_of(base, f"{lora}, file: other.safetensors"), tmp_path / "store")["teacher"]
    (folder / "sub").mkdir()
    shutil.copyfile(first, folder / "sub" / "unrelated.safetensors")
    again = plan_of(text_of(base, f"{lora}, file: other.safetensors"), tmp_path / "store")["teacher"]
    assert again.artifact.fingerprint == planned.artifact.fingerprint
    for file in ("../other.safetensors", "/other.safetensors", "sub/unrelated.safetensors", "other.bin"):
        with pytest.raises(ManifestError, match="give the name of a safetensors file at the top of the folder"):
            plan_of(text_of(base, f"{lora}, file: {file}"), tmp_path / "store")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ManifestError, match="loras holds no safetensors file; give the folder of a LoRA"):
        plan_of(text_of(base, lora), tmp_path / "store")


def test_a_lora_needs_a_base(tmp_path, write_manifest):
    manifest = write_manifest("name: a\nstages: {t: {kind: teacher, train: {dataset: digits}, lora: {weights: x}}}")
    done = retort("plan", manifest, "--store", tmp_path / "store")
    assert done.returncode == 2 and "lora needs `from`" in done.stderr


def test_the_settings_of_a_lora_survive_a_round_trip(base, tmp_path):
    file, _ = peft_file(tmp_path, base)
    settings = adopted(base, f"weights: {file}, scale: 0.8", tmp_path / "store").record["settings"]["lora"]
    assert json.loads(json.dumps(settings)) == {"weights": str(file), "scale": 0.8}
