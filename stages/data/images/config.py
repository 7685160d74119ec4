"""Image sets, as a manifest names them. Imports no NumPy: planning needs none."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stages.base import Config, Content


class ImageSet(Config):
    """Images with captions, and for some sets classes. All come out square, `size` pixels wide, in RGB."""

    name: str
    size: int = Field(ge=8)


class Digits(ImageSet):
    """Real scanned handwriting in six colours, embedded: nothing is downloaded. See images/digits.py."""

    name: Literal["digits"] = "digits"
    digits_per_image: Literal[1, 2] = 1
    size: Literal[16, 32] = 16
    background: Literal["plain", "photographs"] = Field("plain", description="black, or crops of real photographs")


class DigitScenes(Digits):
    """The preset on which losses and methods are compared: two digits, an arrangement, photographs behind them."""

    name: Literal["digit_scenes"] = "digit_scenes"  # type: ignore[assignment]
    digits_per_image: Literal[1, 2] = 2
    size: Literal[16, 32] = 32
    background: Literal["plain", "photographs"] = "photographs"


class FileSet(ImageSet):
    """Images of your own, scaled so that the shorter side has `size` pixels, and the middle square of that.

    `caption` and `label` name where in the data they stand; null: there are none.
    """

    size: int = Field(ge=8)
    path: Annotated[str, Content()]
    hold_out_every: int = Field(10, ge=2, description="every so many-th image is never trained on")
    caption: str | None = None
    label: str | None = None


class ImageFolder(FileSet):
    """A folder as Hugging Face's imagefolder: images, and `metadata.csv` or `metadata.jsonl` with a row an image
    (`file_name` and further columns); without either, `caption` null or "txt", a text file beside each image."""

    name: Literal["image_folder"] = "image_folder"
    caption: str | None = Field("text", description="column of the metadata, or txt")
    label: str | None = Field(None, description="column of the metadata")


class WebDataset(FileSet):
    """A .tar file, a folder of them or a glob: an image and further members a sample."""

    name: Literal["webdataset"] = "webdataset"
    caption: str | None = Field("txt", description="txt, or a key of the .json member")
    label: str | None = Field(None, description="cls, or a key of the .json member")


class ParquetImages(FileSet):
    """A .parquet file, a folder of them or a glob, as Hugging Face stores image data sets."""

    name: Literal["parquet"] = "parquet"
    image: str = Field("image", description="column of encoded images: binary, or a struct with `bytes`")
    caption: str | None = "text"
    label: str | None = None


IMAGE_SETS: dict[str, type[ImageSet]] = {
    "digits": Digits,
    "digit_scenes": DigitScenes,
    "image_folder": ImageFolder,
    "webdataset": WebDataset,
    "parquet": ParquetImages,
}
EMBEDDED = ("digits", "digit_scenes")
