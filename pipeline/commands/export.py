"""The command `retort export`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.commands.console import find_artifact, store_option


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
    from stages.base import StageError

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
    try:
        if rank is not None:
            from stages.distill.difference import write_lora

            how = write_lora(found, rank, out)
        else:
            from stages.distill.whole import write_pipeline, write_single_file

            how = write_single_file(found, out) if single_file else write_pipeline(found, out)
    except StageError as error:
        raise UsageError(str(error)) from None
    click.echo(f"{out}\n{how}")
