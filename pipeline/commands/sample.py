"""The command `retort sample`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.commands.console import find_artifact, say_warning, store_option


@click.command(short_help="Sample images from a teacher or student.")
@click.argument("artifact", metavar="ARTIFACT|RUN/STAGE")
@click.option("--prompt", "-p", "prompts", multiple=True, required=True, help="A prompt. Repeat for several.")
@click.option("--count", "-n", type=click.IntRange(1), default=4, show_default=True, help="Images of each prompt.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--steps",
    type=click.IntRange(1, 1000),
    help="Sampling steps of a teacher (default: 50) or a consistency student (default: its own). For other students "
    "they are fixed.",
)
@click.option(
    "--guidance-scale",
    type=click.FloatRange(1.0),
    default=3.0,
    show_default=True,
    help="For a teacher, or a student that takes it as an input. Other students have a fixed scale.",
)
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("samples.png"), show_default=True)
@store_option
def sample(
    artifact: str,
    prompts: tuple[str, ...],
    count: int,
    seed: int,
    steps: int | None,
    guidance_scale: float,
    out: Path,
    store: str | None,
) -> None:
    """Sample images from a sealed teacher or student. Each prompt gets one row."""
    from pipeline.errors import UsageError
    from pipeline.store import load_artifact
    from stages.base import StageError

    found = load_artifact(find_artifact(artifact, store))
    try:
        from stages.reports.sampling import draw

        draw(found, list(prompts), count, seed, steps, guidance_scale, out, say_warning)
    except StageError as error:
        raise UsageError(str(error)) from None
    click.echo(f"{out}")
