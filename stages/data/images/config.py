"""Image sets, as a manifest names them. Imports no NumPy: planning needs none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.base import Config, Content
from stages.registry import Registry

if TYPE_CHECKING:
    from stages.data.images.files import Example
    from stages.data.images.labelled import LabelledImages


class ImageSet(Config):
    """Images with captions, and for some sets classes. All come out square, `size` pixels wide, in RGB.

    A set of another package says what it holds by `captions` and `load`; or it is a FileSet with `examples`.
    """

    name: str
    size: int = Field(ge=8, description="width and height in pixels")

    @property
    def labelled(self) -> bool:
        """Whether its images have classes."""
        return False

    def captions(self) -> Iterator[str]:
        """Every caption that the set can have."""
        raise TypeError(f"{type(self).__name__} does not say what its captions are")

    def load(self, held_out: bool) -> LabelledImages:
        """What is trained on, or the images that nothing is ever trained on: a function of the settings alone."""
        raise TypeError(f"{type(self).__name__} does not say how it is loaded")


class Digits(ImageSet):
    """Real scanned handwriting in six colours, embedded: nothing is downloaded. "a red handwritten seven"."""

    name: Literal["digits"] = "digits"
    digits_per_image: Literal[1, 2] = Field(
        1, description="number of digits in an image; two stand side by side or one above the other"
    )
    size: Literal[16, 32] = Field(16, description="width and height in pixels")
    background: Literal["plain", "photographs"] = Field(
        "plain", description="plain is black; photographs are crops of real ones"
    )

    @property
    def labelled(self) -> bool:
        return True

    def captions(self) -> Iterator[str]:
        from stages.data.images import digits

        return iter(digits.captions(self.digits_per_image))

    def load(self, held_out: bool) -> LabelledImages:
        from stages.data.images import digits

        return digits.load(self.digits_per_image, self.size, self.background, held_out)


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

    size: int = Field(ge=8, description="width and height in pixels; images are scaled, and the middle square is kept")
    path: Annotated[str, Content()] = Field(description="path of the images")
    hold_out_every: int = Field(10, ge=2, description="interval of held-out images: 10 holds out every tenth")
    caption: str | None = Field(None, description="place of the caption; null if there are none")
    label: str | None = Field(None, description="place of the class; null if there are none")

    @property
    def labelled(self) -> bool:
        return self.label is not None

    def examples(self) -> Iterator[Example]:
        """All images, still encoded, in order. Raises StageError for one that cannot be read, FileNotFoundError if the
        path does not exist."""
        raise TypeError(f"{type(self).__name__} does not say where its images are")


class ImageFolder(FileSet):
    """A folder as Hugging Face's imagefolder: images, and `metadata.csv` or `metadata.jsonl` with a row an image
    (`file_name` and further columns); without either, `caption` null or "txt", a text file beside each image, and
    `label` null or "folder", as ImageNet lies on disks: CLASS/NAME.JPEG."""

    name: Literal["image_folder"] = "image_folder"
    path: Annotated[str, Content()] = Field(description="folder of the images")
    caption: str | None = Field(
        "text",
        description="metadata column with the caption; txt for a text file beside each image; null if there are none",
    )
    label: str | None = Field(
        None,
        description="column of the metadata with the class; folder for the name of the image's folder; null if there "
        "are none",
    )

    def examples(self) -> Iterator[Example]:
        from stages.data.images.files import folder

        return folder(self.path, self.caption, self.label)


class WebDataset(FileSet):
    """A .tar file, a folder of them or a glob: an image and further members a sample."""

    name: Literal["webdataset"] = "webdataset"
    path: Annotated[str, Content()] = Field(description="a .tar file, a folder of them or a glob")
    caption: str | None = Field(
        "txt", description="member with the caption: txt, or a key of the .json member; null if there are none"
    )
    label: str | None = Field(
        None, description="member with the class: cls, or a key of the .json member; null if there are none"
    )

    def examples(self) -> Iterator[Example]:
        from stages.data.images.files import webdataset

        return webdataset(self.path, self.caption, self.label)


class ParquetImages(FileSet):
    """A .parquet file, a folder of them or a glob, as Hugging Face stores image data sets."""

    name: Literal["parquet"] = "parquet"
    image: str = Field("image", description="column of encoded images: binary, or a struct with the field `bytes`")
    path: Annotated[str, Content()] = Field(description="a .parquet file, a folder of them or a glob")
    caption: str | None = Field("text", description="column of captions; null if there are none")
    label: str | None = Field(None, description="column of classes; null if there are none")

    def examples(self) -> Iterator[Example]:
        from stages.data.images.files import parquet

        return parquet(self.path, self.image, self.caption, self.label)


IMAGE_SETS: Registry[ImageSet] = Registry(
    "retort.image_sets",
    ImageSet,
    "name",
    {
        "digits": Digits,
        "digit_scenes": DigitScenes,
        "image_folder": ImageFolder,
        "webdataset": WebDataset,
        "parquet": ParquetImages,
    },
)
EMBEDDED = ("digits", "digit_scenes")
