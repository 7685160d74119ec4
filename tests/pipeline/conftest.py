"""HTTP servers of tests."""

import threading
from http.server import ThreadingHTTPServer

import pytest


@pytest.fixture
def serve():
    """A function that starts a server on 127.0.0.1 with a handler, and returns its address."""
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
