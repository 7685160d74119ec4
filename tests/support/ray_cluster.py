"""A real head node with its dashboard, more nodes, and a connection that can be cut."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.support.cli import ROOT

TOKEN = "a-token-of-the-tests"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """A head node, which asks for TOKEN. `folder` must be short: Ray puts Unix sockets into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gcs, self.port = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        dashboard = ("--dashboard-host=127.0.0.1", f"--dashboard-port={self.port}", f"--temp-dir={folder}")
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._start("--head", f"--port={self.gcs}", "--num-cpus=2", "--num-gpus=0", *dashboard)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < deadline and self._nodes[0].poll() is None, (folder / "log").read_text()
            time.sleep(0.1)

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of processes of this cluster: they use this checkout's retort, and no settings of the
        user."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RETORT_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
        cluster = {"HOME": str(self.folder), "PATH": path, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"}
        return {**own, **cluster, "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", **more}

    def add_node(self, python_path: str) -> subprocess.Popen[bytes]:
        """Add a node with the cluster's only GPU, which exists only in name, and with `python_path` as its
        PYTHONPATH."""
        more = {"PYTHONPATH": python_path}
        return self._start(f"--address=127.0.0.1:{self.gcs}", "--num-cpus=0", "--num-gpus=1", environment=more)

    def remove(self, node: subprocess.Popen[bytes]) -> None:
        self._nodes.remove(node)
        node.send_signal(signal.SIGTERM)  # Ray ends the processes of its node itself
        try:
            node.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)

    def close(self) -> None:
        for node in reversed(self._nodes.copy()):
            self.remove(node)

    def _start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1"]
        # Ray's own default is one fixed port: held by another cluster of this machine, its jobs find no agent.
        command.append("--dashboard-agent-listen-port=0")
        with open(self.folder / "log", "ab") as log:
            node = subprocess.Popen(
                [*command, "--disable-usage-stats", *arguments],
                env=self.environment(**(environment or {})),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._nodes.append(node)
        return node

    def _answers(self) -> bool:
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False


class Proxy:
    """A proxy for a port. It cuts the first answer with a log that is longer than `cuts[0]` bytes at this length, then
    the first that is longer than `cuts[1]`, and so on. For `outage` seconds after each cut, it refuses all
    connections."""

    def __init__(self, port: int, cuts: list[int], outage: float) -> None:
        self._port, self._cuts, self._outage, self._dark_until = port, cuts.copy(), outage, 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def all_cut(self) -> bool:
        return not self._cuts

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if time.monotonic() < self._dark_until:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._port))
            request = client.recv(65536)
            server.sendall(request)
            left = self._cuts[0] if b"/logs " in request and self._cuts else None
            threading.Thread(target=self._pass, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, left), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, left: int | None) -> None:
        with suppress(OSError):
            while left is None or left > 0:
                data = source.recv(65536 if left is None else left)
                if not data:
                    break
                target.sendall(data)
                left = None if left is None else left - len(data)
        if left == 0:
            self._cuts.pop(0)
            self._dark_until = time.monotonic() + self._outage
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
