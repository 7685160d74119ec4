"""Settings of image sets. Imports no NumPy, because planning does not need it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.base import Config, Content, Neutral
from stages.registry import Registry

if TYPE_CHECKING:
    from stages.data.images.files import Example
    from stages.data.images.labelled import LabelledImages


class ImageSet(Config):
    """Images with captions, and in some sets with classes. All images are RGB and square, with sides of `size` pixels.

    An image set of a plug-in implements `captions` and `load`, or derives from FileSet and implements `examples`.
    """

    name: str
    size: int = Field(ge=8, description="width and height in pixels")

    @property
    def labelled(self) -> bool:
        """Whether the images have class labels."""
        return False

    def captions(self) -> Iterator[str]:
        """Yield every caption that the set can have."""
        raise TypeError(f"{type(self).__name__} does not implement captions()")

    def load(self, held_out: bool) -> LabelledImages:
        """Return the training images, or with `held_out` the held-out ones. They depend only on the settings."""
        raise TypeError(f"{type(self).__name__} does not implement load()")


class Digits(ImageSet):
    """Scans of handwritten digits in six colours, with captions such as "a red handwritten seven". The set is included
    in Retort: nothing is downloaded."""

    name: Literal["digits"] = "digits"
    digits_per_image: Literal[1, 2] = Field(
        1, description="number of digits in an image; two are side by side, or one above the other"
    )
    size: Literal[16, 32] = Field(16, description="width and height in pixels")
    background: Literal["plain", "photographs"] = Field(
        "plain", description="plain is black; photographs are crops of real ones"
    )
    named: Annotated[Literal["all", "first", "digit", "colour"], Neutral()] = Field(
        "all",
        description="what captions name; all: every digit with its colour; first: only the first of two digits, as in "
        "`a red seven`; digit: the right digit with a random colour; colour: the right colour with a random digit",
    )

    @model_validator(mode="after")
    def _names_one_of_two(self) -> Self:
        if self.named == "first" and self.digits_per_image == 1:
            raise ValueError("named: first needs digits_per_image: 2")
        if self.named in ("digit", "colour") and self.digits_per_image == 2:
            raise ValueError(f"named: {self.named} needs digits_per_image: 1")
        return self

    @property
    def labelled(self) -> bool:
        return True

    def captions(self) -> Iterator[str]:
        from stages.data.images import digits

        return iter(digits.captions(self.digits_per_image, self.named))

    def load(self, held_out: bool) -> LabelledImages:
        from stages.data.images import digits

        return digits.load(self.digits_per_image, self.size, self.background, held_out, self.named)


class DigitScenes(Digits):
    """The set `digits` with other defaults: two digits in front of photographs, 32 pixels wide. Retort compares losses
    and methods on it."""

    name: Literal["digit_scenes"] = "digit_scenes"  # type: ignore[assignment]
    digits_per_image: Literal[1, 2] = Field(2, description=Digits.model_fields["digits_per_image"].description)
    size: Literal[16, 32] = Field(32, description=Digits.model_fields["size"].description)
    background: Literal["plain", "photographs"] = Field(
        "photographs", description=Digits.model_fields["background"].description
    )


class FileSet(ImageSet):
    """Your own images. Each is scaled so that its shorter side has `size` pixels, then cropped to the middle square.

    `caption` and `label` say where the data holds captions and classes; null means that there are none.
    """

    size: int = Field(ge=8, description="width and height in pixels; images are scaled, and the middle square is kept")
    path: Annotated[str, Content()] = Field(description="path of the images")
    hold_out_every: int = Field(10, ge=2, description="interval of held-out images: 10 holds out every tenth")
    caption: str | None = Field(None, description="where the caption is stored; null if there are none")
    label: str | None = Field(None, description="where the class is stored; null if there are none")

    @property
    def labelled(self) -> bool:
        return self.label is not None

    def examples(self) -> Iterator[Example]:
        """Yield all images in order, still encoded.

        Raises StageError for an image that cannot be read, and FileNotFoundError if the path does not exist.
        """
        raise TypeError(f"{type(self).__name__} does not implement examples()")


class ImageFolder(FileSet):
    """A folder of images in the layout of Hugging Face's imagefolder.

    `metadata.csv` or `metadata.jsonl` has one row for each image, with `file_name` and further columns. Without such a
    file, set `caption` to txt (a text file beside each image) or null, and `label` to folder (CLASS/NAME.JPEG, as in
    ImageNet) or null.
    """

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
    """Images in webdataset format: a .tar file, a folder of .tar files, or a glob. The members of a sample are its
    image, caption and class."""

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
    """Images in Parquet, as Hugging Face stores image datasets: a .parquet file, a folder of them, or a glob."""

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
