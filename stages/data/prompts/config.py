"""Where prompts come from, as a manifest says it."""

from __future__ import annotations

import glob
import os
from pathlib import PurePath
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from stages.base import Choice, Config, Content
from stages.data.images.config import EMBEDDED, IMAGE_SETS, ImageSet

FORMATS = (".txt", ".csv", ".jsonl", ".parquet")
PATTERNS = tuple(f"**/*{suffix}" for suffix in FORMATS)
DEFAULT_COLUMN = "prompt"


class Prompts(Config):
    """`path`: a file, a folder or a glob of .txt (a prompt a line), .csv (with a header), .jsonl or .parquet files,
    the last three with their `column` of text; or `images`, an image set, for its captions.

    In a manifest a bare word means an embedded image set's captions, any other text a path.
    """

    path: Annotated[str | None, Content(files=PATTERNS)] = Field(
        None, description="a file, a folder or a glob such as `prompts/*.parquet`"
    )
    column: str | None = Field(
        None, description=f"column or key of the prompts in .csv, .jsonl and .parquet files; default: {DEFAULT_COLUMN}"
    )
    images: Annotated[ImageSet, Choice("name", IMAGE_SETS)] | None = Field(
        None, description="image set whose captions are the prompts, in place of a path"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"images": value} if value in EMBEDDED else {"path": value}
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.images is None):
            raise ValueError("give either path or images")
        suffix = PurePath(self.path or "").suffix.lower()
        several = glob.has_magic(self.path or "") or os.path.isdir(self.path or "")
        if suffix and suffix not in FORMATS and not several:
            raise ValueError(f"prompts are {', '.join(EMBEDDED)}, or {', '.join(FORMATS)} files, not {self.path!r}")
        if self.column is not None and (self.images is not None or suffix == ".txt"):
            raise ValueError("only .csv, .jsonl and .parquet files have a column")
        return self

    def __str__(self) -> str:
        return self.path or (self.images.name if self.images else "")
