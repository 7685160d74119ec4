"""A token is sent only to the host that the user named."""

from http.server import BaseHTTPRequestHandler

import pytest

from pipeline.errors import UsageError
from pipeline.jobs.dashboard import ask


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
