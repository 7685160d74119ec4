"""Small packages with entry points for Retort, working ones and a broken one. `install` installs them with pip."""

import subprocess
import sys
import textwrap
from pathlib import Path

GOOD = {
    "counting.py": """
        import json
        from typing import Annotated, Literal
        from pydantic import Field
        from stages.base import Input, Stage

        class Count(Stage):
            \"""Counts pairs.\"""

            kind: Literal["count"]
            pairs: Annotated[str, Input("pairs")] = Field(description="what is counted")
            plus: int = Field(0, description="added to the number of pairs")

            def run(self, context):
                count = context.inputs["pairs"].record["metrics"]["count"] + self.plus
                (context.output / "count.json").write_text(json.dumps(count))
                return {"count": count}
        """,
    "methods.py": """
        from typing import Annotated, ClassVar, Literal
        from pydantic import Field
        from stages.base import Choice
        from stages.losses.config import LOSSES, LossConfig, Regression
        from stages.methods.base import MethodConfig

        class Squares(MethodConfig):
            \"""Regression by squares.\"""

            VERSION: ClassVar[int] = 1
            name: Literal["squares"] = "squares"
            loss: Annotated[LossConfig, Choice("name", LOSSES)] = Field(Regression(name="mse"), description="distance")

            def create(self, materials):
                from stages.methods.knowledge_distillation.method import KnowledgeDistillation

                return KnowledgeDistillation(materials.distance(self.loss), "v_prediction", materials)
        """,
    "losses.py": """
        from typing import Literal
        from stages.losses.config import LossConfig

        class FourthPower(LossConfig):
            \"""The fourth power of the difference.\"""

            name: Literal["fourth_power"] = "fourth_power"

            def create(self, materials):
                return lambda output, target: (output - target).pow(4).mean((1, 2, 3))
        """,
    "images.py": """
        from typing import Literal
        from stages.data.images.config import ImageSet

        class Stripes(ImageSet):
            \"""Black and white.\"""

            name: Literal["stripes"] = "stripes"
            size: Literal[8, 16] = 16

            def captions(self):
                yield from ("black", "white")

            def load(self, held_out):
                import numpy as np
                from stages.data.images.labelled import LabelledImages

                label = np.arange(6) % 2
                images = np.full((6, 3, self.size, self.size), 255, np.uint8) * label[:, None, None, None]
                captions = [("black", "white")[i] for i in label]
                return LabelledImages(images.astype(np.uint8), captions, {"label": label}, np.arange(6))
        """,
}
BAD = {
    "missing.py": "import a_package_that_nobody_has",
    "other.py": """
        from typing import Literal
        from stages.methods.base import MethodConfig

        class Other(MethodConfig):
            name: Literal["another"] = "another"

        class Prompted(MethodConfig):
            DATA = (frozenset({"prompts"}),)
            name: Literal["prompted"] = "prompted"

        plain = {"name": "plain"}
        """,
}
FAMILY = {"two_layer.py": (Path(__file__).parent / "two_layer.py").read_text(encoding="utf-8")}
PACKAGES = {
    "retort-family": (FAMILY, {"retort.teachers": {"TwoLayerPipeline": "two_layer:TwoLayerFlow"}}),
    "retort-good": (
        GOOD,
        {
            "retort.kinds": {"count": "counting:Count"},
            "retort.methods": {"squares": "methods:Squares", "knowledge_distillation": "methods:Squares"},
            "retort.losses": {"fourth_power": "losses:FourthPower"},
            "retort.image_sets": {"stripes": "images:Stripes"},
        },
    ),
    "retort-bad": (
        BAD,
        {
            "retort.kinds": {"runs": "other:Other"},
            "retort.teachers": {"MissingPipeline": "missing:Missing"},
            "retort.methods": {
                "squares": "other:Other",
                "missing": "missing:Missing",
                "absent": "other:Absent",
                "plain": "other:plain",
                "misnamed": "other:Other",
                "prompted": "other:Prompted",
            },
        },
    ),
}


def install(name: str, source: Path, target: Path) -> Path:
    """Write the package's sources to `source` and install it into `target` with pip, without a network."""
    modules, groups = PACKAGES[name]
    folder = source / name.replace("-", "_")
    folder.mkdir()
    (folder / "__init__.py").touch()
    for file, text in modules.items():
        (folder / file).write_text(textwrap.dedent(text))
    lines = ["[build-system]", 'requires = ["setuptools"]', 'build-backend = "setuptools.build_meta"']
    lines += ["[project]", f'name = "{name}"', 'version = "1.0"']
    for group, entries in groups.items():
        lines += [f'[project.entry-points."{group}"]']
        lines += [f'{entry} = "{folder.name}.{value}"' for entry, value in entries.items()]
    (source / "pyproject.toml").write_text("\n".join(lines) + "\n")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return target
