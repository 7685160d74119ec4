"""Makes the JSON Schema of a manifest, with which editors complete and check it. Plug-ins are included."""

from __future__ import annotations

import json
from typing import Any

from pipeline.manifest import Manifest
from pipeline.manifest.matrix import Matrix
from pipeline.reference.settings import about
from stages import KINDS

FILE = "retort.schema.json"
"""The name of the schema file beside a manifest. The first line of the manifest names it."""
LINE = f"# yaml-language-server: $schema={FILE}\n"
"""The first line of a manifest, with which the YAML language server of editors finds the schema."""


def schema() -> dict[str, Any]:
    """Return the schema (JSON Schema 2020-12).

    A setting that a matrix varies may be missing in the stage. So `required` is kept only for the key that names the
    class of a mapping, and for the settings of a stage without a matrix."""
    found = Manifest.model_json_schema()
    opening = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A manifest of Retort"}
    return {**opening, **_adapted(found), "required": found["required"]}


def _adapted(part: Any) -> Any:
    """Return a part of the schema without `required`, with a matrix in each stage, and without pydantic's titles.

    A union of plain types and settings becomes a condition, so that editors report what is wrong in the settings."""
    if isinstance(part, list):
        return [_adapted(one) for one in part]
    if not isinstance(part, dict):
        return part
    found = {k: _adapted(v) for k, v in part.items() if k != "title" or not isinstance(v, str)}
    plain = [one["type"] for one in found.get("anyOf", ()) if one.keys() == {"type"}]
    others = [one for one in found.get("anyOf", ()) if one.keys() != {"type"}]
    if plain and len(others) == 1:
        del found["anyOf"]
        found |= {"if": {"type": plain}, "else": others[0]}
    if found.get("additionalProperties") is False:
        needed = found.pop("required", [])
        if found["properties"].get("kind", {}).get("const") in KINDS:
            found["properties"]["matrix"] = {
                "type": "object",
                "additionalProperties": {"type": "array"},
                "description": about(Matrix),
            }
            found["anyOf"] = [{"required": needed}, {"required": ["kind", "matrix"]}]
    return found


def text() -> str:
    """Return the schema as JSON."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
