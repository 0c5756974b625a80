"""The HTTP API of huggingface.co as `huggingface_hub` speaks it, as far as it is used here, for a `LocalHub`."""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from card_rules import metadata_errors
from hub_content import LFS_SUFFIXES, REGULAR_LIMIT, Commit, File, HubError, Repository


if TYPE_CHECKING:
    from local_hub import LocalHub

KIND_URL = r"(?:(?P<kind>datasets|spaces)/)?"
REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{REPO}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request after another of a connection to `server.hub`."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> "LocalHub":
        return self.server.hub

    def log_message(self, *args) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small answers are not held back
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        with suppress(OSError):  # the Hub was stopped
            super().finish()

    def handle_any(self) -> None:
        self.fault = self.hub.take_fault(self.command, self.path) if self.hub.is_up else "drop"
        length = int(self.headers.get("Content-Length") or 0)
        self.status = 0
        try:
            if self.fault == "drop":
                self.rfile.read(length // 2)
                self.close_connection = True
                return
            self.body = self.read_body(length)
            if self.fault and self.fault.isdigit():
                raise HubError(int(self.fault), "the Hub has a bad day")
            with self.hub.lock:
                self.route()
        except HubError as error:
            headers = {"X-Error-Message": str(error)}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.answer_json({"error": str(error)}, error.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.hub.requests.append((self.command, self.path, self.status))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    # -- answers -------------------------------------------------------------------------------

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.fault == "corrupt" and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
        self.status = status
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            if self.fault == "truncate":
                content = content[: len(content) // 2]
                self.close_connection = True
            self.wfile.write(content)

    def answer_json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    # -- requests ------------------------------------------------------------------------------

    @property
    def token(self) -> str | None:
        value = self.headers.get("Authorization", "")
        return value.removeprefix("Bearer ") or None

    def json_body(self) -> dict:
        try:
            return json.loads(self.body or b"{}")
        except json.JSONDecodeError:
            raise HubError(400, "The body is no JSON") from None

    def route(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        command = "GET" if self.command == "HEAD" else self.command
        for method, pattern, answer in self.routes:
            if method == command and (match := re.fullmatch(pattern, url.path)):
                groups = {name: value and unquote(value) for name, value in match.groupdict().items()}
                if "repo" in groups:
                    kind = (groups.pop("kind", None) or "models").removesuffix("s")
                    if (new := self.hub.renamed.get((kind, groups["repo"]))) is not None:
                        target = self.path.replace(groups["repo"], new, 1)
                        return self.answer(b"", 307, {"Location": target})
                    groups["kind"] = kind
                return answer(self, **groups)
        raise HubError(404, f"Sorry, we can't find {self.path}")

    def whoami(self) -> None:
        user = self.hub.logged_in(self.token)
        role = {"displayName": "test", "role": "write" if user[1] else "read"}
        self.answer_json({"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": role}})

    def create(self) -> None:
        body = self.json_body()
        user = self.hub.logged_in(self.token)
        owner, kind = body.get("organization") or user[0], body.get("type") or "model"
        name = f"{owner}/{body['name']}"
        self.hub.check_may_write(owner, self.token)
        if not re.fullmatch(r"[\w.-]{1,96}", body["name"]):
            raise HubError(400, f"Invalid repo name: {name}")
        url = self.hub.address(kind, name)
        if (kind, name) in self.hub.repositories:
            return self.answer_json({"error": f"You already created this {kind} repo: {name}", "url": url}, 409)
        private = bool(body.get("private")) or body.get("visibility") == "private"
        repository = self.hub.repositories[kind, name] = Repository(kind, name, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        first = {".gitattributes": File(attributes.encode(), False)}
        repository.commit("refs/heads/main", None, first, "initial commit")
        self.answer_json({"url": url, "name": name, "id": name})

    def validate(self) -> None:
        body = self.json_body()
        errors = metadata_errors(body["content"], body.get("repoType") or "model")
        messages = [{"message": error} for error in errors]
        self.answer_json({"errors": messages, "warnings": []}, 400 if errors else 200)

    # -- reading -------------------------------------------------------------------------------

    def revision(self, repository: Repository, revision: str | None) -> Commit:
        commit = repository.find(revision or "main")
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def info(self, kind: str, repo: str, revision: str | None = None) -> None:
        repository = self.hub.readable(kind, repo, self.token)
        commit = self.revision(repository, revision)
        self.answer_json(
            {
                "_id": repo,
                "id": repo,
                "modelId": repo,
                "author": repo.split("/")[0],
                "sha": commit.sha,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
            }
        )

    @staticmethod
    def entry(path: str, file: File) -> dict:
        entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
        return entry

    def tree(self, kind: str, repo: str, revision: str, path: str | None = None) -> None:
        commit = self.revision(self.hub.readable(kind, repo, self.token), revision)
        prefix = f"{path}/" if path else ""
        inside = {name: file for name, file in sorted(commit.files.items()) if name.startswith(prefix)}
        if path and not inside:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        folders = sorted({prefix + name[len(prefix) :].split("/")[0] for name in inside if "/" in name[len(prefix) :]})
        entries = [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries += [
            self.entry(name, file) for name, file in inside.items() if recursive or "/" not in name[len(prefix) :]
        ]
        first = int(self.query.get("cursor", ["0"])[0])
        page, headers = entries[first : first + 1000], {}
        if first + 1000 < len(entries):
            following = f"{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={first + 1000}"
            headers["Link"] = f'<{following}>; rel="next"'
        self.answer_json(page, headers=headers)

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        commit = self.revision(self.hub.readable(kind, repo, self.token), revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = self.json_body()["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        self.answer_json([self.entry(path, commit.files[path]) for path in paths if path in commit.files])

    def list_refs(self, kind: str, repo: str) -> None:
        repository = self.hub.readable(kind, repo, self.token)
        named = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        refs = {
            part: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
                for ref, sha in repository.refs.items()
                if ref.startswith(prefix)
            ]
            for part, prefix in named.items()
        }
        self.answer_json({**refs, "converts": []})

    def resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        repository = self.hub.readable(kind, repo, self.token)
        user = self.hub.user(self.token)
        if repository.gated and (user is None or user[0] != repo.split("/")[0]):
            status, what = (401, "log in") if user is None else (403, "ask for access")
            raise HubError(status, f"Access to {kind} {repo} is restricted: {what}", "GatedRepo")
        commit = self.revision(repository, revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer(b"Entry not found", 404, headers)
        if not file.is_lfs:
            return self.content(file.content, {**headers, "ETag": f'"{file.etag}"'})
        headers |= {
            "X-Linked-Etag": f'"{file.sha256}"',
            "X-Linked-Size": str(len(file.content)),
            "Location": f"{self.hub.cdn_url}/cdn/{file.sha256}?sig={_signature(file.sha256)}",
        }
        self.answer(b"", 302, headers)

    def cdn(self, oid: str) -> None:
        self.check_signature(oid)
        if oid not in self.hub.objects:
            raise HubError(404, "no such object")
        self.content(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def content(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return self.answer(content, 200, headers)
        first, last = int(match[1]), int(match[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(content[first : last + 1], 206, headers)

    # -- writing -------------------------------------------------------------------------------

    def create_ref(self, kind: str, repo: str, branch: str | None = None, revision: str | None = None) -> None:
        repository = self.hub.writable(kind, repo, self.token)
        body = self.json_body()
        ref = f"refs/heads/{branch}" if branch else f"refs/tags/{body['tag']}"
        if ref in repository.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        start = self.revision(repository, revision or body.get("startingPoint"))
        repository.refs[ref] = start.sha
        self.answer_json({})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        repository = (self.hub.proposable if self.query.get("create_pr") else self.hub.writable)(
            kind, repo, self.token
        )
        commit = self.revision(repository, revision)
        answers = []
        for file in self.json_body()["files"]:
            sample = base64.b64decode(file["sample"])
            is_lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > REGULAR_LIMIT or b"\0" in sample
            old = commit.files.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": False,
                    "oid": old.etag if old else None,
                }
            )
        self.answer_json({"files": answers, "commitOid": commit.sha})

    def lfs_batch(self, kind: str, repo: str) -> None:
        self.hub.proposable(kind, repo, self.token)
        objects = []
        for item in self.json_body()["objects"]:
            oid, size = item["oid"], item["size"]
            if oid in self.hub.objects:
                objects.append({"oid": oid, "size": size})
                continue
            sig = _signature(oid)
            address = f"{self.hub.cdn_url}/upload/{oid}?size={size}&sig={sig}"
            upload = {"href": address}
            if size > self.hub.multipart_bytes:
                count = -(-size // self.hub.multipart_bytes)
                header = {str(n): f"{address}&part={n}" for n in range(1, count + 1)}
                upload = {
                    "href": f"{self.hub.url}/complete/{oid}?size={size}&sig={sig}",
                    "header": {**header, "chunk_size": str(self.hub.multipart_bytes)},
                }
            verify = {"href": f"{self.hub.url}/verify/{oid}"}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        self.answer_json({"transfer": "basic", "objects": objects})

    def check_signature(self, oid: str) -> None:
        if self.query.get("sig") != [_signature(oid)]:
            raise HubError(403, "The request signature does not match")

    def store(self, oid: str, content: bytes) -> None:
        if str(len(content)) != self.query["size"][0] or hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, f"The bytes received are not {oid}")
        self.hub.objects[oid] = content

    def upload(self, oid: str) -> None:
        self.check_signature(oid)
        if "part" in self.query:
            self.hub.parts[oid, int(self.query["part"][0])] = self.body
        else:
            self.store(oid, self.body)
        self.answer(b"", 200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, oid: str) -> None:
        self.check_signature(oid)
        content = b""
        for part in self.json_body()["parts"]:
            received = self.hub.parts.pop((oid, part["partNumber"]), None)
            if received is None or part["etag"].strip('"') != hashlib.md5(received).hexdigest():
                raise HubError(400, f"Part {part['partNumber']} was not received")
            content += received
        self.store(oid, content)
        self.answer_json({})

    def verify(self, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != self.json_body()["size"]:
            raise HubError(400, f"{oid} was not received whole")
        self.answer_json({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        create_pr = self.query.get("create_pr") == ["1"]
        repository = (self.hub.proposable if create_pr else self.hub.writable)(kind, repo, self.token)
        head = self.revision(repository, revision)
        ref = repository.full_ref(revision)
        if ref is None:
            raise HubError(404, f"{revision} is no branch", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines()]
        if not lines or lines[0]["key"] != "header":
            raise HubError(400, "A commit begins with its header")
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        if parent is not None and not head.sha.startswith(parent) and not create_pr:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            self.apply(line["key"], line["value"], files, kind)
        url = self.hub.address(kind, repo)
        answer = {"success": True}
        if create_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        commit = repository.commit(ref, head.sha, files, header["summary"])
        answer |= {"commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}"}
        self.answer_json(answer)

    def apply(self, key: str, value: dict, files: dict[str, File], kind: str) -> None:
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            if path == "README.md" and (errors := metadata_errors(content.decode(), kind)):
                raise HubError(400, "; ".join(errors))
            files[path] = File(content, False)
        elif key == "lfsFile":
            content = self.hub.objects.get(value["oid"])
            if content is None or len(content) != value.get("size", len(content)):
                raise HubError(
                    400, "Your push was rejected because an LFS pointer pointed to a file that does not exist"
                )
            files[path] = File(content, True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(400, f"{path} does not exist")
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation {key}")

    routes: list[tuple[str, str, Callable]] = [  # method, pattern of the path, what answers
        ("GET", r"/api/whoami-v2", whoami),
        ("POST", r"/api/repos/create", create),
        ("POST", r"/api/validate-yaml", validate),
        ("GET", rf"{API}/revision/(?P<revision>[^/]+)", info),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", tree),
        ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", paths_info),
        ("GET", rf"{API}/refs", list_refs),
        ("POST", rf"{API}/branch/(?P<branch>[^/]+)", create_ref),
        ("POST", rf"{API}/tag/(?P<revision>[^/]+)", create_ref),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", preupload),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", commit),
        ("GET", API, info),
        ("POST", rf"/{KIND_URL}{REPO}\.git/info/lfs/objects/batch", lfs_batch),
        ("PUT", r"/upload/(?P<oid>\w+)", upload),
        ("POST", r"/complete/(?P<oid>\w+)", complete),
        ("POST", r"/verify/(?P<oid>\w+)", verify),
        ("GET", r"/cdn/(?P<oid>\w+)", cdn),
        ("GET", rf"/{KIND_URL}{REPO}/resolve/(?P<revision>refs%2F[^/]+|[^/]+)/(?P<path>.+)", resolve),
    ]


def _signature(oid: str) -> str:
    """What a signed address carries."""
    return hashlib.sha256(f"secret {oid}".encode()).hexdigest()[:16]
