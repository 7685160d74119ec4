"""Commands that use networks: `retort sample`, `export` and `import-weights`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.commands.console import find_artifact, say_warning, store_option
from pipeline.reference.completion import complete_published


@click.command(short_help="Sample images from a teacher or student.")
@click.argument("artifact", metavar="ARTIFACT|RUN/STAGE")
@click.option("--prompt", "-p", "prompts", multiple=True, required=True, help="A prompt. Repeat for several.")
@click.option(
    "--count", "-n", type=click.IntRange(1), default=4, show_default=True, help="Number of images of each prompt."
)
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
    from pipeline.store import load_artifact
    from stages.reports.sampling import draw

    found = load_artifact(find_artifact(artifact, store))
    draw(found, list(prompts), count, seed, steps, guidance_scale, out, say_warning)
    click.echo(f"{out}")


@click.command(short_help="Export a student as one file, as a pipeline, or as a LoRA for its teacher.")
@click.argument("student", metavar="ARTIFACT|RUN/STAGE")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--single-file", is_flag=True, help="One .safetensors file for ComfyUI, Automatic1111 and others.")
@click.option("--pipeline", is_flag=True, help="A diffusers pipeline. A LoRA student's LoRA is fused into its weights.")
@click.option(
    "--lora",
    "rank",
    type=click.IntRange(1),
    metavar="RANK",
    help="A folder with a LoRA of this rank. diffusers loads it onto the teacher.",
)
@store_option
def export(student: str, out: Path, single_file: bool, pipeline: bool, rank: int | None, store: str | None) -> None:
    """Export a sealed student to OUT, in another form than its diffusers folder. OUT must not exist yet.

    \b
    retort export digits/student student.safetensors --single-file
    retort export digits/student student-lora --lora 64
    retort export lora/student pipeline --pipeline

    A single file holds the network, the VAE and the text encoders in Stable Diffusion's original layout. It holds no
    scheduler: the command prints how to sample it.

    A LoRA is the difference between the weights of the student and the teacher, truncated to RANK. It loses some of the
    difference, and the command prints how much.
    """
    from pipeline.errors import UsageError
    from pipeline.store import load_artifact

    if single_file + pipeline + (rank is not None) != 1:
        raise UsageError("give one of --single-file, --pipeline and --lora RANK")
    if single_file and out.suffix != ".safetensors":
        raise UsageError(f"{out} should end in .safetensors: programs recognise the format by this suffix")
    if out.exists():
        raise UsageError(f"{out} already exists; give another path")
    found = load_artifact(find_artifact(student, store))
    if found.kind != "distill":
        raise UsageError(f"{found.folder} is of kind {found.kind}; only a student can be exported")
    out.parent.mkdir(parents=True, exist_ok=True)
    if rank is not None:
        from stages.distill.difference import write_lora

        how = write_lora(found, rank, out)
    else:
        from stages.distill.whole import write_pipeline, write_single_file

        how = write_single_file(found, out) if single_file else write_pipeline(found, out)
    click.echo(f"{out}\n{how}")


@click.command("import-weights", short_help="Convert published E-LatentLPIPS weights to Retort's format.")
@click.argument("source", metavar="FILE|NAME", shell_complete=complete_published)
@click.argument("out", type=click.Path(path_type=Path))
def import_weights(source: str, out: Path) -> None:
    """Convert a published E-LatentLPIPS checkpoint to a perceptual network in Retort's format, in the folder OUT.

    FILE is the published file NAME_latest_vgg16_tuned.pth. With a NAME instead (sd15, sd21, sdxl, sd3, flux), the file
    is downloaded. The licence is CC BY-NC 4.0: no commercial use.
    """
    from pipeline.errors import RetortError, UsageError, suggest
    from stages.base import StageError
    from stages.perceptual import importing

    named = source in importing.PUBLISHED
    if out.exists():
        raise UsageError(f"{out} already exists; give another folder")
    if not named and not Path(source).is_file():
        raise UsageError(f"{source} is neither a file nor a published network{suggest(source, importing.PUBLISHED)}")
    try:
        path = importing.download(source) if named else Path(source)
    except StageError as error:
        raise RetortError(str(error)) from None  # a failed download is not a usage error
    importing.import_weights(path, out)
    click.echo(f"{out}    licence: {importing.LICENCE}")
