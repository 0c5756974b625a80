"""
A Hub of its own on loopback: the HTTP API of huggingface.co as `huggingface_hub` speaks it, in memory.

The real client runs against it unpatched, so it insists on what the real Hub insists on: tokens and their rights,
valid names, objects whose SHA-256 is what was announced, commits that name only objects that were uploaded, a parent
commit that still is the head, metadata in README.md that is well-formed. It speaks LFS (one part or many), not Xet.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from card_rules import metadata_errors


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".npz", ".png", ".faiss")
REGULAR_LIMIT = 10 * 2**20
KIND_URL = r"(?:(?P<kind>datasets|spaces)/)?"
REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"


@dataclass(frozen=True)
class File:
    """A file of a commit: its bytes, and whether they lie in the store of large objects."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        content = self.content
        if self.is_lfs:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n".encode()
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    parent: str | None
    files: dict[str, File]
    title: str
    number: int

    @property
    def sha(self) -> str:
        tree = "".join(f"{path} {file.blob_id}\n" for path, file in sorted(self.files.items()))
        return hashlib.sha1(f"{self.parent}\n{self.title}\n{self.number}\n{tree}".encode()).hexdigest()


@dataclass
class Repository:
    kind: str  # model, dataset or space
    name: str
    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/pr/1, refs/tags/v1 -> sha

    def commit(self, ref: str, parent: str | None, files: dict[str, File], title: str) -> Commit:
        commit = Commit(parent, files, title, len(self.commits))
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit

    def full_ref(self, revision: str) -> str | None:
        return next((ref for ref in (f"refs/heads/{revision}", revision) if ref in self.refs), None)

    def find(self, revision: str) -> Commit | None:
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        return self.commits.get(revision)

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["refs/heads/main"]]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match."""

    method: str
    path: str  # a regular expression
    kind: str  # drop, corrupt, truncate or an HTTP status
    times: int


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class LocalHub:
    """
    The state of the Hub and its server.

    Attributes:
        url: where it is once it serves.
        requests: (method, path, status) of all that was asked, in order; status 0 where the connection was dropped.
        tokens: token → (user, whether it may write).
    """

    def __init__(self, port: int = 0):
        self.tokens = {"hf_writer": ("ada", True), "hf_reader": ("ada", False), "hf_other": ("eve", True)}
        self.multipart_bytes = 2**62
        self.reset()
        self._bind(port)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.cdn_url = f"http://localhost:{self.server.server_address[1]}"  # to the client, another host
        self.is_up = False
        self.connections: set[socket.socket] = set()

    def _bind(self, port: int) -> None:
        """Takes a port, on which connections are refused until `start`."""
        self.server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self), bind_and_activate=False)
        self.server.daemon_threads = True
        self.server.server_bind()

    def reset(self) -> None:
        """An empty Hub."""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.renamed: dict[tuple[str, str], str] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []
        self.lock = threading.RLock()

    def start(self) -> None:
        if not self.is_up:
            self.is_up = True
            self.server.server_activate()
            threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """No network any more: open connections break, new ones are refused. What was stored stays."""
        if self.is_up:
            self.is_up = False
            self.server.shutdown()
            self.server.server_close()
            for connection in list(self.connections):
                with suppress(OSError):  # closed from the other end
                    connection.shutdown(socket.SHUT_RDWR)
            self._bind(self.server.server_address[1])

    def fail(self, kind: str | int, *, method: str = ".*", path: str = ".*", times: int = 1) -> None:
        """
        Makes matching requests fail: `"drop"` (the connection ends in mid-request), `"truncate"` (the answer ends in
        the middle), `"corrupt"` (a byte of the answer is another), or an HTTP status.
        """
        self.faults.append(Fault(method, path, str(kind), times))

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]

    def rename(self, old: str, new: str, kind: str = "model") -> None:
        """What was at `old` is at `new`; the old address redirects."""
        repository = self.repositories.pop((kind, old))
        repository.name = new
        self.repositories[kind, new] = repository
        self.renamed[kind, old] = new

    def take_fault(self, method: str, path: str) -> str | None:
        for fault in self.faults:
            if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                fault.times -= 1
                return fault.kind
        return None

    def uploads(self) -> list[str]:
        """The objects whose bytes were received, in order."""
        return [
            path.split("/")[2].split("?")[0]
            for method, path, status in self.requests
            if method == "PUT" and path.startswith("/upload/") and status == 200
        ]

    # -- who may do what ---------------------------------------------------------------------------

    def user(self, token: str | None) -> tuple[str, bool] | None:
        if token is None:
            return None
        if token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def readable(self, kind: str, name: str, token: str | None) -> Repository:
        user = self.user(token)
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and (user is None or user[0] != name.split("/")[0])):
            # As the real one: who is not logged in is not told whether there is such a repository.
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, kind: str, name: str, token: str | None) -> Repository:
        repository = self.readable(kind, name, token)
        self.check_may_write(name.split("/")[0], token)
        return repository

    def proposable(self, kind: str, name: str, token: str | None) -> Repository:
        """What a pull request can be opened for: anything that one may read, with a token that may write."""
        repository = self.readable(kind, name, token)
        user = self.user(token)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        self.check_may_write(user[0], token)
        return repository

    def check_may_write(self, owner: str, token: str | None) -> None:
        user = self.user(token)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user[0] != owner:
            raise HubError(403, f"You don't have the rights to create or change anything under {owner!r}")
        if not user[1]:
            raise HubError(403, "You must use a write token to create, change or upload anything")


def _handler(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    """The class of request handlers of one hub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        routes: list[tuple[str, str, Callable]]  # method, pattern of the path, what answers

        def log_message(self, *args) -> None:
            pass

        def setup(self) -> None:
            super().setup()
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small answers are not held back
            hub.connections.add(self.connection)

        def finish(self) -> None:
            hub.connections.discard(self.connection)
            with suppress(OSError):  # the Hub was stopped
                super().finish()

        def handle_any(self) -> None:
            self.fault = hub.take_fault(self.command, self.path) if hub.is_up else "drop"
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
                with hub.lock:
                    self.route()
            except HubError as error:
                headers = {"X-Error-Message": str(error)}
                if error.code:
                    headers["X-Error-Code"] = error.code
                self.answer_json({"error": str(error)}, error.status, headers)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                hub.requests.append((self.command, self.path, self.status))

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
                        if (new := hub.renamed.get((kind, groups["repo"]))) is not None:
                            target = self.path.replace(groups["repo"], new, 1)
                            return self.answer(b"", 307, {"Location": target})
                        groups["kind"] = kind
                    return answer(self, **groups)
            raise HubError(404, f"Sorry, we can't find {self.path}")

        def whoami(self) -> None:
            user = hub.user(self.token)
            if user is None:
                raise HubError(401, "Invalid username or password.")
            role = {"displayName": "test", "role": "write" if user[1] else "read"}
            self.answer_json({"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": role}})

        def create(self) -> None:
            body = self.json_body()
            user = hub.user(self.token)
            if user is None:
                raise HubError(401, "Invalid username or password.")
            owner, kind = body.get("organization") or user[0], body.get("type") or "model"
            name = f"{owner}/{body['name']}"
            hub.check_may_write(owner, self.token)
            if not re.fullmatch(r"[\w.-]{1,96}", body["name"]):
                raise HubError(400, f"Invalid repo name: {name}")
            url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
            if (kind, name) in hub.repositories:
                return self.answer_json({"error": f"You already created this {kind} repo: {name}", "url": url}, 409)
            private = bool(body.get("private")) or body.get("visibility") == "private"
            repository = hub.repositories[kind, name] = Repository(kind, name, private)
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
            repository = hub.readable(kind, repo, self.token)
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
            commit = self.revision(hub.readable(kind, repo, self.token), revision)
            prefix = f"{path}/" if path else ""
            inside = {name: file for name, file in sorted(commit.files.items()) if name.startswith(prefix)}
            if path and not inside:
                raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
            folders = sorted(
                {prefix + name[len(prefix) :].split("/")[0] for name in inside if "/" in name[len(prefix) :]}
            )
            entries = [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
            recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
            entries += [
                self.entry(name, file) for name, file in inside.items() if recursive or "/" not in name[len(prefix) :]
            ]
            first = int(self.query.get("cursor", ["0"])[0])
            page, headers = entries[first : first + 1000], {}
            if first + 1000 < len(entries):
                following = f"{hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={first + 1000}"
                headers["Link"] = f'<{following}>; rel="next"'
            self.answer_json(page, headers=headers)

        def paths_info(self, kind: str, repo: str, revision: str) -> None:
            commit = self.revision(hub.readable(kind, repo, self.token), revision)
            if self.headers.get("Content-Type", "").startswith("application/json"):
                paths = self.json_body()["paths"]
            else:
                paths = parse_qs(self.body.decode())["paths"]
            self.answer_json([self.entry(path, commit.files[path]) for path in paths if path in commit.files])

        def list_refs(self, kind: str, repo: str) -> None:
            repository = hub.readable(kind, repo, self.token)
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
            repository = hub.readable(kind, repo, self.token)
            user = hub.user(self.token)
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
                "Location": f"{hub.cdn_url}/cdn/{file.sha256}?sig={_signature(file.sha256)}",
            }
            self.answer(b"", 302, headers)

        def cdn(self, oid: str) -> None:
            self.check_signature(oid)
            if oid not in hub.objects:
                raise HubError(404, "no such object")
            self.content(hub.objects[oid], {"ETag": f'"{oid}"'})

        def content(self, content: bytes, headers: dict[str, str]) -> None:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if match is None:
                return self.answer(content, 200, headers)
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(content[first : last + 1], 206, headers)

        # -- writing -------------------------------------------------------------------------------

        def create_ref(self, kind: str, repo: str, branch: str | None = None, revision: str | None = None) -> None:
            repository = hub.writable(kind, repo, self.token)
            body = self.json_body()
            ref = f"refs/heads/{branch}" if branch else f"refs/tags/{body['tag']}"
            if ref in repository.refs:
                raise HubError(409, f"Reference already exists: {ref}")
            start = self.revision(repository, revision or body.get("startingPoint"))
            repository.refs[ref] = start.sha
            self.answer_json({})

        def preupload(self, kind: str, repo: str, revision: str) -> None:
            repository = (hub.proposable if self.query.get("create_pr") else hub.writable)(kind, repo, self.token)
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
            hub.proposable(kind, repo, self.token)
            objects = []
            for item in self.json_body()["objects"]:
                oid, size = item["oid"], item["size"]
                if oid in hub.objects:
                    objects.append({"oid": oid, "size": size})
                    continue
                sig = _signature(oid)
                address = f"{hub.cdn_url}/upload/{oid}?size={size}&sig={sig}"
                upload = {"href": address}
                if size > hub.multipart_bytes:
                    count = -(-size // hub.multipart_bytes)
                    header = {str(n): f"{address}&part={n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{hub.url}/complete/{oid}?size={size}&sig={sig}",
                        "header": {**header, "chunk_size": str(hub.multipart_bytes)},
                    }
                verify = {"href": f"{hub.url}/verify/{oid}"}
                objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
            self.answer_json({"transfer": "basic", "objects": objects})

        def check_signature(self, oid: str) -> None:
            if self.query.get("sig") != [_signature(oid)]:
                raise HubError(403, "The request signature does not match")

        def store(self, oid: str, content: bytes) -> None:
            if str(len(content)) != self.query["size"][0] or hashlib.sha256(content).hexdigest() != oid:
                raise HubError(400, f"The bytes received are not {oid}")
            hub.objects[oid] = content

        def upload(self, oid: str) -> None:
            self.check_signature(oid)
            if "part" in self.query:
                hub.parts[oid, int(self.query["part"][0])] = self.body
            else:
                self.store(oid, self.body)
            self.answer(b"", 200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

        def complete(self, oid: str) -> None:
            self.check_signature(oid)
            content = b""
            for part in self.json_body()["parts"]:
                received = hub.parts.pop((oid, part["partNumber"]), None)
                if received is None or part["etag"].strip('"') != hashlib.md5(received).hexdigest():
                    raise HubError(400, f"Part {part['partNumber']} was not received")
                content += received
            self.store(oid, content)
            self.answer_json({})

        def verify(self, oid: str) -> None:
            if len(hub.objects.get(oid, b"")) != self.json_body()["size"]:
                raise HubError(400, f"{oid} was not received whole")
            self.answer_json({})

        def commit(self, kind: str, repo: str, revision: str) -> None:
            create_pr = self.query.get("create_pr") == ["1"]
            repository = (hub.proposable if create_pr else hub.writable)(kind, repo, self.token)
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
            url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{repo}"
            answer = {"success": True}
            if create_pr:
                number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
                ref = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{url}/discussions/{number}"
            commit = repository.commit(ref, head.sha, files, header["summary"])
            answer |= {"commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}"}
            self.answer_json(answer)

        @staticmethod
        def apply(key: str, value: dict, files: dict[str, File], kind: str) -> None:
            path = value["path"]
            if key == "file":
                content = base64.b64decode(value["content"])
                if path == "README.md" and (errors := metadata_errors(content.decode(), kind)):
                    raise HubError(400, "; ".join(errors))
                files[path] = File(content, False)
            elif key == "lfsFile":
                content = hub.objects.get(value["oid"])
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

    api = rf"/api/(?P<kind>models|datasets|spaces)/{REPO}"
    Handler.routes = [
        ("GET", r"/api/whoami-v2", Handler.whoami),
        ("POST", r"/api/repos/create", Handler.create),
        ("POST", r"/api/validate-yaml", Handler.validate),
        ("GET", rf"{api}/revision/(?P<revision>[^/]+)", Handler.info),
        ("GET", rf"{api}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Handler.tree),
        ("POST", rf"{api}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
        ("GET", rf"{api}/refs", Handler.list_refs),
        ("POST", rf"{api}/branch/(?P<branch>[^/]+)", Handler.create_ref),
        ("POST", rf"{api}/tag/(?P<revision>[^/]+)", Handler.create_ref),
        ("POST", rf"{api}/preupload/(?P<revision>[^/]+)", Handler.preupload),
        ("POST", rf"{api}/commit/(?P<revision>[^/]+)", Handler.commit),
        ("GET", api, Handler.info),
        ("POST", rf"/{KIND_URL}{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
        ("PUT", r"/upload/(?P<oid>\w+)", Handler.upload),
        ("POST", r"/complete/(?P<oid>\w+)", Handler.complete),
        ("POST", r"/verify/(?P<oid>\w+)", Handler.verify),
        ("GET", r"/cdn/(?P<oid>\w+)", Handler.cdn),
        ("GET", rf"/{KIND_URL}{REPO}/resolve/(?P<revision>refs%2F[^/]+|[^/]+)/(?P<path>.+)", Handler.resolve),
    ]
    return Handler


def _signature(oid: str) -> str:
    """What a signed address carries."""
    return hashlib.sha256(f"secret {oid}".encode()).hexdigest()[:16]


if __name__ == "__main__":  # to look at it by hand: HF_ENDPOINT=http://127.0.0.1:8907
    hub = LocalHub(8907)
    hub.start()
    print(hub.url)
    while True:
        time.sleep(1)
