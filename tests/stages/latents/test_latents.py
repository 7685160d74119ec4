"""Latents of image sets: they equal those of the teacher's VAE, even after interruptions."""

import itertools
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from pipeline.errors import ManifestError, StageFailed
from pipeline.store import Store
from stages.base import SCRATCH, Execution, StageError
from stages.data.files import sha256_of
from stages.data.images.config import Digits, ImageFolder
from stages.data.images.load import batches, load
from stages.data.latents import read_latents
from stages.distill.recipe import Recipe
from stages.distill.train import distill
from stages.latents.encoding import encode_images
from stages.latents.stage import REACHED
from stages.methods.base import StudentTraining
from stages.methods.consistency.config import ConsistencyConfig
from stages.training import StudentExecution
from tests.support.networks import pixel_unet
from tests.support.pipelines import GAUSSIAN, TINY, execute, plan_of

LATENTS = TINY + "  latents: {kind: latents, teacher: teacher, images: digits, execution: {threads: 1}}\n"
TEACHER = "name: own\nstages:\n  teacher: {kind: teacher, from: %s}\n"
FILES = ("training.npy", "training.parquet", "held_out.npy", "held_out.parquet")


def finish(steps):
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def hashes(folder):
    return {name: sha256_of(folder / name) for name in FILES}


@pytest.fixture(scope="module")
def latents(tiny):
    return execute(LATENTS, tiny[0], only=["latents"])["latents"].artifact


@pytest.fixture
def folder(tmp_path):
    """90 images of 32 pixels in two colours, which are their classes. Every tenth is held out. The images are grainy,
    because a VAE's group norms amplify the rounding of uniform images."""
    images = tmp_path / "images"
    images.mkdir()
    names = [["red", "blue"][i // 3 % 2] for i in range(90)]
    tints, grain = {"red": [1, 0, 0], "blue": [0, 0, 1]}, np.random.default_rng(0).integers(256, size=(90, 32, 32, 1))
    for i, name in enumerate(names):
        Image.fromarray((grain[i] * tints[name]).astype(np.uint8)).save(images / f"{i:02d}.png")
    lines = [f"{i:02d}.png,a {name} wall,{name}" for i, name in enumerate(names)]
    (images / "metadata.csv").write_text("\n".join(["file_name,text,colour", *lines]))
    return ImageFolder(path=str(images), size=32, label="colour")


def own(teacher, images, **settings):
    """A manifest that encodes a folder of images with an adopted teacher."""
    image_set = json.dumps({"name": "image_folder", **images.model_dump(include={"path", "size", "label"}), **settings})
    execution = "execution: {threads: 1}"
    return TEACHER % teacher + f"  latents: {{kind: latents, teacher: teacher, images: {image_set}, {execution}}}\n"


@pytest.mark.parametrize("held_out", [False, True])
def test_latents_equal_the_teachers_encoding_of_the_images(latents, teacher, held_out):
    images, found = load(Digits(), held_out=held_out), read_latents(latents.folder, held_out)
    assert found.latents.shape == (len(images), 4, 8, 8) and found.latents.dtype == np.float16
    assert isinstance(found.latents, np.memmap)
    some = np.arange(0, len(images), 61)
    pixels = torch.from_numpy(images.pixels(some))
    batch = found.batch(some)
    assert batch.dtype == np.float32 and type(batch) is np.ndarray
    np.testing.assert_allclose(batch, teacher.encode(pixels).numpy(), rtol=2**-10, atol=1e-4)
    expected = teacher.decode(teacher.encode(pixels))
    torch.testing.assert_close(teacher.decode(torch.from_numpy(batch)), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("held_out", [False, True])
def test_captions_classes_and_origins_belong_to_their_images(latents, held_out):
    images, found = load(Digits(), held_out=held_out), read_latents(latents.folder, held_out)
    assert len(found) == len(images) and found.captions == images.captions
    assert found.labels.keys() == images.labels.keys()
    for name, values in images.labels.items():
        assert found.labels[name].dtype == np.int64 and (found.labels[name] == values).all()
    assert (found.origins == images.origins).all()
    table = pq.read_table(latents.folder / FILES[2 * held_out + 1])
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "caption": "string", "origin": "int64", "colour": "int64", "digit": "int64",
    }  # fmt: skip


def test_the_record_has_statistics_of_the_latents(latents):
    found = np.concatenate([read_latents(latents.folder, held_out).latents for held_out in (False, True)])
    metrics = latents.record["metrics"]
    assert metrics["counts"] == {"training": 8_622, "held_out": 2_160}
    assert metrics["latent_shape"] == [4, 8, 8] and metrics["classes"] == {"colour": 6, "digit": 10}
    assert metrics["latent_mean"] == pytest.approx(found.mean(dtype=np.float64), abs=1e-9)
    assert metrics["latent_std"] == pytest.approx(found.astype(np.float64).std(), abs=1e-9)
    assert latents.record["device"] in ("cpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    assert sorted(latents.record["files"]) == sorted(FILES)


def steps(teacher, output, images, dtype="float16"):
    record = output / SCRATCH / REACHED
    return encode_images(teacher.folder, images, dtype, Execution(device="cpu"), output, record, 1)


def test_killed_anywhere_and_resumed_it_gives_the_same_bytes(teacher, folder, tmp_path, monkeypatch):
    """The test drops the generator where a kill would end it: none of its code runs after that. The 81 training images
    are three batches of up to 30, and 9 images are held out. Every second batch is recorded, and the last one of a
    split."""
    monkeypatch.setattr("stages.latents.encoding.BATCH", 30)
    monkeypatch.setattr("stages.latents.encoding.RECORD_EVERY", 2)
    whole = tmp_path / "whole"
    figures = finish(steps(teacher, whole, folder))
    for stop, reached in {2: 0, 3: 60, 4: 81}.items():
        output = tmp_path / f"stop{stop}"
        assert [p.done for p in itertools.islice(steps(teacher, output, folder), stop)] == [0, 30, 60, 81][:stop]
        again = steps(teacher, output, folder)
        assert next(again).done == reached and finish(again) == figures
        assert hashes(output) == hashes(whole)


def test_the_plan_of_a_killed_run_says_what_is_encoded(teacher, folder, tmp_path):
    text, store = own(teacher.folder, folder), tmp_path / "store"
    plan = plan_of(text, store)["latents"]
    work = Store(store).work(plan.artifact)
    list(itertools.islice(steps(teacher, work, folder), 3))
    plan = plan_of(text, store)["latents"]
    assert (plan.state, plan.why) == ("resume", "never made; 81 of 90 images are encoded")
    made = execute(text, store)["latents"].artifact
    assert made.record["metrics"]["counts"] == {"training": 81, "held_out": 9}
    assert plan_of(text, store)["latents"].state == "reuse" and not (made.folder / SCRATCH).exists()
    again = execute(text, tmp_path / "other")["latents"].artifact
    assert hashes(made.folder) == hashes(again.folder)
    assert made.record["metrics"] == again.record["metrics"]


def test_images_of_the_user_and_of_another_size_are_encoded(teacher, folder, tmp_path):
    """The VAE of a teacher of 16-pixel images also encodes 32 pixels, if the plan does not know what it was trained
    on."""
    text = own(teacher.folder, folder).replace("images: {", "storage_dtype: float32, images: {")
    made = execute(text, tmp_path / "store")["latents"].artifact
    seen, unseen = read_latents(made.folder, False), read_latents(made.folder, True)
    assert seen.latents.shape == (81, 4, 16, 16) and unseen.latents.shape == (9, 4, 16, 16)
    images = load(folder, held_out=True)
    expected = teacher.encode(torch.from_numpy(images.pixels())).numpy()
    np.testing.assert_allclose(unseen.latents, expected, rtol=0, atol=1e-4)
    assert unseen.captions == images.captions and set(seen.captions) == {"a red wall", "a blue wall"}
    assert (unseen.labels["label"] == images.labels["label"]).all()
    assert made.record["metrics"]["classes"] == {"label": 2}
    method = "method: {name: consistency, guidance_scale: 1}, training: {steps: 1}"
    text += f"  student: {{kind: distill, latents: latents, {method}}}"
    with pytest.raises(ManifestError, match="latents: they are of images of 32 pixels, but the teacher makes 16 x 16"):
        plan_of(text, tmp_path / "store")
    settings = ConsistencyConfig(guidance_scale=1), StudentTraining(steps=1)
    recipe = Recipe(
        *settings, ["latents"], made.inputs["teacher"], [], [], held_out=1, latents=made, prompts=tmp_path, start=None,
        origin=None, inputs={}, contents={},
    )  # fmt: skip
    with pytest.raises(
        StageError, match="encode images of 16 pixels"
    ):  # the plan does not know the image size of a hub repository
        finish(distill(recipe, StudentExecution(), 0, tmp_path, 1, ""))
    assert made.record["identity"]["contents"]["images.path"].startswith("sha256:")


def test_a_pixel_space_teachers_latents_are_the_images(folder, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(unet=pixel_unet(), scheduler=DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    made = execute(own(tmp_path / "teacher", folder, caption=None, label=None), tmp_path / "store")["latents"].artifact
    found = read_latents(made.folder, True)
    np.testing.assert_array_equal(found.latents, load(folder, held_out=True).pixels().astype(np.float16))
    assert found.captions == [""] * 9 and found.labels == {} and made.record["metrics"]["classes"] == {}


def test_images_are_decoded_in_batches(folder, tmp_path):
    images = load(folder)
    assert (np.concatenate(list(batches(folder, 7, start=14))) == images.images[14:]).all()
    (tmp_path / "images" / "11.png").write_bytes(b"no image")  # the tenth training image
    assert (next(batches(folder, 10)) == images.images[:10]).all()
    assert (next(batches(folder, 10, start=11)) == images.images[11:21]).all()
    with pytest.raises(StageError, match=r"11\.png: the image cannot be read"):
        next(batches(folder, 1, start=10))


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        (
            GAUSSIAN + "  real: {kind: latents, teacher: teacher, images: digits}\n",
            "13:34",
            "teacher: it is `gaussian:`",
        ),
        (
            TINY + "  real: {kind: latents, teacher: teacher, images: {name: digits, size: 32}}\n",
            "26:72",
            "images.size: 32 pixels, but the teacher was trained on images of 16",
        ),
        (
            TINY + "  real: {kind: latents, teacher: teacher, images: digit_scenes}\n",
            "26:51",
            "images.size: 32 pixels, but the teacher was trained on images of 16",
        ),
        (
            TINY + "  real: {kind: latents, teacher: teacher, images: digit}\n",
            "26:51",
            "unknown name 'digit'; did you mean 'digits'?",
        ),
        (
            TINY + "  real: {kind: latents, teacher: pairs, images: digits}\n",
            "26:34",
            "needs a stage of kind teacher; 'pairs' is of kind pairs",
        ),
    ],
)
def test_images_that_cannot_be_encoded_are_refused_when_planning(tmp_path, text, place, words):
    with pytest.raises(ManifestError) as caught:
        plan_of(text, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"test.yaml:{place}: stages.real.") and words in message


def test_a_size_that_does_not_fit_the_vae_is_refused_when_it_is_known(teacher, folder, tmp_path):
    text = own(teacher.folder, folder, size=17)
    with pytest.raises(StageFailed, match=r"17 pixels do not fit .* scales images down by 2; .* a multiple of 2"):
        execute(text, tmp_path / "store")


def test_latents_that_overflow_their_dtype_are_refused(teacher, folder, tmp_path):
    """A VAE whose scaling factor makes latents larger than float16 holds."""
    source = tmp_path / "source"
    shutil.copytree(teacher.folder, source)
    config = json.loads((source / "vae" / "config.json").read_text())
    (source / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 1e8}))
    text = own(source, folder)
    with pytest.raises(StageFailed, match=r"the latent of training image 0 is not finite in float16; .*of 64 are"):
        execute(text, tmp_path / "store")
    execute(text, tmp_path / "store", ["stages.latents.storage_dtype=float32"])
    weights = source / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: np.full_like(tensor, np.nan) for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(StageFailed, match="not finite in float32"):
        execute(text, tmp_path / "store", ["stages.latents.storage_dtype=float32"])


def test_damaged_latents_are_named(latents, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(latents.folder, broken)
    (broken / "training.npy").write_bytes((broken / "training.npy").read_bytes()[:-100])
    (broken / "held_out.npy").write_bytes((latents.folder / "training.npy").read_bytes())
    with pytest.raises(StageError, match=r"training.npy and .parquet cannot be read as latents"):
        read_latents(broken, False)
    with pytest.raises(StageError, match=r"held_out.npy has 8622 latents, but .*held_out.parquet has 2160 rows"):
        read_latents(broken, True)
    with pytest.raises(StageError, match="cannot be read as latents"):
        read_latents(tmp_path, True)
