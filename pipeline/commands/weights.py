"""The command `retort import-weights`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.reference.completion import complete_published


@click.command("import-weights", short_help="Bring published E-LatentLPIPS weights into Retort's form.")
@click.argument("source", metavar="FILE|NAME", shell_complete=complete_published)
@click.argument("out", type=click.Path(path_type=Path))
def import_weights(source: str, out: Path) -> None:
    """Write a published E-LatentLPIPS checkpoint to the folder OUT, as a perceptual network in Retort's form.

    FILE is NAME_latest_vgg16_tuned.pth, as published; NAME alone (sd15, sd21, sdxl, sd3, flux) downloads it. The
    licence is CC BY-NC 4.0: not for commercial use.
    """
    from pipeline.errors import RetortError, UsageError, suggest
    from stages.base import StageError
    from stages.perceptual import importing

    path, named = Path(source), source in importing.PUBLISHED
    if out.exists():
        raise UsageError(f"{out} is there already; name another folder")
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
