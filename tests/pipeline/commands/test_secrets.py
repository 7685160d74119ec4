"""Passwords and signatures in URLs are neither printed on the terminal nor written to files."""

import json
from functools import partial
from http.server import SimpleHTTPRequestHandler

import pytest

from pipeline.errors import StageFailed
from stages.base import StageError
from stages.data.inspection import inspect_shards
from tests.support.cli import retort
from tests.support.pipelines import GAUSSIAN, execute, plan_of


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Print nothing, because the test checks standard error."""


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
    """A URL in place of a path is treated as a path."""
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
