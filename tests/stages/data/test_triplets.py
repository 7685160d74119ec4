"""Triplets for two-alternative forced choice: human judgements from disk, and synthetic ones."""

import io
from typing import Annotated, Literal

import numpy as np
import pytest
from PIL import Image
from pydantic import Field, ValidationError

from pipeline.manifest.fields import marked, plain
from pipeline.reference.settings import about, settings_of
from stages.base import Choice, Content, Stage, StageError
from stages.data.images import photographs
from stages.data.images.config import Digits
from stages.data.images.labelled import LabelledImages
from stages.data.images.load import load as load_images
from stages.data.triplets.config import TRIPLET_SETS, Bapps, Synthetic, TripletSet
from stages.data.triplets.distortions import BLOCK, BLUR, DISTORTIONS, NOISE, QUANTISER, SHIFT, WARP
from stages.data.triplets.families import FAMILIES
from stages.metrics.two_afc import scores

# --- Settings ----------------------------------------------------------------------------------------


class Example(Stage):
    """A stage that reads triplets."""

    VERSION = 1
    kind: Literal["example"] = "example"
    triplets: Annotated[TripletSet, Choice("name", TRIPLET_SETS)] = Field(description="what is judged")


def test_a_manifest_names_a_set_by_a_word_or_with_settings():
    assert Example(triplets="synthetic").triplets == Synthetic()
    stage = Example.model_validate({"triplets": {"name": "bapps", "path": "dataset/2afc", "train": ["cnn"]}})
    assert stage.triplets == Bapps(path="dataset/2afc", train=["cnn"])
    assert [(field.path, field.value) for field in marked(stage, Content)] == [("triplets.path", "dataset/2afc")]
    assert Example.model_validate(plain(stage)) == stage
    drawn = Example.model_validate({"triplets": {"name": "synthetic", "ratio": [0.6, 0.8]}})
    assert drawn.triplets.ratio == (0.6, 0.8) and Example.model_validate(plain(drawn)) == drawn


@pytest.mark.parametrize("name", TRIPLET_SETS)
def test_every_setting_says_what_it_means(name):
    assert about(TRIPLET_SETS[name])
    assert all(s.description and "any value" not in s.allowed for s in settings_of(TRIPLET_SETS[name]))


@pytest.mark.parametrize(
    ("given_settings", "words"),
    [
        ({"name": "synthetic", "ratio": [0.9, 0.5]}, "ratio must rise and lie between 0 and 1"),
        ({"name": "synthetic", "ratio": [0.5, 1.0]}, "ratio must rise and lie between 0 and 1"),
        ({"name": "synthetic", "held_out_family": "rain"}, "held_out_family"),
        ({"name": "bapps", "path": "x", "test": ["cnn", "cnn"]}, "a category is given twice"),
        ({"name": "bapps", "path": "x", "train": []}, "at least 1 item"),
        ({"name": "bapps", "path": "x", "train": ["../secret"]}, "should match pattern"),
        ("faces", "unknown"),
    ],
)
def test_contradictory_settings_are_refused(given_settings, words):
    with pytest.raises(ValidationError, match=words):
        Example.model_validate({"triplets": given_settings})


# --- Distortions -------------------------------------------------------------------------------------


def photograph(size):
    return (photographs.crop(3, size, np.random.default_rng(size)) * 255.0).round().astype(np.uint8)


def test_the_families_equal_the_names_in_the_settings():
    assert tuple(DISTORTIONS) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "draws"), [(16, 40), (32, 40), (128, 3)])
def test_error_grows_with_strength(family, size, draws):
    image, distort = photograph(size), DISTORTIONS[family]
    means = []
    for strength in (0.1, 0.3, 0.6, 1.0):
        made = [distort(image, strength, np.random.default_rng([i, size])) for i in range(draws)]
        assert all(m.shape == image.shape and m.dtype == np.uint8 for m in made)
        assert (made[0] == distort(image, strength, np.random.default_rng([0, size]))).all()
        means.append(np.square(np.stack(made).astype(np.float64) - image).mean())
    assert means == sorted(means) and means[0] > 0.0
    assert (made[0] != made[1]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_256_pixels_and_oblong_ones(family):
    image = np.random.default_rng(0).integers(0, 256, (3, 256, 256), dtype=np.uint8)
    assert DISTORTIONS[family](image, 1.0, np.random.default_rng(0)).shape == (3, 256, 256)
    assert DISTORTIONS[family](image[:, :24, :40], 0.5, np.random.default_rng(0)).shape == (3, 24, 40)


def ramps(size):
    """Return an image whose channels hold the row and the column of each pixel."""
    rows, columns = np.mgrid[:size, :size]
    return np.stack([rows, columns, rows]).astype(np.uint8)


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_strengths_have_their_defined_size(strength):
    rng, size = np.random.default_rng(1), 256
    inner, level = slice(48, -48), np.full((3, 128, 128), 128, dtype=np.uint8)

    found = (DISTORTIONS["shift"](ramps(size), strength, rng).astype(float) - ramps(size))[:2, inner, inner]
    assert np.hypot(*found).mean() == pytest.approx(strength * SHIFT * size, rel=0.05)
    assert found.std((1, 2)).max() < 0.5  # the same everywhere

    fields = [DISTORTIONS["warp"](ramps(size), strength, rng).astype(float) - ramps(size) for _ in range(8)]
    inside = np.stack(fields)[:, :2, inner, inner]
    assert np.sqrt(np.square(inside).sum(1).mean()) == pytest.approx(strength * WARP * size, rel=0.1)

    faint = DISTORTIONS["noise"](level, strength / 2, rng).astype(float) - 128.0
    assert faint.std() == pytest.approx(strength / 2 * NOISE, rel=0.05)

    edges = np.where(ramps(128) < 64, 0, 255).astype(np.uint8)
    blurred = DISTORTIONS["blur"](edges, strength, rng).astype(float)
    spreads = [np.diff(blurred[0, :, 64]), np.diff(blurred[1, 64, :])]  # down, across
    variances = [(s * (np.arange(127) - 63) ** 2).sum() / s.sum() for s in spreads]
    assert np.mean(variances) == pytest.approx((strength * BLUR * 128) ** 2, rel=0.02)
    assert variances[0] != pytest.approx(variances[1], rel=0.02)

    grey = DISTORTIONS["colour"](level, strength, rng).astype(float)
    assert grey.std((1, 2)).max() == 0.0 and (grey != 128.0).any()  # one tint, the same everywhere


def test_an_eighth_of_compression_is_quality_50():
    seed = next(s for s in range(9999) if not np.random.default_rng(s).integers(BLOCK, size=2).any())
    image, buffer = photograph(32), io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, format="JPEG", quality=50)
    expected = np.asarray(Image.open(buffer)).transpose(2, 0, 1)
    assert (DISTORTIONS["compression"](image, 1 / QUANTISER, np.random.default_rng(seed)) == expected).all()


# --- Synthetic triplets ------------------------------------------------------------------------------


def numbered(first, count, size=16):
    """Photographs, each marked with its own number in a corner."""
    images = np.stack([photograph(size)] * count)
    images[:, :, 0, 0] = np.arange(first, first + count)[:, None]
    return LabelledImages(images, [""] * count, {}, np.arange(count))


def two_splits(held_out):
    return numbered(100, 30) if held_out else numbered(0, 60)


SMALL = Synthetic(count=53, test_count=10, held_out_family="shift")


def test_the_held_out_family_and_held_out_images_are_never_trained_on():
    seen, unseen = (SMALL.load(two_splits, held_out=held_out) for held_out in (False, True))
    assert tuple(seen.categories) == ("blur", "noise", "warp", "colour", "compression") and not seen.unseen
    assert tuple(unseen.categories) == FAMILIES and unseen.unseen == {"shift"}
    for triplets, total, sources in ((seen, 53, range(60)), (unseen, 60, range(100, 130))):
        places = [place for category in triplets.categories.values() for place in category]
        assert places == list(range(total)) and triplets.votes.shape == (total,)
        references = triplets.batch(np.arange(total))[0]
        assert set(references[:, 0, 0, 0].tolist()) <= set(sources)
        for family, at in triplets.categories.items():
            assert {triplets.recipes[place].family for place in at} == {family}
    assert {len(at) for at in seen.categories.values()} == {10, 11}


def test_the_weaker_distortion_has_the_vote():
    triplets = Synthetic(count=4_000).load(two_splits, held_out=False)
    strengths = np.array([recipe.strengths for recipe in triplets.recipes])
    ratios = strengths.min(1) / strengths.max(1)
    assert 0.5 <= ratios.min() < 0.52 and 0.88 < ratios.max() <= 0.9
    assert strengths.max() <= 1.0 and strengths.max(1).min() >= 0.25
    assert ((strengths[:, 1] < strengths[:, 0]) == triplets.votes).all()
    assert triplets.votes.dtype == np.float32 and abs(triplets.votes.mean() - 0.5) < 0.03
    assert scores(strengths[:, 0], strengths[:, 1], triplets.votes).mean() == 1.0


def test_a_triplet_depends_only_on_settings_and_its_number():
    triplets = SMALL.load(two_splits, held_out=True)
    whole = triplets.batch(np.arange(60))
    again = SMALL.load(two_splits, held_out=True).batch(np.array([41, 3]))
    assert all(one.shape == (60, 3, 16, 16) and one.dtype == np.uint8 for one in whole)
    assert all((one[[41, 3]] == other).all() for one, other in zip(whole, again, strict=True))
    more = Synthetic(test_count=12, held_out_family="warp").load(two_splits, held_out=True)
    for family in FAMILIES:  # neither the number of triplets nor the family left out changes one of them
        pair = [t.batch(np.array(t.categories[family][:10])) for t in (triplets, more)]
        assert all((one == other).all() for one, other in zip(*pair, strict=True))


def squared_errors(triplets, index):
    reference, *others = (images.astype(np.float64) for images in triplets.batch(np.array(index)))
    return [np.square(reference - other).mean((1, 2, 3)) for other in others]


def test_squared_error_is_mostly_right_and_often_wrong():
    triplets = Synthetic(test_count=120).load(lambda held_out: load_images(Digits(), held_out=held_out), held_out=True)
    found = {
        family: scores(*squared_errors(triplets, at), triplets.votes[at.start : at.stop]).mean()
        for family, at in triplets.categories.items()
    }
    assert all(0.6 < score < 1.0 for score in found.values())
    assert max(found["blur"], found["warp"], found["compression"]) < 0.9


def test_both_images_are_misaligned_except_in_the_family_shift():
    aligned = Synthetic(count=50, test_count=10, misalignment=0.0)
    moved, still = (c.load(two_splits, held_out=True) for c in (SMALL, aligned))
    assert (moved.votes == still.votes).all()
    for family, at in moved.categories.items():
        same = [(a == b).all() for a, b in zip(moved.batch(np.array(at)), still.batch(np.array(at)), strict=True)]
        assert same == [True, family == "shift", family == "shift"]


# --- BAPPS -------------------------------------------------------------------------------------------


def of_nobody(held_out):
    raise AssertionError("a set of its own images asks for no others")


def write_category(folder, count, size=(8, 6), start=0):
    for part in ("ref", "p0", "p1", "judge"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        for place, part in enumerate(("ref", "p0", "p1")):
            Image.new("RGB", size, (number, place, 7)).save(folder / part / f"{number:06d}.png")
        np.save(folder / "judge" / f"{number:06d}.npy", np.array([number / 10], dtype=np.float32))


@pytest.fixture
def bapps(tmp_path):
    write_category(tmp_path / "train" / "traditional", 3)
    write_category(tmp_path / "val" / "traditional", 2, start=4)
    write_category(tmp_path / "val" / "color", 4, start=6)
    return Bapps(path=str(tmp_path), train=["traditional"], test=["traditional", "color"])


def test_bapps_is_read_as_it_was_written(bapps):
    seen, unseen = (bapps.load(of_nobody, held_out=held_out) for held_out in (False, True))
    assert seen.categories == {"traditional": range(3)} and not seen.unseen
    assert unseen.categories == {"traditional": range(2), "color": range(2, 6)} and unseen.unseen == {"color"}
    assert seen.votes == pytest.approx([0.0, 0.1, 0.2]) and seen.votes.dtype == np.float32
    assert unseen.votes == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    for place, images in enumerate(unseen.batch(np.array([5, 0, 2]))):
        assert images.shape == (3, 3, 6, 8) and images.dtype == np.uint8
        assert images[:, :, 3, 3].tolist() == [[9, place, 7], [4, place, 7], [6, place, 7]]


def test_grey_and_jpeg_images_are_read_as_rgb(bapps, tmp_path):
    folder = tmp_path / "train" / "traditional"
    for part in ("ref", "p0", "p1"):
        (folder / part / "000001.png").unlink()
        Image.new("L", (8, 6), 90).save(folder / part / "000001.jpg")
    (folder / "ref" / "notes.txt").write_text("not an image, and not counted")
    reference, _, _ = bapps.load(of_nobody, held_out=False).batch(np.array([0, 1]))
    assert reference[1, :, 2, 2].tolist() == [90, 90, 90]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda c: c.rename(c.with_name("other")),
            r"train/traditional is not a folder; expected PATH/train/",
        ),
        (
            lambda c: [f.unlink() for f in (c / "p1").iterdir()] and (c / "p1").rmdir(),
            r"traditional/p1 cannot be read as a folder",
        ),
        (lambda c: (c / "p0" / "000001.png").unlink(), r"traditional/p0/000001.png is missing from its triplet"),
        (lambda c: (c / "ref" / "000001.png").unlink(), r"traditional/ref/000001.png is missing"),
        (lambda c: (c / "judge" / "000002.npy").unlink(), r"traditional/judge/000002.npy is missing"),
        (lambda c: np.save(c / "judge" / "7.npy", np.zeros(1)), r"traditional/ref/7.png is missing"),
        (lambda c: [f.unlink() for f in c.glob("*/*")], r"train/traditional holds 0 triplets; expected"),
        (
            lambda c: np.save(c / "judge" / "000001.npy", np.ones(1) * 2),
            r"000001.npy: the vote is 2; expected an array",
        ),
        (lambda c: np.save(c / "judge" / "000001.npy", np.array([np.nan])), r"000001.npy: the vote is nan; expected"),
        (
            lambda c: np.save(c / "judge" / "000001.npy", np.zeros(2)),
            r"000001.npy: can only convert an array",
        ),
        (lambda c: np.save(c / "judge" / "000001.npy", np.array([{}])), r"000001.npy: Object arrays cannot be loaded"),
        (lambda c: (c / "judge" / "000001.npy").write_bytes(b"PK\3\4"), r"000001.npy: .*; expected an array of one"),
        (lambda c: (c / "judge" / "000001.npy").write_bytes(b""), r"000001.npy: .*; expected an array of one number"),
        (lambda c: (c / "p1" / "000001.png").write_bytes(b"%!PS"), r"p1/000001.png: cannot be read as PNG or JPEG"),
        (
            lambda c: Image.new("RGB", (9, 6)).save(c / "p0" / "000002.png"),
            r"p0/000002.png: 9x6 pixels; expected 8x6, as in .*ref/000000.png: all images must have the same size",
        ),
    ],
)
def test_errors_name_the_damaged_file(bapps, tmp_path, harm, words):
    harm(tmp_path / "train" / "traditional")
    with pytest.raises(StageError, match=f"BAPPS .*{words}"):
        bapps.load(of_nobody, held_out=False).batch(np.arange(3))
