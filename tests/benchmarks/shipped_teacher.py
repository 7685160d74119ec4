"""Trains the teachers that ship with Retort again, measures them, and compares.

    python -m tests.benchmarks.shipped_teacher NAME [--store FOLDER]       train again, measure both, print JSON
    python -m tests.benchmarks.shipped_teacher NAME --ship ARTIFACT        make a sealed teacher the shipped one
    python -m tests.benchmarks.shipped_teacher digit_scenes --draw docs/digit_scenes.png

NAME is digits or digit_scenes.

`kind: evaluate` measures the new and the shipped teacher on the same prompts and noises, with 1,024 pairs of 20 steps
at guidance 3. Also prints how far the teacher in few steps is from the teacher in all steps, in standard errors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from stages.evaluate import figures
from stages.teacher.config import SHIPPED

ABOUT = {
    "digits": """# digits: a small teacher, to see the whole method in minutes

A Stable-Diffusion-layout text-to-image pipeline of {millions:.2f} million parameters, 16 x 16 pixels: a handwritten
digit in one of six colours ("a red handwritten seven").""",
    "digit_scenes": """# digit_scenes: the teacher on which Retort compares losses and methods

A Stable-Diffusion-layout text-to-image pipeline of {millions:.2f} million parameters, 32 x 32 pixels: two handwritten
digits in two of six colours, one above or left of the other, before crops of photographs ("a red seven above a blue
two").""",
}
"""The first lines of their cards."""
PROMPTS = {"digits": "a red handwritten seven", "digit_scenes": "a red seven above a blue two"}
MEASURE = """
name: measure_{name}
store: {store}
stages:
  teacher: {{kind: teacher, from: {folder}}}
  pairs:
    kind: pairs
    teacher: teacher
    prompts: {images}
    count: 1024
    sampler: {{steps: 20, guidance_scale: 3.0}}
  probe: {{kind: probe, images: {images}}}
  quality: {{kind: evaluate, pairs: pairs, real: probe, samples: 1024}}
"""


def submit(manifest: Path, store: Path) -> dict[str, Path]:
    command = [sys.executable, "-m", "pipeline.cli", "submit", str(manifest), "--store", str(store), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {name: Path(stage["artifact"]) for name, stage in json.loads(done.stdout)["stages"].items()}


def manifest_of(name: str) -> Path:
    return Path(f"manifests/{name}_teacher.yaml")


def measure(name: str, images: str, folder: str, store: Path) -> dict:
    manifest = store / f"{name}.yaml"
    manifest.write_text(MEASURE.format(name=name, images=images, folder=folder, store=store), encoding="utf-8")
    made = submit(manifest, store)
    metrics = json.loads((made["quality"] / "metrics.json").read_text())
    full = metrics["sides"]["teacher_20"]
    result = {
        "prompt_accuracy": full["prompt_accuracy"],
        "frechet_distance": full["frechet_distance"],
        "frechet_distance_se": full["frechet_distance_se"],
        "recall": full["recall"],
        "probe_accuracy": metrics["probe_accuracy"],
        "page": str(made["quality"] / "index.html"),
    }
    for steps in (4, 2, 1):
        few = metrics["sides"][f"teacher_{steps}"]
        result[f"{steps}_steps_standard_errors_apart"] = {
            key: round(abs(few[key] - full[key]) / (few[f"{key}_se"] ** 2 + full.get(f"{key}_se", 0.0) ** 2) ** 0.5, 1)
            for key in ("frechet_distance", "kernel_distance", "latent_mse")
        }
    return result


def draw(name: str, out: Path) -> None:
    """Draw a figure. Its rows are held-out images, their reconstructions by the VAE, and the teacher's samples for the
    same captions in 20, 4, 2 and 1 steps of DDIM. All samples in a column start from one noise."""
    import numpy as np
    import torch
    from PIL import Image

    from stages.base import Execution
    from stages.data import pictures
    from stages.data.images.config import Digits, DigitScenes
    from stages.data.images.load import load
    from stages.data.noise import noise_for
    from stages.diffusion.config import Sampler
    from stages.networks.teachers import load_network, solve

    columns = 8
    teacher = load_network(SHIPPED / name, Execution())
    held_out = load({"digits": Digits, "digit_scenes": DigitScenes}[name](), held_out=True, limit=columns)
    real, prompts = torch.from_numpy(held_out.pixels()), held_out.captions
    noise = np.stack([noise_for(0, i, teacher.latent_shape, np.dtype(np.float32)) for i in range(columns)])
    with torch.inference_mode():
        images = {"held-out images": real, "VAE reconstructions": teacher.decode(teacher.encode(real))}
        for steps in (20, 4, 2, 1):
            label = figures.title(f"teacher_{steps}", {})
            images[label] = teacher.decode(solve(teacher, noise, prompts, Sampler(steps=steps)))
    rows = [(label, pictures.cut(Image.fromarray(pictures.strip(x.numpy())), columns)) for label, x in images.items()]
    pictures.figure(rows, prompts).save(out)


def ship(name: str, artifact: Path) -> None:
    """Write the shipped folder: float16, a card that names manifest, seed and commit."""
    import torch
    from diffusers import StableDiffusionPipeline

    record = json.loads((artifact / "artifact.json").read_text())
    if not record["commit"] or "dirty" in record["commit"]:
        raise SystemExit(f"{artifact} was made by {record['commit'] or 'no'} commit: train it in a clean checkout")
    target = SHIPPED / name
    shutil.rmtree(target, ignore_errors=True)
    pipeline = StableDiffusionPipeline.from_pretrained(
        artifact, torch_dtype=torch.float16, safety_checker=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(target, safe_serialization=True)
    for path in target.rglob("*.json"):  # without the path on the machine that made it
        values = json.loads(path.read_text())
        if values.pop("_name_or_path", None):
            path.write_text(json.dumps(values, indent=2) + "\n")
    metrics = record["metrics"]
    (target / "README.md").write_text(
        f"""---
library_name: diffusers
license: apache-2.0
---
{ABOUT[name].format(millions=sum(metrics["parameters_millions"].values()))}
It predicts v. Its weights are stored in float16; Retort computes with them in float32.

Made by `{manifest_of(name)}` with seed {record["seed"]} at commit
{record["commit"]} in {record["seconds"]:.0f} s (teacher/{record["fingerprint"]}, before
rounding to float16). Reconstruction MSE of the VAE on held-out images in [-1, 1]:
{metrics["vae_reconstruction_mse"]:.4f}. `python -m tests.benchmarks.shipped_teacher {name}` trains it again.

The digits ship with scikit-learn (UCI, Alpaydin and Kaynak 1998), the photographs with scikit-learn and scikit-image.

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("THIS FOLDER", torch_dtype=torch.float32)
image = pipeline("{PROMPTS[name]}", num_inference_steps=20, guidance_scale=3.0).images[0]
```
""",
        encoding="utf-8",
    )
    print(f"{target}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(ABOUT))
    parser.add_argument("--store", type=Path, default=None)
    parser.add_argument("--ship", type=Path, default=None)
    parser.add_argument("--draw", type=Path, default=None, help="reconstructions and samples, as a picture")
    parser.add_argument("--only-shipped", action="store_true", help="measure the shipped one, train nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.name, arguments.draw)
        return
    if arguments.ship:
        ship(arguments.name, arguments.ship)
        return
    store = arguments.store or Path(tempfile.mkdtemp())
    store.mkdir(parents=True, exist_ok=True)
    result = {"shipped": measure("shipped", arguments.name, arguments.name, store)}
    if not arguments.only_shipped:
        again = submit(manifest_of(arguments.name), store)["teacher"]
        result["again"] = measure("again", arguments.name, str(again), store)
        result["seconds_to_train"] = json.loads((again / "artifact.json").read_text())["seconds"]
        a, b = result["shipped"], result["again"]
        spread = (a["frechet_distance_se"] ** 2 + b["frechet_distance_se"] ** 2) ** 0.5
        result["frechet_standard_errors_apart"] = round(abs(a["frechet_distance"] - b["frechet_distance"]) / spread, 2)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
