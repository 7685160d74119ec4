"""Submit, follow and stop runs as jobs of a Ray cluster.

A job executes `retort resume`. The state of a run is in the store, not in Ray.
"""

from __future__ import annotations

import json
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

from pipeline.engines.nodes import build, needs
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
"""Types of file systems that several machines may mount. Types that begin with `fuse.` count too, except the one that
containers use."""

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
"""The final states of a job."""
NOT_FOUND = 127
"""The exit code of a shell that cannot find the command."""

LOOK_EVERY = 2.0
"""Seconds between two looks at the log and the state of a job."""

LOST_FOR = 300.0
"""Seconds without contact to the cluster after which following the job is given up."""

STOP_FOR = 60.0
"""Seconds to wait for a job to end. Ray kills it RAY_JOB_STOP_WAIT_TIME_S seconds (default 3) after it was asked to
stop."""


@dataclass(frozen=True)
class Job:
    """A run that was submitted to a cluster, as STORE/runs/NAME/job.json holds it: the address of the dashboard, and
    the name of the job in Ray."""

    address: str
    id: str


def load(run: Run) -> Job | None:
    """The run's latest job, which may have ended long ago. None if there is none, or if job.json cannot be read."""
    try:
        found = json.loads((run.folder / "job.json").read_text(encoding="utf-8"))
        return Job(found["address"], found["id"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def submit(run: Run, address: str, arguments: Sequence[str]) -> Job:
    """Submit `run`, whose plan is stored already, to the cluster. `arguments` are further ones of `retort resume`.

    Raises UsageError for an unsuitable token or version of Ray. Raises StageFailed if the cluster does not accept the
    job.
    """
    dashboard.check_ray(address)
    job = Job(address, f"retort-{run.name}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"[:-3])
    command = ["retort", "resume", run.name, *arguments, "--store", str(run.store.root), "--engine", "attached"]
    # written before the job is submitted, so that every running job is on record
    write_atomically(run.folder / "job.json", json.dumps(asdict(job), indent=2).encode("utf-8"))
    try:
        entrypoint = shlex.join([*command, "--submitted-by", build()])
        accepted = dashboard.ask(address, "/api/jobs/", {"entrypoint": entrypoint, "submission_id": job.id})
    except dashboard.Unreachable as error:
        raise StageFailed(f"the cluster did not accept the job: {error}") from error
    if accepted is None:
        raise StageFailed(f"the dashboard at {address} does not take jobs")
    return job


def alive(job: Job) -> bool:
    """Whether the job waits or runs. Raises Unreachable."""
    found = dashboard.ask(job.address, f"/api/jobs/{job.id}")
    return found is not None and found["status"] not in ENDED


def follow(job: Job, write: Callable[[str], None]) -> int:
    """Write the job's log as it grows, until the job ends. Return the exit code of its driver.

    The whole log is fetched each time, so nothing is lost with a connection. Raises StageFailed if no driver started,
    or if the cluster is gone or does not know the job.
    """
    written, last_contact, told = 0, time.monotonic(), False
    while True:
        try:
            found = _info(job)
            answer = dashboard.ask(job.address, f"/api/jobs/{job.id}/logs")
        except dashboard.Unreachable as error:
            if time.monotonic() - last_contact > LOST_FOR:
                raise StageFailed(f"{error}\njob {job.id} may still run: resume with --address to follow it") from None
            if not told:
                print(f"connection lost, trying again ({error})", file=sys.stderr, flush=True)
            told = True
        else:
            new = answer["logs"][written:] if answer else ""  # without an answer, the next look says why
            if new:
                write(new)
                written += len(new)
            if found["status"] in ENDED:
                return _exit_code(job, found)
            last_contact, told = time.monotonic(), False
        time.sleep(LOOK_EVERY)


def stop(job: Job) -> None:
    """Stop the job and wait until it has ended. Raises StageFailed if it does not end."""
    deadline = time.monotonic() + STOP_FOR
    try:
        dashboard.ask(job.address, f"/api/jobs/{job.id}/stop", {})
    except dashboard.Unreachable as error:
        raise StageFailed(f"the cluster did not stop job {job.id}: {error}") from error
    while (status := str(_info(job)["status"])) not in ENDED:
        if time.monotonic() > deadline:
            raise StageFailed(f"job {job.id} is still {status.lower()} after {STOP_FOR:.0f} s")
        time.sleep(LOOK_EVERY)


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
