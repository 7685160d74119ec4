"""Ask a Ray dashboard over HTTP. A wrong address, token or version is explained in one sentence.

Jobs are submitted, followed and stopped by Ray's `JobSubmissionClient`. It has no timeout and follows redirects, and it
does not tell an unknown job from a failed request. So this module asks for the state of a job and for Ray's version.
"""

from __future__ import annotations

import json
import os
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pipeline.engines.nodes import needs
from pipeline.errors import UsageError
from stages.data.provenance import versions

TIMEOUT = 15.0
"""Seconds to wait for one answer."""

PORT = 8265
"""The default port of a dashboard."""
OTHER_PORTS = {6379: "Ray's own (GCS)", 10001: "Ray Client's"}
"""Ports of Ray that users mistake for the port of the dashboard."""


class Unreachable(UsageError):
    """The dashboard did not answer, or its answer makes no sense. A later attempt may succeed."""


def checked(address: str) -> str:
    """Return `address` without a slash at its end. Raises UsageError if it cannot be the address of a dashboard."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or host in ("auto", "local"):
        raise UsageError(f"--address {address}: expected the address of a Ray dashboard, such as http://HEAD:{PORT}")
    if parts.scheme in ("http", "https") and port not in OTHER_PORTS:
        return address.rstrip("/")
    if port in OTHER_PORTS:
        wrong, port = f"port {port} is {OTHER_PORTS[port]}", PORT
    elif parts.scheme == "":
        wrong, port = "http:// or https:// is missing", port or PORT
    else:
        wrong, port = f"{parts.scheme}:// is neither http:// nor https://", PORT
    named = f"[{host}]" if ":" in host else host
    raise UsageError(f"--address {address}: {wrong}; give the dashboard's address, http://{named}:{port}")


class _NoRedirects(HTTPRedirectHandler):
    """Redirects are not followed: urllib would send the token to the host that a reply names."""

    def redirect_request(self, *_: Any) -> None:
        return None


_open = build_opener(_NoRedirects).open


def headers() -> dict[str, str]:
    """HTTP headers with the token, which is found by Ray's own rules; empty without a token.

    Raises UsageError for a token file that cannot be read.
    """
    token, _ = _token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _token() -> tuple[str, str]:
    """The token, and the variable or file that it is from. Both are empty if there is none."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return "", ""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip(), "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named or Path.home() / ".ray" / "auth_token")
    if not named and not file.exists():
        return "", ""
    try:
        return file.read_text(encoding="utf-8").strip(), str(file)
    except OSError as error:
        raise UsageError(f"the token in {file} (RAY_AUTH_TOKEN_PATH) cannot be read: {error.strerror}") from None


def ask(address: str, path: str) -> Any:
    """Return the JSON at `path`; None for HTTP 404.

    Raises Unreachable. Raises UsageError for a refused token, and for a redirect, which is not followed.
    """
    try:
        with _open(Request(address + path, headers=headers()), timeout=TIMEOUT) as reply:
            return json.load(reply)
    except HTTPError as error:
        if error.code in (401, 403):
            raise UsageError(refused(address, error.code)) from None
        if error.code == 404:
            return None
        if "Location" in error.headers:
            where = error.headers["Location"]
            raise UsageError(f"{address} redirects to {where}; if that is the cluster, give that address") from None
        raise Unreachable(f"{address} answers with HTTP {error.code}, not as a Ray dashboard") from None
    except OSError as error:
        why = getattr(error, "reason", error)
        raise Unreachable(
            f"no Ray dashboard listens at {address} ({getattr(why, 'strerror', None) or why}); "
            "is the cluster up, and can this machine reach it?"
        ) from None
    except (HTTPException, ValueError):
        raise Unreachable(f"what listens at {address} is no Ray dashboard") from None


def refused(address: str, code: int) -> str:
    """Say why a dashboard answered with HTTP 401 or 403, and what to do."""
    _, source = _token()
    how = (
        "set RAY_AUTH_TOKEN to the cluster's token, or put it into ~/.ray/auth_token or the file that "
        "RAY_AUTH_TOKEN_PATH names; `ray get-auth-token` on the head node prints it"
    )
    if source:
        return f"{address} refuses the token of {source} (HTTP {code}): {how}"
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        how = f"unset RAY_AUTH_MODE, which is `disabled` here, and {how}"
    return f"{address} asks for a token, and there is none here (HTTP {code}): {how}"


def same_ray(address: str) -> str:
    """Return the cluster's version of Ray. Raises UsageError unless its first two numbers are those of this machine."""
    found = ask(address, "/api/version")
    if not isinstance(found, dict) or "ray_version" not in found:
        raise UsageError(f"what listens at {address} is no Ray dashboard")
    in_cluster, here = str(found["ray_version"]), versions()["ray"]
    if in_cluster.split(".")[:2] != here.split(".")[:2]:
        raise UsageError(
            f"the cluster at {address} runs Ray {in_cluster}, but this machine has Ray {here}: "
            f"its nodes need {needs()}; or install ray[default]=={in_cluster} here"
        )
    return in_cluster
