"""
A Hub of its own on loopback: the HTTP API of huggingface.co as `huggingface_hub` speaks it, in memory.

The real client runs against it unpatched, so it insists on what the real Hub insists on: tokens and their rights,
valid names, objects whose SHA-256 is what was announced, commits that name only objects that were uploaded, a parent
commit that still is the head, metadata in README.md that is well-formed. It speaks LFS (one part or many), not Xet.
What it holds is in `hub_content.py`, what it answers in `hub_api.py`.
"""

import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import ThreadingHTTPServer

from hub_api import Handler
from hub_content import HubError, Repository


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match."""

    method: str
    path: str  # a regular expression
    kind: str  # drop, corrupt, truncate or an HTTP status
    times: int


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
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler, bind_and_activate=False)
        self.server.hub = self
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

    def address(self, kind: str, name: str) -> str:
        return f"{self.url}/{'' if kind == 'model' else kind + 's/'}{name}"

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

    def logged_in(self, token: str | None) -> tuple[str, bool]:
        user = self.user(token)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return user

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
        user = self.logged_in(token)
        self.check_may_write(user[0], token)
        return repository

    def check_may_write(self, owner: str, token: str | None) -> None:
        user = self.logged_in(token)
        if user[0] != owner:
            raise HubError(403, f"You don't have the rights to create or change anything under {owner!r}")
        if not user[1]:
            raise HubError(403, "You must use a write token to create, change or upload anything")


if __name__ == "__main__":  # to look at it by hand: HF_ENDPOINT=http://127.0.0.1:8907
    hub = LocalHub(8907)
    hub.start()
    print(hub.url)
    while True:
        time.sleep(1)
