"""A small Hub on 127.0.0.1, for the real huggingface_hub, transformers and datasets to talk to (`HF_ENDPOINT`).

It keeps commits in memory: create a repository, upload small files and LFS objects, read any file at any revision.
A dataset's repository is kept as `datasets/{id}`, which is how its files are addressed.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """What is stored: per repository its commits, each the whole tree by path; and LFS objects by their hash."""

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.objects: dict[str, bytes] = {}
        self.endpoint = ""

    def create(self, repo_id: str) -> bool:
        if repo_id in self.commits:
            return False
        self.commits[repo_id] = [(hashlib.sha1(repo_id.encode()).hexdigest(), {})]
        return True

    def tree(self, repo_id: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        commits = self.commits[repo_id]
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
        sha = hashlib.sha1(repr([(name, hashlib.sha1(data).digest()) for name, data in files.items()]).encode())
        self.commits[repo_id].append((sha.hexdigest(), files))
        return sha.hexdigest()


API = r"/api/(models|datasets)/([^/]+/[^/]+)"


def repo_of(found: re.Match) -> str:
    return found[2] if found[1] == "models" else f"datasets/{found[2]}"


def entry(kind: str, path: str, data: bytes) -> dict:
    return {"type": kind, "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def handler_for(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self, body: bytes | dict | list = b"", status: int = 200, **headers: str) -> None:
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
            self.send_response(status)
            headers.setdefault("Content_Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

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
            path, body = unquote(urlsplit(self.path).path), self.body()
            if path == "/api/repos/create":
                asked = json.loads(body)
                repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
                repo_id = f"datasets/{repo_id}" if asked.get("type") == "dataset" else repo_id
                return self.reply({"url": f"{hub.endpoint}/{repo_id}"}, 200 if hub.create(repo_id) else 409)
            if path == "/api/validate-yaml":
                return self.reply({"errors": [], "warnings": []})
            if found := re.fullmatch(API + r"/preupload/.+", path):
                files = json.loads(body)["files"]
                large = (".safetensors", ".bin", ".parquet")
                modes = [
                    {**file, "uploadMode": "lfs" if file["path"].endswith(large) else "regular"} for file in files
                ]
                return self.reply({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
            if re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
                objects = [
                    {**entry, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{entry['oid']}"}}}
                    for entry in json.loads(body)["objects"]
                ]
                return self.reply({"transfer": "basic", "objects": objects})
            if found := re.fullmatch(API + r"/commit/.+", path):
                sha = hub.commit(repo_of(found), [json.loads(line) for line in body.splitlines() if line])
                return self.reply(
                    {"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{repo_of(found)}/commit/{sha}"}
                )
            if found := re.fullmatch(API + r"/paths-info/(.+)", path):
                files = hub.tree(repo_of(found), found[3])[1]
                asked = parse_qs(body.decode())["paths"] if b"=" in body else json.loads(body)["paths"]
                return self.reply([entry("file", name, files[name]) for name in asked if name in files])
            return self.reply({"error": f"no such endpoint: {path}"}, 404)

        def do_PUT(self):
            data = self.body()
            oid = self.path.rsplit("/", 1)[1]
            if hashlib.sha256(data).hexdigest() != oid:
                return self.reply({"error": "content does not match its hash"}, 400)
            hub.objects[oid] = data
            return self.reply()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            if path == "/api/whoami-v2":
                return self.reply({"name": "me", "type": "user", "orgs": []})
            try:
                if found := re.fullmatch(API + r"(?:/revision/(.+))?", path):
                    sha, files = hub.tree(repo_of(found), found[3] or "main")
                    siblings = [{"rfilename": name} for name in files]
                    return self.reply({"id": found[2], "sha": sha, "private": False, "siblings": siblings, "tags": []})
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
                if found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
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
            except (KeyError, StopIteration):
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
