"""Commands for clusters: the option `--address` of `submit` and `resume`, and `retort stop`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.commands import console
from pipeline.reference.completion import complete_runs_or_paths

if TYPE_CHECKING:
    from pipeline.jobs import Job
    from pipeline.manifest import Loaded
    from pipeline.planning import Selection
    from pipeline.runs import Run
    from pipeline.store.locks import Holder

F = TypeVar("F", bound=Callable[..., Any])

STOP_FOR = 60.0
"""Seconds after SIGTERM within which a driver on this machine must interrupt its stage and stop its Ray."""


@dataclass(frozen=True)
class Cluster:
    """The cluster that a run is submitted to: the dashboard's address, and the other options."""

    address: str
    no_wait: bool
    store_is_shared: bool


def cluster_options(command: F) -> F:
    """Add the options for a cluster to a command. It gets them as one argument `cluster`, a Cluster or None."""

    @click.option("--address", metavar="URL", help="Run on the Ray cluster of this dashboard: http://HEAD:8265.")
    @click.option("--no-wait", is_flag=True, help="With --address: submit the job and do not follow it.")
    @click.option("--store-is-shared", is_flag=True, help="With --address: every node has the store at the same path.")
    @wraps(command)
    def with_cluster(*args: Any, address: str | None, no_wait: bool, store_is_shared: bool, **others: Any) -> Any:
        if address is None and (no_wait or store_is_shared):
            raise click.UsageError("--no-wait and --store-is-shared need --address")
        cluster = None
        if address is not None:
            from pipeline.jobs.dashboard import checked

            cluster = Cluster(checked(address), no_wait, store_is_shared)
        return command(*args, cluster=cluster, **others)

    return with_cluster  # type: ignore[return-value]


def run_on(
    cluster: Cluster, loaded: Loaded, name: str, selection: Selection, how: console.Execution, follow: bool = False
) -> None:
    """Plan a run on this machine, and submit it to the cluster as a job. If the run already has a job under way, raise
    Locked; with `follow`, follow that job.

    At the end of the job, exit with its driver's exit code. With --no-wait, print how to follow the job.
    """
    from pipeline import jobs
    from pipeline.errors import Locked
    from pipeline.jobs.dashboard import Unreachable
    from pipeline.runs import Run

    run = Run(console.open_store(loaded.manifest.store), name)
    job, under_way = jobs.load(run), False
    try:
        under_way = job is not None and jobs.alive(job)
    except Unreachable:
        if job and job.address == cluster.address:
            raise  # another cluster may be gone; a driver that still runs there holds the run's lock
    if job is None or not under_way:
        jobs.check_store(run.store.root, cluster.address, cluster.store_is_shared)
        with console.held(loaded, run, selection, how.wait):
            pass  # this makes and stores the plan; the job then carries it out
        console.ignore_overrides(f"--address {cluster.address} is used")
        given = {"--only": selection.only, "--from": selection.onward}
        arguments = [word for option, names in given.items() for name in names for word in (option, name)]
        job = jobs.submit(run, cluster.address, [*arguments, *(["--wait"] if how.wait else [])])
    elif not follow or job.address != cluster.address or selection.given or selection.force:
        raise Locked(
            f"run {run.name} is job {job.id} of {job.address}, which is still under way; it makes the stages that were "
            f"chosen when it was submitted; {_how(run, job)}"
        )
    else:
        click.echo(f"job {job.id} is still under way: following it", err=True)
    if cluster.no_wait:
        result = {"run": run.name, "job": job.id, "address": job.address}
        console.print_result(how.as_json, result, lambda: f"submitted as job {job.id}; {_how(run, job)}")
        return
    try:
        # with --json, standard output is only for the result
        code = jobs.follow(job, lambda text: click.echo(text, nl=False, err=how.as_json))
    except KeyboardInterrupt:
        click.echo(f"\nno longer following; job {job.id} goes on; {_how(run, job)}", err=True)
        raise
    if code:
        sys.exit(code)
    if how.as_json:
        console.show_done(run, console.plan_run(run.manifest(), run), how.as_json)


def _how(run: Run, job: Job) -> str:
    """Say with which commands the job is followed and stopped."""
    from stages.data.urls import redacted

    return (
        f"follow it with: retort resume {run.name} --store {run.store.root} --address {redacted(job.address)}, "
        f"stop it with: retort stop {run.name} --store {run.store.root}"
    )


@click.command(short_help="Stop a run, on this machine or in a cluster.")
@click.argument("run_name", metavar="[RUN]", required=False, shell_complete=complete_runs_or_paths)
@console.store_option
def stop(run_name: str | None, store: str | None) -> None:
    """Stop RUN, on this machine or in a cluster. It can be resumed."""
    from pipeline import jobs
    from pipeline.errors import UsageError
    from pipeline.jobs.dashboard import Unreachable

    run = console.find_run(run_name, store)
    job, in_cluster = jobs.load(run), False
    try:
        in_cluster = job is not None and jobs.alive(job)
    except Unreachable as error:
        click.echo(f"job {job and job.id}: {error}", err=True)
    if job and in_cluster:
        driver = run.driver()
        jobs.stop(job)
        _explain_kill(run, driver)
    elif driver := run.driver():
        _stop_driver(run, driver)
    else:
        raise UsageError(f"run {run.name} is not running (store {run.store.root})")
    click.echo(f"stopped; carry on with: retort resume {run.name} --store {run.store.root}")


def _explain_kill(run: Run, driver: Holder | None) -> None:
    """If a job was killed while its driver was at work, say so, and how to give it more time."""
    last = [event["event"] for event in run.events()][-1:]
    if driver and not {"run_interrupted", "run_done", "stage_failed"}.intersection(last):
        click.echo(
            "Ray killed the driver before it could end by itself. Nothing is lost. To give it more time, set "
            "RAY_JOB_STOP_WAIT_TIME_S (seconds; 3 by default) when starting the head node",
            err=True,
        )


def _stop_driver(run: Run, driver: Holder) -> None:
    """Stop a driver on this machine with SIGTERM, and wait until it has ended.

    Raises UsageError if it is on another machine or belongs to another user, and StageFailed if it does not end.
    """
    from pipeline.errors import StageFailed, UsageError

    if driver.host != socket.gethostname():
        raise UsageError(f"run {run.name} is driven by process {driver.pid} on {driver.host}: stop it there")
    try:
        os.kill(driver.pid, signal.SIGTERM)
    except ProcessLookupError:
        return  # it ended by itself
    except PermissionError:
        raise UsageError(f"process {driver.pid}, which drives run {run.name}, belongs to another user") from None
    deadline = time.monotonic() + STOP_FOR
    while run.driver() == driver:
        if time.monotonic() > deadline:
            raise StageFailed(f"process {driver.pid} still drives run {run.name}, {STOP_FOR:.0f} s after SIGTERM")
        time.sleep(0.1)
