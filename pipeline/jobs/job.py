"""Submit, follow and stop runs as jobs of a Ray cluster.

A job executes `retort resume`. The state of a run is in the store, not in Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.engines.nodes import OVERRIDES, build, needs
from pipeline.errors import INTERRUPTED, StageFailed, UsageError
from pipeline.jobs import dashboard
from pipeline.runs import Run
from stages.data.files import write_atomically

MOUNTS = Path("/proc/mounts")
"""Where Linux lists the mounted file systems."""
SHARED = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "fhgfs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "ocfs2"),
    *("orangefs", "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs"),
)
"""Types of file systems that several machines may mount. Types that begin with `fuse.` count too, except that of
containers."""

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
"""The final states of a job."""
NOT_FOUND = 127
"""The exit code of a shell that cannot find the command."""

SILENCE = 60.0
"""Seconds without a line after which the connection to a log is renewed. A half-open connection reports no error."""

LOST_FOR = 300.0
"""Seconds without contact to the cluster after which following the job is given up."""

PAUSE, LONGEST_PAUSE = 0.5, 10.0
"""Seconds between two attempts to connect: the first pause, and the longest. The pause doubles each time."""

STOP_FOR = 60.0
"""Seconds to wait for a job to end. Ray kills it RAY_JOB_STOP_WAIT_TIME_S seconds (default 3) after it was asked to
stop."""


@dataclass(frozen=True)
class Job:
    """A run that was submitted to a cluster, as STORE/runs/NAME/job.json holds it.

    `address` is the address of the dashboard, `id` the name of the job in Ray, `submitted` a UTC time, and `ray` the
    version of Ray in the cluster.
    """

    run: str
    address: str
    id: str
    submitted: str
    ray: str


def load(run: Run) -> Job | None:
    """The run's latest job, which may have ended long ago. None if there is none, or if job.json cannot be read."""
    try:
        return Job(**json.loads((run.folder / "job.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def submit(run: Run, address: str, arguments: Sequence[str]) -> Job:
    """Submit `run`, whose plan is stored already, to the cluster. `arguments` are added to `retort resume`.

    Raises UsageError for an unsuitable token or version of Ray. Raises StageFailed if the cluster does not accept the
    job.
    """
    ray, now = dashboard.same_ray(address), datetime.now(UTC)
    name = f"retort-{run.name}-{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}"
    job = Job(run.name, address, name, now.isoformat(timespec="seconds"), ray)
    command = ["retort", "resume", run.name, *arguments, "--store", str(run.store.root), "--engine", "attached"]
    # written before the job is submitted, so that every running job is on record
    write_atomically(run.folder / "job.json", json.dumps(asdict(job), indent=2).encode("utf-8"))
    try:
        _client(address).submit_job(
            entrypoint=shlex.join([*command, "--submitted-by", build()]),
            submission_id=name,
            metadata={"retort_run": run.name, "retort_store": str(run.store.root), "retort_build": build()},
        )
    except (RuntimeError, OSError) as error:
        raise StageFailed(f"the cluster at {address} did not accept the job: {error}") from error
    return job


def alive(job: Job) -> bool:
    """Whether the job waits or runs. Raises Unreachable."""
    found = dashboard.ask(job.address, f"/api/jobs/{job.id}")
    return found is not None and found["status"] not in ENDED


def follow(job: Job, write: Callable[[str], None]) -> int:
    """Write the job's log as it grows, until the job ends. Return the exit code of its driver. Lost connections are
    renewed.

    Raises StageFailed if no driver started, or if the cluster is gone or does not know the job.
    """
    log, client = _Log(job, write), _client(job.address)
    pause, last_contact, told = PAUSE, time.monotonic(), False
    while True:
        before, lost = log.written, asyncio.run(log.read(client))
        try:
            found = _info(job)
            if found["status"] in ENDED:
                log.write_rest()
                return _exit_code(job, found)
            last_contact = time.monotonic()
        except dashboard.Unreachable as error:
            lost = str(error)
            if time.monotonic() - last_contact > LOST_FOR:
                raise StageFailed(f"{lost}\njob {job.id} may still run: resume with --address to follow it") from None
        if log.written > before:
            pause, told = PAUSE, False
        if lost and not told:
            told = True
            print(f"connection lost, trying again ({lost})", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


class _Log:
    """Writes a job's log as it grows. It counts the characters that it has written, because each new connection starts
    at the beginning of the log."""

    def __init__(self, job: Job, write: Callable[[str], None]) -> None:
        self.job, self._write, self.written = job, write, 0

    async def read(self, client: Any) -> str:
        """Write the log until the connection ends. Return why it was lost, or an empty string."""
        position, chunks = 0, client.tail_job_logs(self.job.id)
        while True:
            try:
                text = await asyncio.wait_for(anext(chunks), SILENCE)
            except (StopAsyncIteration, TimeoutError):
                return ""
            except Exception as error:  # of Ray, of aiohttp or of the system: `follow` looks at the job's state next
                return str(error) or type(error).__name__
            self._write_from(position, text)
            position += len(text)

    def write_rest(self) -> None:
        """Write the rest of the log of a job that has ended. Raises Unreachable."""
        found = dashboard.ask(self.job.address, f"/api/jobs/{self.job.id}/logs")
        self._write_from(0, found["logs"] if found else "")

    def _write_from(self, position: int, text: str) -> None:
        new = text[max(0, self.written - position) :]
        if new:
            self._write(new)
            self.written += len(new)


def stop(job: Job) -> None:
    """Stop the job and wait until it has ended. Raises StageFailed if it does not end."""
    client, deadline = _client(job.address), time.monotonic() + STOP_FOR
    try:
        client.stop_job(job.id)
    except RuntimeError as error:
        raise StageFailed(f"the cluster at {job.address} did not stop job {job.id}: {error}") from error
    while (status := str(_info(job)["status"])) not in ENDED:
        if time.monotonic() > deadline:
            raise StageFailed(f"job {job.id} is still {status.lower()} after {STOP_FOR:.0f} s")
        time.sleep(PAUSE)


def check_store(root: Path, address: str, store_is_shared: bool) -> None:
    """Raise UsageError if `root` is on a disk of this machine alone, and the cluster is on other machines."""
    kind = file_system(root)
    if store_is_shared or kind is None or kind in SHARED or _is_here(address):
        return
    if kind.startswith("fuse.") and kind != "fuse.fuse-overlayfs":
        return
    raise UsageError(
        f"the store {root} is on a disk of this machine ({kind}), which the nodes of {address} do not see: "
        "name a shared folder with --store, or add --store-is-shared if every node does see it at this path"
    )


def file_system(path: Path, mounts: Path = MOUNTS) -> str | None:
    """The type of the file system that holds `path`, which need not exist; None if the system does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    path, longest, kind = path.resolve(), 0, None
    for fields in map(str.split, lines):
        mount = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1])
        if path.is_relative_to(mount) and len(mount) >= longest:  # of two mounts at one path, the later hides the other
            longest, kind = len(mount), fields[2]
    return kind


def _is_here(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    return host in ("localhost", "::1", socket.gethostname().lower()) or host.startswith("127.")


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)  # it logs each closed connection
    for variable in OVERRIDES:
        os.environ.pop(variable, None)
    try:
        return JobSubmissionClient(address, headers=dashboard.headers())
    except (RuntimeError, OSError) as error:
        raise dashboard.Unreachable(f"the dashboard at {address} does not take jobs: {error}") from error


def _info(job: Job) -> dict[str, Any]:
    """The dashboard's information about the job. Raises Unreachable, or StageFailed if the cluster does not know the
    job."""
    found: dict[str, Any] | None = dashboard.ask(job.address, f"/api/jobs/{job.id}")
    if found is None:
        raise StageFailed(
            f"the cluster at {job.address} does not know job {job.id}; "
            "the cluster may have been restarted: resume the run"
        )
    return found


def _exit_code(job: Job, found: dict[str, Any]) -> int:
    code = found.get("driver_exit_code")
    if found["status"] == "SUCCEEDED":
        return 0
    if found["status"] == "STOPPED":
        return INTERRUPTED
    if code is None:
        why = str(found.get("message") or "").strip()
        raise StageFailed(f"job {job.id} did not start: {why}\nevery node needs {needs()}")
    if code == NOT_FOUND:
        raise StageFailed(f"job {job.id} found no `retort` on the PATH of its node: every node needs {needs()}")
    return int(code) if code > 0 else 128 - int(code)
