"""Tokens go to nobody but the host that was named, and what URLs hold in secret is not printed."""

import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.errors import StageFailed, UsageError
from pipeline.jobs.dashboard import ask
from stages.base import StageError
from stages.data.inspection import inspect_shards
from stages.data.urls import redacted
from tests.support.cli import retort
from tests.support.pipelines import GAUSSIAN, execute, plan_of


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Standard error is what a test looks at."""


@pytest.fixture
def serve():
    """Start a server on 127.0.0.1 with a handler; gives its address."""
    servers = []

    def serve(handler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_token_does_not_follow_a_redirect(serve, monkeypatch, code):
    seen = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(dict(self.headers))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"ray_version": "2.60.0"}')

    elsewhere = serve(Elsewhere).replace("127.0.0.1", "localhost")

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.send_header("Location", f"{elsewhere}/api/version")
            self.end_headers()

    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    with pytest.raises(UsageError, match=f"redirects to {elsewhere}"):
        ask(serve(Dashboard), "/api/version")
    assert seen == []


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("https://me:hunter2@host:8/x.tar", "https://***@host:8/x.tar"),
        ("s3://KEY:hun@ter2@bucket/x and ftp://hunter2@h", "s3://***@bucket/x and ftp://***@h"),
        ("s3://KEY:hun/ter+2@bucket/x ftp://u:p#w@h", "s3://***@bucket/x ftp://***@h"),
        ("http://host:8265/a@b", "http://host:8265/a@b"),
        ("https://a/x?auth=hunter2&jwt=hunter2", "https://a/x?auth=***&jwt=***"),
        ("/here/http:/me:hunter2@host/p.txt", "/here/http:/***@host/p.txt"),
        (
            "https://b.s3.amazonaws.com/x.tar?X-Amz-Credential=hunter2%2Fs3&X-Amz-Expires=9&X-Amz-Signature=hunter2",
            "https://b.s3.amazonaws.com/x.tar?X-Amz-Credential=***&X-Amz-Expires=9&X-Amz-Signature=***",
        ),
        ("https://a/x?sv=1&sig=hunter2#part", "https://a/x?sv=1&sig=***#part"),
        ("'https://a/x?Signature=hunter2'", "'https://a/x?Signature=***'"),
        ("https://a/x?access_token=hunter2&api_key=hunter2", "https://a/x?access_token=***&api_key=***"),
        ("https://host/a@b?page=2&design=1 mail@host", "https://host/a@b?page=2&design=1 mail@host"),
    ],
)
def test_what_lets_others_in_is_redacted_and_nothing_else(url, printed):
    assert redacted(url) == printed


def test_reports_pages_and_errors_about_a_url_hold_no_secrets(serve, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(b"no tar at all" * 100)
    address = serve(partial(Files, directory=str(tmp_path / "shards")))
    address = address.replace("://", "://me:hunter2@")
    page = tmp_path / "page.html"
    for place in (f"{address}/", f"{address}/missing/?X-Amz-Signature=hunter2", "http://me:hunter2@127.0.0.1:9/x"):
        for options in ((), ("--json",), ("--html", page)):
            done = retort("stats", place, *options)
            assert done.returncode in (1, 2) and "Traceback" not in done.stderr
            assert "hunter2" not in done.stdout + done.stderr
            if done.returncode == 2 or options == ("--json",):
                assert "http://***@127.0.0.1" in done.stdout + done.stderr
    assert "hunter2" not in page.read_text() and "://***@127.0.0.1" in page.read_text()
    assert "hunter2" not in json.dumps(inspect_shards(f"{address}/"))
    with pytest.raises(StageError) as refused:
        inspect_shards(f"{address}/missing/")
    assert "hunter2" not in str(refused.value)


def test_plans_logs_and_events_about_a_url_hold_no_secrets(tmp_path, monkeypatch):
    """A URL where a path is expected is taken for one."""
    monkeypatch.chdir(tmp_path)
    text = GAUSSIAN.replace("prompts: digits", "prompts: http://me:hunter2@host/p.txt?token=hunter2")
    (tmp_path / "m.yaml").write_text(text)
    done = retort("plan", "m.yaml", "--store", "store", cwd=tmp_path)
    assert "http:/***@host/p.txt?token=***" in done.stdout and "hunter2" not in done.stdout + done.stderr
    done = retort("plan", "m.yaml", "--store", "s3://me:hunter2@bucket", cwd=tmp_path)
    assert done.returncode == 2 and "store s3://***@bucket: " in done.stderr
    (tmp_path / "http:" / "me:hunter2@host").mkdir(parents=True)
    (tmp_path / "http:" / "me:hunter2@host" / "p.txt?token=hunter2").write_text("\n")
    assert plan_of(text, tmp_path / "store")["pairs"].state == "run"
    with pytest.raises(StageFailed) as failed:
        execute(text, tmp_path / "store")
    run = tmp_path / "store" / "runs" / "gaussian"
    for printed in (str(failed.value), (run / "logs" / "pairs.log").read_text(), (run / "events.jsonl").read_text()):
        assert "http:/***@host/p.txt?token=***" in printed and "hunter2" not in printed
