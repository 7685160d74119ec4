"""Image sets: the embedded ones, and the user's own in three formats."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.base import StageError
from stages.data.images import digits
from stages.data.images.config import Digits, DigitScenes, ImageFolder, ParquetImages, WebDataset
from stages.data.images.load import captions, examples, load
from stages.data.prompts.config import Prompts
from stages.data.prompts.read import read_prompts

SCENE = Digits(digits_per_image=2, size=32, background="photographs")


@pytest.fixture(scope="module")
def scenes():
    return load(DigitScenes())


def test_every_image_shows_what_its_caption_says(scenes):
    """All ink has the colour that the caption names. The first digit lies above or left of the second, as the caption
    says."""
    asked = digits.prompt_labels(scenes.captions)
    assert {name: labels.tolist() for name, labels in asked.items()} == {
        name: labels.tolist() for name, labels in scenes.labels.items() if name != "photograph"
    }
    plain = load(Digits(digits_per_image=2, size=32))
    tints = np.array(list(digits.COLOURS.values()))
    for i in range(0, 400, 7):
        image = plain.images[i] / 255.0
        vertical = plain.labels["arrangement"][i] == 0
        halves = np.split(image, 2, axis=1 if vertical else 2)
        for half, colour in zip(halves, (plain.labels["colour"][i], plain.labels["colour_2"][i]), strict=True):
            brightest = half.reshape(3, -1)[:, half.sum(0).argmax()]
            assert np.abs(tints - brightest).sum(1).argmin() == colour


def test_digit_scenes_equals_digits_with_its_settings(scenes):
    assert (load(SCENE).images == scenes.images).all()
    assert scenes.images.shape == (20_000, 3, 32, 32) and scenes.images.dtype == np.uint8
    assert len(set(captions(DigitScenes()))) == 7_200


def test_captions_can_name_only_the_first_digit(scenes):
    images = load(DigitScenes(named="first"))
    assert images.captions == [" ".join(caption.split()[:3]) for caption in scenes.captions]
    assert (images.images == scenes.images).all()
    assert set(images.captions) == set(captions(DigitScenes(named="first"))) and len(set(images.captions)) == 60
    labels = digits.prompt_labels(images.captions)
    assert set(labels) == {"colour", "digit"}
    assert all((values == images.labels[name]).all() for name, values in labels.items())
    with pytest.raises(ValueError, match="named: first needs digits_per_image: 2"):
        Digits(named="first")


@pytest.mark.parametrize(("named", "other"), [("digit", "colour"), ("colour", "digit")])
def test_captions_can_be_right_only_about_the_digit_or_the_colour(named, other):
    """The other word is random, so it is right only by chance."""
    config = Digits(named=named)
    images = load(config)
    asked = digits.prompt_labels(images.captions)
    assert set(images.captions) == set(captions(config))
    assert (asked[named] == images.labels[named]).all()
    right = (asked[other] == images.labels[other]).mean()
    assert right == pytest.approx(1 / len(set(images.labels[other])), abs=0.02)
    with pytest.raises(ValueError, match=f"named: {named} needs digits_per_image: 1"):
        DigitScenes(named=named)


def test_held_out_images_are_made_from_other_scans():
    """Uses single digits on black. No held-out image is equal to a training image."""
    seen, unseen = load(Digits()), load(Digits(), held_out=True)
    assert (len(seen), len(unseen)) == (8_622, 2_160)
    known = {image.tobytes() for image in seen.images}
    assert sum(image.tobytes() in known for image in unseen.images) == 0


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("background", ["plain", "photographs"])
def test_single_digits_cover_all_digits_and_colours(size, background):
    images = load(Digits(size=size, background=background), limit=30)
    assert images.images.shape == (30, 3, size, size) and set(images.labels) >= {"colour", "digit"}
    assert images.captions[0] in captions(Digits())
    assert np.abs(images.pixels()).max() <= 1.0


def test_captions_of_another_set_are_refused():
    for text in ("a cat", "a red handwritten cat", "a red seven beside a blue two", ""):
        with pytest.raises(ValueError, match="is not a caption of the digits set"):
            digits.prompt_labels([text])


# --- The user's own images ----------------------------------------------------------------------------


def encoded(colour, size=(40, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


COLOURS = ["red", "green", "blue", "white", "black"]
ROWS = [(f"{i:02d}", encoded(COLOURS[i % 5]), f"a {COLOURS[i % 5]} wall", i % 5) for i in range(20)]


def folder_csv(path):
    for name, image, _, _ in ROWS:
        (path / f"{name}.png").write_bytes(image)
    lines = ["file_name,text,class", *(f"{name}.png,{text},{label}" for name, _, text, label in ROWS)]
    (path / "metadata.csv").write_text("\n".join(lines))
    return ImageFolder(path=str(path), size=16, label="class")


def folder_jsonl(path):
    config = folder_csv(path)
    (path / "metadata.csv").unlink()
    rows = [{"file_name": f"{name}.png", "text": text, "class": label} for name, _, text, label in ROWS]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return config


def shards(path):
    for part in (0, 1):
        with tarfile.open(path / f"{part}.tar", "w") as tar:
            for name, image, text, label in ROWS[part * 10 : part * 10 + 10]:
                for extension, content in (("png", image), ("txt", text.encode()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{name}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return WebDataset(path=str(path), size=16, label="cls")


def parquet(path):
    columns = {
        "image": [{"bytes": image, "path": None} for _, image, _, _ in ROWS],
        "text": [text for _, _, text, _ in ROWS],
        "class": [label for *_, label in ROWS],
    }
    pq.write_table(pa.table(columns), path / "a.parquet", row_group_size=7)
    return ParquetImages(path=str(path / "*.parquet"), size=16, label="class")


@pytest.mark.parametrize("make", [folder_csv, folder_jsonl, shards, parquet])
def test_every_format_gives_the_same_images(tmp_path, make):
    config = make(tmp_path)
    seen, unseen = load(config), load(config, held_out=True)
    assert (len(seen), len(unseen)) == (18, 2)
    kept = [row for i, row in enumerate(ROWS) if i % 10 != 9]
    assert seen.captions == [text for _, _, text, _ in kept]
    assert seen.labels["label"].tolist() == [label for *_, label in kept]
    assert seen.images.shape == (18, 3, 16, 16)
    assert seen.images[0, :, 8, 8].tolist() == [255, 0, 0] and unseen.captions == ["a black wall"] * 2
    (prompts,) = read_prompts(Prompts(images=config))
    assert prompts == [text for _, _, text, _ in ROWS]


def test_captions_in_text_files_beside_the_images(tmp_path):
    for name, image, text, _ in ROWS:
        (tmp_path / f"{name}.png").write_bytes(image)
        (tmp_path / f"{name}.txt").write_text(text + "\n")
    config = ImageFolder(path=str(tmp_path), size=16, caption="txt")
    assert load(config).captions[:2] == ["a red wall", "a green wall"]
    (tmp_path / "03.txt").unlink()
    with pytest.raises(StageError, match=r"03.png: there is no caption file 03.txt beside it"):
        load(config)


def test_folders_as_classes_as_in_imagenet(tmp_path):
    for name, image, _, colour in ROWS:
        (tmp_path / f"n{colour:08d}").mkdir(exist_ok=True)
        (tmp_path / f"n{colour:08d}" / f"{name}.JPEG").write_bytes(image)
    config = ImageFolder(path=str(tmp_path), size=16, caption=None, label="folder")
    images = load(config)
    assert config.labelled and images.labels["label"].tolist() == sorted(images.labels["label"].tolist())
    assert set(images.labels["label"].tolist()) == {0, 1, 2, 3, 4}
    (tmp_path / "astray.png").write_bytes(ROWS[0][1])
    with pytest.raises(StageError, match=r"astray.png: label: folder needs each image in a folder"):
        load(config)


def test_images_are_scaled_and_centre_cropped(tmp_path):
    wide = Image.new("RGB", (64, 32), "black")
    wide.paste((255, 255, 255), (16, 0, 48, 32))
    wide.save(tmp_path / "a.png")
    (example,) = examples(ImageFolder(path=str(tmp_path), size=16, caption=None))
    assert example.caption == "" and example.pixels(16).min() > 200  # the black sides are cut off


def test_many_images_are_memory_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.data.images.load.IN_MEMORY", 1000)
    (tmp_path / "set").mkdir()
    config = folder_csv(tmp_path / "set")
    with pytest.raises(StageError, match="too large to hold in memory"):
        load(config)
    images = load(config, scratch=tmp_path / "scratch").images
    assert isinstance(images, np.memmap)
    monkeypatch.undo()
    assert (images == load(config).images).all()


def test_errors_name_the_file_and_the_row(tmp_path):
    config = folder_csv(tmp_path)
    (tmp_path / "04.png").write_bytes(b"not an image")
    with pytest.raises(StageError, match=r"04.png: the image cannot be read"):
        load(config)
    metadata = (tmp_path / "metadata.csv").read_text()
    (tmp_path / "metadata.csv").write_text(metadata.replace("02.png", "../02.png"))
    with pytest.raises(StageError, match=r"metadata.csv, row 3: file_name '../02.png' is not a file in"):
        load(config)
    (tmp_path / "metadata.csv").write_text(metadata.replace("a blue wall", ""))
    with pytest.raises(StageError, match=r"metadata.csv, row 3: expected text in 'text'"):
        load(config)
    with pytest.raises(StageError, match=r"row 1: expected text in 'caption'; it has: file_name, text, class"):
        load(config.model_copy(update={"caption": "caption"}))
    with pytest.raises(StageError, match="nowhere"):
        load(config.model_copy(update={"path": str(tmp_path / "nowhere")}))


def test_unreadable_containers_are_named(tmp_path):
    config = shards(tmp_path)
    tar = tmp_path / "1.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(StageError, match=r"1.tar: not a readable tar"):
        load(config)
    (tmp_path / "a.parquet").write_bytes(b"PAR1junk")
    with pytest.raises(StageError, match=r"a.parquet: cannot be read as parquet"):
        load(ParquetImages(path=str(tmp_path / "a.parquet"), size=16))
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(StageError, match=r"no column 'image'; it has: picture"):
        load(ParquetImages(path=str(tmp_path / "a.parquet"), size=16))


def test_a_limit_selects_images_of_all_classes_of_a_sorted_set(tmp_path):
    rows = sorted(ROWS, key=lambda row: row[3])
    pq.write_table(
        pa.table({"image": [row[1] for row in rows], "text": [row[2] for row in rows], "class": [r[3] for r in rows]}),
        tmp_path / "a.parquet",
    )
    images = load(ParquetImages(path=str(tmp_path), size=16, label="class"), limit=9)
    assert len(images) == 9 and len(set(images.labels["label"].tolist())) >= 4


def test_images_of_16_bits_are_scaled(tmp_path):
    Image.fromarray(np.full((16, 16), 20_000, dtype=np.uint16)).save(tmp_path / "a.png")
    (example,) = examples(ImageFolder(path=str(tmp_path), size=16, caption=None))
    assert example.pixels(16)[0, 8, 8] == 78


def test_upper_case_suffixes_are_found(tmp_path):
    (tmp_path / "A.PNG").write_bytes(ROWS[0][1])
    (tmp_path / "b.png").write_bytes(ROWS[1][1])
    assert len(list(examples(ImageFolder(path=str(tmp_path), size=16, caption=None)))) == 2


def test_only_allowed_image_formats_are_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (example,) = examples(ImageFolder(path=str(tmp_path), size=16, caption=None))
    with pytest.raises(StageError, match="the image cannot be read"):
        example.pixels(16)
