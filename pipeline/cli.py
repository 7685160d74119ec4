"""The command `retort`. Only click is imported at the top, so that --help is fast."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

import click

from pipeline.commands.cluster import stop
from pipeline.commands.compare import compare
from pipeline.commands.help import completion, explain, init, print_schema
from pipeline.commands.networks import export, import_weights, sample
from pipeline.commands.runs import gc, logs, runs, status
from pipeline.commands.shards import shards, stats, verify
from pipeline.commands.submit import plan, resume, submit
from pipeline.errors import INTERRUPTED


class InOrder(click.Group):
    """A group that lists its commands in the order in which they were added, not by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="retort", prog_name="retort")
def cli() -> None:
    """Distil slow diffusion teachers into one- and few-step students.

    \b
    retort submit manifests/digits.yaml    run a pipeline
    retort resume RUN [STAGE]              continue a run that was interrupted or failed
    retort stats SHARDS                    show what is in a dataset of pairs
    """


for _command in (
    *(submit, resume, plan, stop, status, logs, runs, gc),
    *(stats, verify, shards, compare, sample, export, import_weights, init, explain, print_schema, completion),
):
    cli.add_command(_command)


def _interrupt(*_: object) -> NoReturn:
    """Handle SIGTERM like Ctrl-C: end, and keep what is finished."""
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a stage failed, 2 invalid manifest or usage, 3 locked,
    130 interrupted and resumable."""
    debug = "--debug" in sys.argv
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(cli.main(prog_name="retort", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(INTERRUPTED)
    except Exception as error:
        from pipeline.engines import describe
        from pipeline.errors import ManifestError, RetortError, UsageError
        from stages.base import StageError
        from stages.data.urls import redacted

        if isinstance(error, StageError):  # outside a stage, it means unsuitable arguments
            error = UsageError(str(error))
        if debug or not isinstance(error, RetortError | OSError):
            raise
        # problems of a manifest begin with file:line:column, so that editors can link to them
        prefix = "" if isinstance(error, ManifestError) else "retort: "
        text = str(error) if isinstance(error, RetortError) else describe(error)
        click.echo(redacted(f"{prefix}{text}"), err=True)
        sys.exit(error.exit_code if isinstance(error, RetortError) else 1)


if __name__ == "__main__":
    main()
