"""The columns of an evaluation's table: names, order, titles and number formats. Needs no NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """The title of a column and the format of its numbers."""

    title: str
    form: str


FIGURES = {
    # how a student was trained; only comparisons of students have these
    "method": Figure("method", "{}"),
    "training_steps": Figure("training steps", "{:,.0f}"),
    "trained_seconds": Figure("trained s", "{:,.0f}"),
    "device_seconds": Figure("device s", "{:,.0f}"),
    # cost and quality
    "network_calls": Figure("network calls", "{:g}"),
    "seconds_per_image": Figure("s / image", "{:.4f}"),
    "latent_mse": Figure("latent MSE to teacher", "{:.4f}"),
    "prompt_accuracy": Figure("prompt accuracy", "{:.3f}"),
    "accuracy_of_digit": Figure("of the digit", "{:.3f}"),
    "accuracy_of_colour": Figure("of the colour", "{:.3f}"),
    "frechet_distance": Figure("Fréchet distance", "{:.2f}"),
    "kernel_distance": Figure("kernel distance", "{:.4f}"),
    "precision": Figure("precision", "{:.3f}"),
    "recall": Figure("recall", "{:.3f}"),
    "diversity": Figure("diversity", "{:.2f}"),
    "fid": Figure("FID", "{:.2f}"),
    "kid": Figure("KID", "{:.5f}"),
    "inception_precision": Figure("precision (Inception)", "{:.3f}"),
    "inception_recall": Figure("recall (Inception)", "{:.3f}"),
    "patch_fid": Figure("patch FID", "{:.2f}"),
    "fd_dinov2": Figure("FD-DINOv2", "{:.1f}"),
    "clip_score": Figure("CLIP score", "{:.2f}"),
    "lpips_diversity": Figure("LPIPS diversity", "{:.3f}"),
    "nearest_mse": Figure("MSE to nearest", "{:.4f}"),
    # only for particles, and for the teacher's samples beside them
    "image_distance": Figure("image distance", "{:.3f}"),
    "saturation": Figure("saturation", "{:.3f}"),
    "contrast": Figure("contrast", "{:.3f}"),
}


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the figures that at least one row has, in the order of FIGURES."""
    present = {key for row in rows for key in row}
    return [key for key in FIGURES if key in present]


def words(row: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Return a figure and its uncertainty as text. Each is empty if the row does not have it.

    The uncertainty is the standard error `KEY_se` as `± ...`. A mean over seeds also has the 95 % interval from
    `KEY_low` to `KEY_high` as `[..., ...]`.
    """
    if key not in row:
        return "", ""
    form = FIGURES[key].form.format
    spread = [f"± {form(row[f'{key}_se'])}"] if f"{key}_se" in row else []
    if f"{key}_low" in row:
        spread.append(f"[{form(row[f'{key}_low'])}, {form(row[f'{key}_high'])}]")
    return form(row[key]), " ".join(spread)


def table(rows: Sequence[tuple[str, str, str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return a table of figures, for the macro `figures` of the templates. rows: class, name, note and figures."""
    shown = columns(values for *_, values in rows)
    cells = [(kind, name, note, [words(values, key) for key in shown]) for kind, name, note, values in rows]
    return {"titles": [FIGURES[key].title for key in shown], "rows": cells}


def title(side: str, values: Mapping[str, Any]) -> str:
    """Return the title of a side or reference in `metrics.json`."""
    kind, _, steps = side.partition("_")
    steps = steps if kind == "teacher" else str(values.get("network_calls"))
    if kind in ("teacher", "student"):
        return f"{kind}, {steps} step{'s' if steps != '1' else ''}"
    return {"vae_reconstruction": "VAE reconstruction"}.get(side, side)


def calls(values: Mapping[str, Any]) -> str:
    """Return the number of network calls for an image, as text. Empty for a reference."""
    count = words(values, "network_calls")[0]
    return f"{count} network call{'s' if count != '1' else ''}" if count else ""


def subject(metrics: Mapping[str, Any]) -> str | None:
    """Return the side that is measured beside the teacher: student or particles. None if it is the teacher alone."""
    return next((name for name in ("student", "particles") if metrics.get(name)), None)


def legend(metrics: Mapping[str, Any]) -> list[str]:
    """Return the lines that explain the columns."""
    if subject(metrics) == "particles":
        return _legend_of_particles(metrics)
    lines = [
        f"Each side has {metrics['samples']} samples of the {metrics['split']} split. ± is one standard error.",
        "Latent MSE is the error to the latents of the teacher in full steps from the same noises, so it is 0 for the "
        "teacher in full steps.",
        f"Seconds per image are measured in batches of {metrics['micro_batch']}, computed in {metrics['dtype']}, "
        "without decoding. Network calls include the unconditional calls of guidance.",
    ]
    if any("nearest_mse" in side for side in metrics["sides"].values()):
        lines.append(
            "MSE to nearest is the error to the nearest image of the exact teacher's set. It is almost 0 for memorised "
            "images. For images that are as new as held-out ones, it is about that of 'VAE reconstruction'."
        )
    if "reference" in metrics:
        about = metrics["reference"]
        lines.append(
            f"FID, KID, patch FID, FD-DINOv2, CLIP score and LPIPS diversity are measured with preset "
            f"{about['preset']} and {about['images']:,} real images. The sha256 of the networks' weights: "
            f"{', '.join(f'{name} {sha256}' for name, sha256 in about['weights_sha256'].items()) or 'none given'}."
        )
    if "features" in metrics:
        lines += [
            f"Distances, precision, recall and diversity use {metrics['distance_samples']} samples of each side, and "
            f"{metrics['features']}: features of a classifier trained on real images. They are not FID.",
            "All distances are to held-out real images, on which the classifier was not trained. The row 'real' "
            "measures as many other held-out images: this is the lowest distance to expect. The row 'VAE "
            "reconstruction' measures these other images after encoding and decoding: this is the lowest distance to "
            "expect of a latent model with this VAE.",
            f"The classifier is right on {metrics['probe_accuracy']:.1%} of the images that it was not trained on.",
        ]
    return lines


def _legend_of_particles(metrics: Mapping[str, Any]) -> list[str]:
    """Return the lines that explain the columns of particles."""
    lines = [
        f"Each side has {metrics['samples']} images of the same prompt. ± is one standard error over the images.",
        "Image distance is the root mean squared difference of two images in [-1, 1], averaged over all pairs of one "
        "side. Saturation is the mean saturation in HSV. Contrast is the standard deviation of the luma in [0, 1].",
    ]
    if any("nearest_mse" in side for side in metrics["sides"].values()):
        lines.append(
            "MSE to nearest is the mean squared error between the encoded image and the nearest image of the exact "
            "teacher's set."
        )
    if "features" in metrics:
        lines.append(
            f"Prompt accuracy and diversity use {metrics['features']}: a classifier trained on real images, which is "
            f"right on {metrics['probe_accuracy']:.1%} of those that it was not trained on. Diversity is the mean "
            "distance between the features of two images."
        )
    return lines
