"""A small Hub on 127.0.0.1, for the real huggingface_hub, transformers and datasets to talk to (`HF_ENDPOINT`).

It keeps commits in memory: create a repository, upload small files and LFS objects, read any file at any revision or
tag. A dataset's repository is kept as `datasets/{id}`, which is how its files are addressed. Private repositories and
writing need a token that it knows, and it fails on demand (`Hub.fail`).
"""

import base64
import hashlib
import json
import math
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import RepoCard


@dataclass
class Fault:
    """What goes wrong the next `times` times that a request's method and path match `request`."""

    kind: str | int
    """A status; `"cut"`: the connection ends half-way; `"lost"`: it ends before the reply, the work being done;
    `"moved"`: someone else commits first; `"revoked"`: from now on no token is known."""
    request: str
    times: float


class Hub:
    """What is stored: per repository its commits, each the whole tree by path, and tags; LFS objects by hash.

    Attributes:
        tokens (`set[str]`, *optional*): tokens that may write and see private repositories; None knows every token.
        requests (`list[str]`): method and path of all requests so far.
    """

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.objects: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.tokens: set[str] | None = None
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.endpoint = ""

    def fail(self, kind: str | int, request: str, times: float = math.inf) -> None:
        """Answer requests that match `request`, a pattern like `"POST .*/commit/"`, by a fault."""
        self.faults.append(Fault(kind, request, times))

    def fault(self, request: str) -> str | int | None:
        for fault in self.faults:
            if fault.times > 0 and re.match(fault.request, request):
                fault.times -= 1
                return fault.kind
        return None

    def create(self, repo_id: str, private: bool = False) -> bool:
        if repo_id in self.commits:
            return False
        self.commits[repo_id] = [(hashlib.sha1(repo_id.encode()).hexdigest(), {})]
        self.tags[repo_id] = {}
        if private:
            self.private.add(repo_id)
        return True

    def tree(self, repo_id: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        commits = self.commits[repo_id]
        revision = self.tags[repo_id].get(revision, revision)
        return commits[-1] if revision == "main" else next(commit for commit in commits if commit[0] == revision)

    def commit(self, repo_id: str, lines: list[dict]) -> str:
        files = dict(self.tree(repo_id)[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        content = [(name, hashlib.sha1(data).digest()) for name, data in files.items()]
        sha = hashlib.sha1(repr((len(self.commits[repo_id]), content)).encode())
        self.commits[repo_id].append((sha.hexdigest(), files))
        return sha.hexdigest()


LARGE = (".safetensors", ".bin", ".parquet")
API = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"


def repo_of(found: re.Match) -> str:
    return found[2] if found[1] == "models" else f"{found[1]}/{found[2]}"


def entry(kind: str, path: str, data: bytes) -> dict:
    return {"type": kind, "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def object_id(path: str, data: bytes) -> str:
    """By which a client knows that it need not send a file again."""
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def card_data(files: dict[str, bytes]) -> dict:
    return (
        RepoCard(files["README.md"].decode(), ignore_metadata_errors=True).data.to_dict()
        if "README.md" in files
        else {}
    )


def handler_for(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self, body: bytes | dict | list = b"", status: int = 200, **headers: str) -> None:
            if getattr(self, "is_lost", False):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
            self.send_response(status)
            headers.setdefault("Content_Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def is_refused(self, path: str, is_writing: bool) -> bool:
            """Whether the request was answered already: by a fault, or as it carries no token that would allow it."""
            hub.requests.append(f"{self.command} {path}")
            kind = hub.fault(hub.requests[-1])
            if isinstance(kind, int):
                self.body()
                retry = {"Retry_After": "1"} if kind == 429 else {}
                message = f"fault {kind}"
                self.reply({"error": message}, kind, X_Error_Message=message, **retry)
                return True
            if kind == "cut":
                self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 100))
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return True
            self.is_lost = kind == "lost"
            if kind == "revoked":
                hub.tokens = set()
            if kind == "moved" and (found := re.fullmatch(API + r"/commit/.+", path)):
                hub.commit(repo_of(found), [{"key": "file", "value": {"path": "theirs.txt", "content": ""}}])
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            is_known = token in hub.tokens if hub.tokens is not None else bool(token)
            if token and not is_known:
                self.body()
                self.reply({"error": "Invalid credentials in Authorization header"}, 401)
                return True
            if not is_known and (is_writing or any(f"/{repo_id}/" in f"{path}/" for repo_id in hub.private)):
                self.body()
                message = "Invalid username or password."
                self.reply({"error": message}, 401, X_Error_Code="RepoNotFound", X_Error_Message=message)
                return True
            return False

        def body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self):
            path = unquote(urlsplit(self.path).path)
            if self.is_refused(path, is_writing=not path.endswith(("/paths-info/main", "/validate-yaml"))):
                return None
            body = self.body()
            if path == "/api/repos/create":
                asked = json.loads(body)
                repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
                repo_id = f"{asked['type']}s/{repo_id}" if asked.get("type", "model") != "model" else repo_id
                is_new = hub.create(
                    repo_id, private=bool(asked.get("private")) or asked.get("visibility") == "private"
                )
                return self.reply({"url": f"{hub.endpoint}/{repo_id}"}, 200 if is_new else 409)
            if path == "/api/validate-yaml":
                return self.reply({"errors": [], "warnings": []})
            if found := re.fullmatch(API + r"/preupload/.+", path):
                _, present = hub.tree(repo_of(found))
                files = []
                for path in (file["path"] for file in json.loads(body)["files"]):
                    mode = "lfs" if path.endswith(LARGE) else "regular"
                    oid = {"oid": object_id(path, present[path])} if path in present else {}
                    files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
                return self.reply({"files": files})
            if re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
                objects = [
                    {**entry, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{entry['oid']}"}}}
                    for entry in json.loads(body)["objects"]
                ]
                return self.reply({"transfer": "basic", "objects": objects})
            if found := re.fullmatch(API + r"/commit/.+", path):
                lines = [json.loads(line) for line in body.splitlines() if line]
                parent = lines[0]["value"].get("parentCommit")
                if parent is not None and parent != hub.tree(repo_of(found))[0]:
                    message = "A commit has happened since. Please refresh and try again."
                    return self.reply({"error": message}, 412, X_Error_Message=message)
                sha = hub.commit(repo_of(found), lines)
                return self.reply(
                    {"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{repo_of(found)}/commit/{sha}"}
                )
            if found := re.fullmatch(API + r"/tag/(.+)", path):
                tags, tag = hub.tags[repo_of(found)], json.loads(body)["tag"]
                if tag in tags:
                    return self.reply({"error": "exists"}, 409, X_Error_Message="Tag reference exists already")
                tags[tag] = hub.tree(repo_of(found), found[3])[0]
                return self.reply({})
            if found := re.fullmatch(API + r"/paths-info/(.+)", path):
                files = hub.tree(repo_of(found), found[3])[1]
                asked = parse_qs(body.decode())["paths"] if b"=" in body else json.loads(body)["paths"]
                return self.reply([entry("file", name, files[name]) for name in asked if name in files])
            return self.reply({"error": f"no such endpoint: {path}"}, 404)

        def do_PUT(self):
            if self.is_refused(self.path, is_writing=False):  # the address itself is the permission
                return None
            data = self.body()
            oid = self.path.rsplit("/", 1)[1]
            if hashlib.sha256(data).hexdigest() != oid:
                return self.reply({"error": "content does not match its hash"}, 400)
            hub.objects[oid] = data
            return self.reply()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            if self.is_refused(path, is_writing=path == "/api/whoami-v2"):
                return None
            if path == "/api/whoami-v2":
                return self.reply({"name": "me", "type": "user", "orgs": []})
            try:
                if found := re.fullmatch(API + r"/refs", path):
                    tags = [
                        {"name": name, "ref": f"refs/tags/{name}", "targetCommit": sha}
                        for name, sha in hub.tags[repo_of(found)].items()
                    ]
                    main = {"name": "main", "ref": "refs/heads/main", "targetCommit": hub.tree(repo_of(found))[0]}
                    return self.reply({"branches": [main], "converts": [], "tags": tags})
                if found := re.fullmatch(API + r"(?:/revision/(.+))?", path):
                    sha, files = hub.tree(repo_of(found), found[3] or "main")
                    siblings = [{"rfilename": name} for name in files]
                    return self.reply(
                        {
                            "id": found[2],
                            "sha": sha,
                            "private": repo_of(found) in hub.private,
                            "siblings": siblings,
                            "tags": [],
                            "cardData": card_data(files),
                        }
                    )
                if found := re.fullmatch(API + r"/tree/([^/]+)(/.*)?", path):
                    _, files = hub.tree(repo_of(found), found[3])
                    folder = (found[4] or "").strip("/")
                    inside = {
                        name: data for name, data in files.items() if not folder or name.startswith(f"{folder}/")
                    }
                    if folder and not inside:
                        return self.reply({}, 404, X_Error_Code="EntryNotFound")
                    start = len(folder) + 1 if folder else 0
                    entries = [entry("file", name, data) for name, data in inside.items()]
                    if "recursive=true" not in urlsplit(self.path).query.lower():
                        folders = {name[:start] + name[start:].split("/")[0] for name in inside if "/" in name[start:]}
                        entries = [one for one in entries if "/" not in one["path"][start:]]
                        entries += [entry("directory", name, b"") for name in sorted(folders)]
                    return self.reply(entries)
                if found := re.fullmatch(r"/((?:datasets/|spaces/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    sha, files = hub.tree(found[1], found[2])
                    if found[3] not in files:
                        return self.reply({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
                    data = files[found[3]]
                    headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": sha}
                    if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                        first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
                        headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
                        return self.reply(data[first : last + 1], 206, **headers)
                    return self.reply(data, Accept_Ranges="bytes", **headers)
            except StopIteration:
                return self.reply({}, 404, X_Error_Code="RevisionNotFound")
            except KeyError:
                return self.reply({}, 404, X_Error_Code="RepoNotFound")
            return self.reply({"error": f"no such endpoint: {path}"}, 404)

        do_HEAD = do_GET

    return Handler


@contextmanager
def loopback_hub():
    """A running `Hub`; give `HF_ENDPOINT=hub.endpoint` to the processes that shall use it."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
