"""The columns of an evaluation's table: their names, order and texts. Needs no NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Figure(NamedTuple):
    title: str
    form: str


FIGURES = {
    # how a student was trained: only a comparison of students has these
    "method": Figure("method", "{}"),
    "training_steps": Figure("training steps", "{:,.0f}"),
    "trained_seconds": Figure("trained s", "{:,.0f}"),
    "device_seconds": Figure("device s", "{:,.0f}"),
    # what it costs and how good it is
    "network_calls": Figure("network calls", "{:g}"),
    "seconds_per_image": Figure("s / image", "{:.4f}"),
    "latent_mse": Figure("latent MSE to teacher", "{:.4f}"),
    "prompt_accuracy": Figure("prompt accuracy", "{:.3f}"),
    "frechet_distance": Figure("Fréchet distance", "{:.2f}"),
    "kernel_distance": Figure("kernel distance", "{:.4f}"),
    "precision": Figure("precision", "{:.3f}"),
    "recall": Figure("recall", "{:.3f}"),
    "diversity": Figure("diversity", "{:.2f}"),
}


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The figures that at least one of the rows has."""
    present = {key for row in rows for key in row}
    return [key for key in FIGURES if key in present]


def words(row: Mapping[str, Any], key: str) -> tuple[str, str]:
    """A figure and its spread; each empty where there is none. The spread is the standard error `KEY_se`, `± ...`; of
    a mean over seeds also the 95 % interval from `KEY_low` to `KEY_high`, `[..., ...]`."""
    if key not in row:
        return "", ""
    form = FIGURES[key].form.format
    spread = [f"± {form(row[f'{key}_se'])}"] if f"{key}_se" in row else []
    if f"{key}_low" in row:
        spread.append(f"[{form(row[f'{key}_low'])}, {form(row[f'{key}_high'])}]")
    return form(row[key]), " ".join(spread)


def title(side: str, values: Mapping[str, Any]) -> str:
    """What a side or a reference of `metrics.json` is called."""
    kind, _, steps = side.partition("_")
    steps = steps if kind == "teacher" else str(values.get("network_calls"))
    if kind in ("teacher", "student"):
        return f"{kind}, {steps} step{'s' if steps != '1' else ''}"
    return {"vae_reconstruction": "VAE reconstruction"}.get(side, side)


def calls(values: Mapping[str, Any]) -> str:
    """What a side costs, in words; empty for a reference."""
    count = words(values, "network_calls")[0]
    return f"{count} network call{'s' if count != '1' else ''}" if count else ""


def legend(metrics: Mapping[str, Any]) -> list[str]:
    """What the columns mean, a line each."""
    lines = [
        f"{metrics['samples']} samples a side, of the {metrics['split']} split; ± is one standard error.",
        "Latent MSE: to the teacher's own full-step output from the same noise; full-step rows are 0 by definition.",
        f"Seconds an image: in batches of {metrics['micro_batch']}, computed in {metrics['dtype']}, without decoding. "
        "Network calls count guidance's second half.",
    ]
    if "features" in metrics:
        lines += [
            f"Distances, precision, recall and diversity are at {metrics['distance_samples']} samples a side, in "
            f"{metrics['features']}: features of a classifier trained on real images. They are not FID.",
            "All distances are to real images that the classifier never saw. 'real': others that it never saw, at the "
            "same number of samples, the floor. 'VAE reconstruction': those through the VAE alone, the floor for every "
            "latent model of this teacher.",
            f"The classifier is right on {metrics['probe_accuracy']:.1%} of the images that it never saw.",
        ]
    return lines
