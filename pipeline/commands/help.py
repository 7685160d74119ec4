"""Commands that help to write manifests and command lines: `retort init`, `explain`, `schema` and `completion`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.commands.console import json_option, print_result
from pipeline.reference.completion import complete_explained, complete_methods


@click.command(short_help="Write a commented manifest.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), default="retort.yaml")
@click.option(
    "--teacher",
    default="digits",
    show_default=True,
    metavar="digits|digit_scenes|FOLDER|HUB_ID",
    help="The teacher: digits or digit_scenes, which need no download; a diffusers folder; or a hub id such as "
    "owner/name.",
)
@click.option(
    "--method",
    default="knowledge_distillation",
    show_default=True,
    shell_complete=complete_methods,
    help="The distillation method.",
)
@click.option("--prompts", metavar="FILE", help="A file, folder or glob of prompts, for your own teacher.")
def init(file: Path, teacher: str, method: str, prompts: str | None) -> None:
    """Write a commented manifest to FILE, by default retort.yaml. With - as FILE, print it.

    Also write retort.schema.json beside it, with which editors complete and check the manifest.
    """
    from pipeline.errors import UsageError
    from pipeline.reference import schema
    from pipeline.reference.starter import PLACEHOLDER, manifest_text

    printed = str(file) == "-"
    text = manifest_text(teacher, method, prompts, "retort.yaml" if printed else str(file))
    if printed:
        click.echo(text, nl=False)
        return
    try:
        with open(file, "x", encoding="utf-8") as opened:
            opened.write(text)
        (file.parent / schema.FILE).write_text(schema.text(), encoding="utf-8")
    except FileExistsError:
        raise UsageError(f"{file} already exists; give another file, or delete it first") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from None
    rest = f"; replace {PLACEHOLDER} in it with your own file of prompts" if f" {PLACEHOLDER} #" in text else ""
    click.echo(f"{file} is written{rest}")
    click.echo(f"next: retort plan {file}    what would be done\n      retort submit {file}  do it")


@click.command(short_help="Explain a setting.")
@click.argument("name", required=False, shell_complete=complete_explained)
@click.option("--markdown", is_flag=True, help="Print the reference of all built-in settings: docs/manifest.md.")
@json_option
def explain(name: str | None, markdown: bool, as_json: bool) -> None:
    """Explain NAME and list its settings. NAME is a stage kind, a method, an image set, `sampler`, `training`, ...

    It may also be a path, such as pairs.sampler.steps. Without NAME, list all names.
    """
    from pipeline.reference import explain as explained

    if markdown:
        if name is not None or as_json:
            raise click.UsageError("--markdown prints everything; do not give NAME or --json")
        from pipeline.reference.markdown import page

        click.echo(page(), nl=False)
    elif name is None:
        print_result(as_json, explained.names(), explained.listing)
    else:
        found = explained.topics(name)
        print_result(as_json, [t.as_dict() for t in found], lambda: "\n\n".join(map(explained.text, found)))


@click.command("schema", short_help="Print the JSON Schema of a manifest, for editors.")
def print_schema() -> None:
    """Print the JSON Schema of a manifest, with all methods, losses and image sets that are installed.

    Editors with the YAML language server complete and check a manifest that begins with the line

    \b
    # yaml-language-server: $schema=retort.schema.json

    if retort.schema.json lies beside it: retort schema > retort.schema.json
    """
    from pipeline.reference import schema

    click.echo(schema.text(), nl=False)


@click.command(
    short_help="Print a shell's completion script.",
    epilog="""\b
To use it in every new shell, add one line:
  bash, to ~/.bashrc:   eval "$(retort completion bash)"
  zsh,  to ~/.zshrc:    eval "$(retort completion zsh)"
  fish, to ~/.config/fish/config.fish:   retort completion fish | source""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete commands, runs, stages and names of settings."""
    from click.shell_completion import shell_complete

    root = click.get_current_context().find_root().command
    shell_complete(root, {}, "retort", "_RETORT_COMPLETE", f"{shell}_source")
