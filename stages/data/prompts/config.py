"""Settings of prompts."""

from __future__ import annotations

import glob
import os
from pathlib import PurePath
from typing import Annotated, Any, Self

from pydantic import Field, GetJsonSchemaHandler, model_validator

from stages.base import Choice, Config, Content
from stages.data.images.config import EMBEDDED, IMAGE_SETS, ImageSet

FORMATS = (".txt", ".csv", ".jsonl", ".parquet")
PATTERNS = tuple(f"**/*{suffix}" for suffix in FORMATS)
DEFAULT_COLUMN = "prompt"


class Prompts(Config):
    """Prompts from files (`path`), or the captions of an image set (`images`).

    `path` is a file, a folder or a glob of .txt, .csv, .jsonl or .parquet files. A .txt file has one prompt on each
    line. A .csv file has a header. In files other than .txt, `column` names the column or key of the prompts.

    In a manifest, a text instead of settings is a path, except for digits and digit_scenes, which mean the captions of
    these image sets.
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

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(schema)]}

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
