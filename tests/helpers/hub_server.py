"""A server on the loopback interface that speaks the part of the Hugging Face Hub's API that `huggingface_hub` uses.

    with HubServer() as hub:
        hub.add("org/name", {"config.json": b"{}"})
        subprocess.run(command, env=os.environ | hub.environment(cache))

It answers model information, file trees, downloads (small files directly, large ones by a redirect to a content
address, with the hub's headers), the creation of repositories, and commits with Git LFS uploads. Repositories are kept
in memory. It does not speak Xet, so clients must run with HF_HUB_DISABLE_XET=1.
"""

import base64
import collections
import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Mapping

LFS_SUFFIXES = (".safetensors", ".parquet")
TOKEN = "hf_" + "t" * 34


@dataclasses.dataclass
class Repo:
    """A repository: {revision: commit}, {commit: {path: content}}, and who may read it."""

    revisions: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    access: str = "public"  # or "gated", "private": only with TOKEN
    messages: list[str] = dataclasses.field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], revision: str = "main", message: str = "") -> str:
        """Makes a commit with exactly these files the head of a revision; returns its name."""
        parts = [f"{path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items())]
        name = hashlib.sha1("\n".join([*parts, str(len(self.commits))]).encode()).hexdigest()
        self.commits[name], self.revisions[revision] = dict(files), name
        self.messages.append(message)
        return name

    def find(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        return revision if revision in self.commits else self.revisions.get(revision)


class HubServer:
    """The server; a context manager.

    Attributes:
      repos: {("models" or "datasets", "org/name"): Repo}.
      requests: number of requests by (method, path without a query).
      url: its address.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: collections.Counter[tuple[str, str]] = collections.Counter()
        self.uploads: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        # Clients follow redirects within a host by themselves and would miss the headers of the first answer.
        self.content_url = f"http://localhost:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(
        self,
        name: str,
        files: Mapping[str, bytes] | pathlib.Path,
        kind: str = "models",
        revision: str = "main",
        access: str = "public",
    ) -> str:
        """Adds a commit to a repository, from {path: content} or a folder; returns the commit's name."""
        if isinstance(files, pathlib.Path):
            found = (file for file in files.rglob("*") if file.is_file())
            files = {str(file.relative_to(files)): file.read_bytes() for file in found}
        repo = self.repos.setdefault((kind, name), Repo(access=access))
        return repo.commit(files, revision)

    def downloads(self, suffix: str) -> int:
        """The number of times that the content of files with a suffix was sent."""
        return sum(n for (method, path), n in self.requests.items() if method == "CONTENT" and path.endswith(suffix))

    def environment(self, cache: pathlib.Path, token: bool = False) -> dict[str, str]:
        """Variables of a client: this server, a cache of its own, and TOKEN or none."""
        out = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return out | {"HF_TOKEN": TOKEN if token else "", "HF_HUB_DISABLE_TELEMETRY": "1"}


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # keeps the output of tests clean
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.hub.requests[self.command, path] += 1
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        routes = (
            (r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/(models|datasets)/([^/]+/[^/]+)/tree/(.+)", self._tree),
            (r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            (r"/content/(models|datasets)/([^/]+/[^/]+)/([^/]+)/(.+)", self._content),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate_card),
            (r"/api/models/([^/]+/[^/]+)/preupload/.+", self._preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"/lfs/(\w+)", self._lfs_put),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
        )
        if self.command != "GET" and self.command != "HEAD" and not self._is_logged_in():
            return self._error(401, None, "Invalid username or password.")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for pattern, answer in routes:
                if match := re.fullmatch(pattern, path):
                    return answer(*(part and urllib.parse.unquote(part) for part in match.groups()))
            self._error(404, None, "no such route")

    # ---- reading

    def _info(self, kind: str, name: str, revision: str | None) -> None:
        if found := self._find(kind, name, revision or "main"):
            commit, files = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            self._json({"_id": "0", "id": name, "modelId": name, "sha": commit, "siblings": siblings})

    def _tree(self, kind: str, name: str, revision: str) -> None:
        if found := self._find(kind, name, revision):
            self._json([{"type": "file", "path": path, **_blob(path, data)} for path, data in sorted(found[1].items())])

    def _resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        kind = kind or "models"
        found = self._find(kind, name, revision)
        if not found:
            return
        commit, files = found
        if self.hub.repos[kind, name].access == "gated" and not self._is_logged_in():
            return self._error(403, "GatedRepo", "Access to this model is restricted.")
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        data, blob = files[path], _blob(path, files[path])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in blob:
            headers |= {"X-Linked-Etag": f'"{blob["lfs"]["oid"]}"', "X-Linked-Size": str(len(data))}
            quoted = urllib.parse.quote(path)
            return self._send(
                302, b"", {**headers, "Location": f"{self.hub.content_url}/content/{kind}/{name}/{commit}/{quoted}"}
            )
        if self.command == "GET":
            self.hub.requests["CONTENT", path] += 1
        self._send(200, data, headers)

    def _content(self, kind: str, name: str, commit: str, path: str) -> None:
        data = self.hub.repos[kind, name].commits[commit][path]
        if self.command == "GET":
            self.hub.requests["CONTENT", path] += 1
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
            span = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            return self._send(206, data[start:], span)
        self._send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"})

    # ---- writing

    def _create(self) -> None:
        values = json.loads(self.body)
        name = f"{values['organization'] or 'user'}/{values['name']}"
        access = "private" if values.get("private") or values.get("visibility") == "private" else "public"
        if ("models", name) in self.hub.repos:
            return self._error(409, None, "You already created this model repo", {}, {"url": f"{self.hub.url}/{name}"})
        self.hub.repos["models", name] = repo = Repo(access=access)
        repo.commit({".gitattributes": b""}, message="initial commit")
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _validate_card(self) -> None:
        starts = json.loads(self.body)["content"].startswith("---\n")
        self._json({"errors": [] if starts else [{"message": "no front matter"}], "warnings": []})

    def _preupload(self, name: str) -> None:
        mode = lambda path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        files = [file["path"] for file in json.loads(self.body)["files"]]
        self._json({"files": [{"path": path, "uploadMode": mode(path), "shouldIgnore": False} for path in files]})

    def _lfs_batch(self, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        upload = lambda oid: {"upload": {"href": f"{self.hub.url}/lfs/{oid}", "header": {}}}
        answers = [{"oid": o["oid"], "size": o["size"], "actions": upload(o["oid"])} for o in objects]
        self._json({"transfer": "basic", "objects": answers})

    def _lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, None, "wrong hash")
        self.hub.uploads[oid] = self.body
        self._json({})

    def _commit(self, name: str, revision: str) -> None:
        repo = self.hub.repos["models", name]
        head = repo.find(revision)
        files, message = dict(repo.commits[head]) if head else {}, ""
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        commit = repo.commit(files, revision, message)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    # ---- answers

    def _is_logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.path.startswith("/lfs/")

    def _find(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.access == "private" and not self._is_logged_in()):
            status = 404 if self._is_logged_in() else 401
            return self._error(status, "RepoNotFound", "Repository not found")
        commit = repo.find(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(
        self, status: int, code: str | None, text: str, headers: Mapping[str, str] = {}, body: Mapping[str, str] = {}
    ) -> None:
        names = {"X-Error-Message": text} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": text, **body}).encode(), {**headers, **names})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _blob(path: str, data: bytes) -> dict:
    """What the tree states of a file: its size, Git's name of the blob and, if it is large, the LFS object."""
    blob = {"size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if not path.endswith(LFS_SUFFIXES):
        return blob
    return blob | {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
