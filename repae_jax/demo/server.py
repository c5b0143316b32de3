"""The server of the page: HTTP of the standard library, one page and two addresses of JSON."""

import contextlib
import ipaddress
import json
import select
import socket
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from repae_jax import cli
from repae_jax.demo.studio import Abandoned, Studio

PAGE = Path(__file__).with_name("page.html")
_POLICY = "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def make_server(studio: Studio, host: str, port: int) -> ThreadingHTTPServer:
    """Returns a server that is bound, to be run by `serve_forever`; ValueError if the address cannot be had.

    Where it is bound to this machine alone, requests for another machine's name are refused, and everywhere those that a
    browser sends for a page of another server.
    """
    if not host:
        raise ValueError("--host is empty; allowed: an address of this machine; 0.0.0.0 lets others in")

    class Handler(_Handler):
        pass

    Handler.studio, Handler.is_local = studio, _is_loopback(host)
    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        advice = "choose another --port (0 is any that is free), or a name or IPv4 address of this machine"
        raise ValueError(f"--host {host} --port {port} cannot be had ({error}): {advice}") from error


def _is_loopback(host):
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _host_of(header):
    try:
        return urllib.parse.urlsplit(f"//{header}").hostname or ""
    except ValueError:  # a bracket that is not closed
        return ""


class _Handler(BaseHTTPRequestHandler):
    studio: Studio
    is_local: bool

    def do_GET(self):  # noqa: N802
        """Answers a request."""
        path, _, query = self.path.partition("?")
        if self.is_local and not _is_loopback(_host_of(self.headers.get("Host", ""))):
            self._answer(403, {"error": "this server is for this machine alone"})
        elif path == "/":
            self._send(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            self._answer(403, {"error": "this server answers its own page alone"})
        elif path == "/api/run":
            self._try(self.studio.describe)
        elif path == "/api/sample":
            fields = dict(urllib.parse.parse_qsl(query))
            self._try(lambda: self.studio.sample(self.studio.parse(fields), self._is_wanted))
        else:
            self._answer(404, {"error": f"there is no {path}"})

    def _is_wanted(self):
        """Returns False once the browser has closed the connection, as it does when other settings are asked for."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return not readable or bool(self.connection.recv(1, socket.MSG_PEEK))

    def _try(self, work):
        try:
            status, content = 200, work()
        except Abandoned:
            return
        except Exception as error:
            line = cli.line_of(error)
            if line is None:  # a bug, whose traceback belongs into the terminal
                self._answer(500, {"error": f"{type(error).__name__}; see the terminal"})
                raise
            status, content = 400, {"error": line.splitlines()[0]}
        self._answer(status, content)

    def _answer(self, status: int, content: dict[str, Any]):
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status, kind, body):
        self.send_response(status)
        headers = {
            "Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store",
            "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        with contextlib.suppress(ConnectionError):  # the browser waits no more
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format, *args):
        """Prints nothing: the page asks for new checkpoints all the time."""
