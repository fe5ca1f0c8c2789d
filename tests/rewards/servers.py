"""Servers on the loopback interface: the real one in a thread, and one whose answers a test writes."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx2

from denoise_env.rewards.server import RewardServer, http_server, listen


@contextlib.contextmanager
def serving(reward, port=0, **options):
    """The URL of a real server."""
    listener = listen("127.0.0.1", port)
    server = http_server(RewardServer(reward, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    while not server.started:
        time.sleep(0.01)
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def scripted(answer, port=0):
    """A server that answers a request (path, headers, JSON value) with what ``answer`` returns.

    That is a JSON value; or status, headers and a JSON value or bytes; or a callable that gets the handler.
    The yielded object has the ``url`` and the ``requests``, each a time and a JSON value.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            value = json.loads(body) if body else None
            requests.append((time.monotonic(), value))
            result = answer(SimpleNamespace(path=self.path, headers=self.headers, value=value, count=len(requests)))
            if callable(result):
                return result(self)
            status, headers, content = result if isinstance(result, tuple) else (200, {}, result)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, text in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):  # a client that gives up
            pass

    server = Quiet(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", requests=requests)
    finally:
        server.shutdown()
        server.server_close()


def post(url, value, **headers):
    """A request of a client that is not ours."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    headers = {"Content-Type": "application/json", **headers}
    return httpx2.post(f"{url}/compute", content=content, headers=headers, trust_env=False, verify=False, timeout=20)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
