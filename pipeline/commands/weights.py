"""The command `retort import-weights`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.reference.completion import complete_published


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

    path, named = Path(source), source in importing.PUBLISHED
    if out.exists():
        raise UsageError(f"{out} already exists; give another folder")
    if not named and not path.is_file():
        raise UsageError(f"{source} is neither a file nor a published network{suggest(source, importing.PUBLISHED)}")
    if named:
        try:
            path = importing.download(source)
        except StageError as error:
            raise RetortError(str(error)) from None
    try:
        importing.import_weights(path, out)
    except StageError as error:
        raise UsageError(str(error)) from None
    click.echo(f"{out}    licence: {importing.LICENCE}")
