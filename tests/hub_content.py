"""What a Hub holds: repositories, their commits and files, and the errors with which it refuses."""

import hashlib
from dataclasses import dataclass, field


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".npz", ".png", ".faiss")
REGULAR_LIMIT = 10 * 2**20


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


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code
