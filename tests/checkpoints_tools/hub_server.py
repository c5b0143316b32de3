"""A server that speaks the part of the Hugging Face hub's interface that uploads and downloads use."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server has been sent."""

    def __init__(self):
        self.repositories = {}  # name -> {path: bytes}
        self.private = {}  # name -> whether nobody else may see it
        self.objects = {}  # content of large files, by their SHA-256
        self.tokens = set()  # that requests came with
        self.forbidden = False  # whether writing is refused

    def handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, status=200, content=None, **headers):
                body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def body(self):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def do_GET(self):
                hub.note(self)
                hub.get(self)

            do_HEAD = do_GET

            def do_POST(self):
                hub.note(self)
                hub.post(self, self.body())

            def do_PUT(self):
                content = self.body()
                hub.objects[hashlib.sha256(content).hexdigest()] = content
                self.answer()

        return Handler

    def note(self, request):
        if given := request.headers.get("Authorization"):
            self.tokens.add(given.removeprefix("Bearer "))

    def get(self, request):
        if match := re.match(r"/api/models/([^/]+/[^/]+?)(/revision/main)?(\?.*)?$", request.path):
            if match[1] not in self.repositories:
                return request.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            siblings = [{"rfilename": name} for name in self.repositories[match[1]]]
            return request.answer(200, {"id": match[1], "modelId": match[1], "sha": COMMIT, "siblings": siblings, "tags": []})
        if match := re.match(r"/api/models/([^/]+/[^/]+)/tree/", request.path):
            files = self.repositories[match[1]]
            entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
            return request.answer(200, json.dumps(entries).encode())
        if match := re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)$", request.path):
            if match[1] not in self.repositories:
                return request.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            content = self.repositories[match[1]].get(match[2])
            if content is None:
                return request.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return request.answer(200, content, ETag=etag, X_Repo_Commit=COMMIT)
        return request.answer(404, {"error": f"the stand-in has no {request.path}"})

    def post(self, request, body):
        path = request.path.partition("?")[0]
        if self.forbidden:
            return request.answer(403, {"error": "You don't have the rights to create a model"})
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization')}/{given['name']}"
            if name in self.repositories:
                return request.answer(409, {"error": "You already created this model repo", "url": name})
            self.repositories[name] = {}
            self.private[name] = bool(given.get("private")) or given.get("visibility") == "private"
            return request.answer(200, {"url": f"{self.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return request.answer(200, {"errors": [], "warnings": []})
        if match := re.match(r"/api/models/(.+)/preupload/main$", path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            mode = {path: "lfs" if path.endswith("safetensors") else "regular" for path in paths}
            files = [{"path": path, "shouldIgnore": False, "uploadMode": mode[path]} for path in paths]
            return request.answer(200, {"files": files})
        if re.match(r"/(.+)\.git/info/lfs/objects/batch$", path):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.url}/upload/{wanted['oid']}", "header": {}}}}
                for wanted in json.loads(body)["objects"]
            ]
            return request.answer(200, {"transfer": "basic", "objects": objects})
        if match := re.match(r"/api/models/(.+)/commit/main$", path):
            files = self.repositories[match[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
            url = f"{self.url}/{match[1]}/commit/{COMMIT}"
            return request.answer(200, {"success": True, "commitUrl": url, "commitOid": COMMIT})
        return request.answer(404, {"error": f"the stand-in has no {path}"})


@contextlib.contextmanager
def serve():
    """Context of a running `Hub`, whose address is its `url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub.handler())
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
