"""A file or a folder is the old one or the new one, complete: after an error, after `kill -9` at any step, with other writers."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from forked_commands import run_code
from safetensors.numpy import save_file

from blossomrec_hf.model.files_blossomrec import LEFTOVER_SECONDS, partial_path, partials
from blossomrec_hf.utils.files import (
    atomic_files,
    atomic_folder,
    atomic_write,
    recover_folder,
    recover_writes,
    report_leftovers,
    require_folder,
    write_json,
)


# Every call of the file system is announced by an audit event before it happens. Every write is a copy of one process that is killed before the event of that number.
KILLS = """
import os, random, shutil, signal, sys
from pathlib import Path
from blossomrec_hf.utils.files import atomic_folder, atomic_write, recover_folder

kind, target, random_seed = sys.argv[1], Path(sys.argv[2]) / "target", int(sys.argv[3])
random.seed(random_seed)
CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir")

def write(content):
    if kind == "file":
        with atomic_write(target) as partial:
            partial.write_text(content)
        return
    with atomic_folder(target) as folder:
        (folder / "below").mkdir()
        for name in ("a", "below/b", "below/c"):
            (folder / name).write_text(content)

def read():
    if kind == "file":
        return target.read_text()
    recover_folder(target)
    (content,) = {path.read_text() for path in target.rglob("*") if path.is_file()}
    assert sorted(path.name for path in target.rglob("*")) == ["a", "b", "below", "c"]
    return content

def killed(call, number):
    '''Whether `call` was killed before its file system call of that number; otherwise it has ended.'''
    child = os.fork()
    if child == 0:
        count = 0
        def hook(event, arguments):
            nonlocal count
            if event in CALLS:
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        call()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0

def outcome():
    '''Old or new, read after at most one reader that was killed as well.'''
    killed(read, random.randrange(1, 4))
    content = read()
    assert content in ("old", "new"), content
    return content

found = []
number = 1
while True:
    write("old")
    alive = not killed(lambda: write("new"), number)
    if not alive and number % 2:  # and once more, before anybody has read it, somewhere else
        killed(lambda: write("new"), random.randrange(1, 40))
    found.append(outcome())
    if alive:
        break
    number += 1
assert "old" in found and found[-1] == "new", found
write("last")
assert read() == "last"
print(number)
"""


@pytest.mark.parametrize(("kind", "fewest"), [("file", 4), ("folder", 20)])
def test_killed_at_any_step_a_reader_finds_the_old_or_the_new_one(tmp_path, kind, fewest, seed):
    (tmp_path / "files").mkdir()
    done = run_code(KILLS, kind, tmp_path / "files", seed, folder=tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= fewest  # so many steps were tried


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_error_leaves_the_old_one_and_nothing_of_the_new(tmp_path):
    write_json(tmp_path / "file", "old")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "file") as partial:
        partial.write_text("new")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == '"old"\n' and (tmp_path / "folder" / "a").read_text() == "old"


def test_a_rename_that_fails_gives_the_old_folder_its_name_back(tmp_path, monkeypatch):
    target = tmp_path / "folder"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    rename = os.rename

    def failing(source, destination):
        if Path(destination) == target and "partial" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(target) as folder:
        (folder / "a").write_text("new")
    assert names(tmp_path) == ["folder"] and (target / "a").read_text() == "old"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_usual_permissions(tmp_path, umask):
    """safetensors writes files that only their owner can read."""
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "one.safetensors") as path:
            save_file({"x": np.zeros(2)}, path)
        for write, folder in ((atomic_folder, tmp_path / "folder"), (atomic_files, tmp_path / "files")):
            with write(folder) as partial:
                save_file({"x": np.zeros(2)}, partial / "two.safetensors")
                (partial / "three.json").write_text("{}")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_symbolic_links_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    (tmp_path / "name").symlink_to(tmp_path / "disk" / "file")
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "link") as folder:
            (folder / "a").write_text(content)
        write_json(tmp_path / "name", content)
        assert (tmp_path / "disk" / "folder" / "a").read_text() == content
        assert (tmp_path / "disk" / "file").read_text() == f'"{content}"\n'
    assert (tmp_path / "link").is_symlink() and (tmp_path / "name").is_symlink()


def test_a_file_in_the_place_of_a_folder_is_named_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "out"):
        with pytest.raises(ValueError, match=f"{tmp_path / 'file'} is a file; give another path"):
            require_folder(path)
        with pytest.raises(ValueError, match="is a file"), atomic_folder(path):
            pass
    require_folder(tmp_path / "folder" / "new")
    with pytest.raises(ValueError, match="is a folder"), atomic_write(tmp_path / "folder"):
        pass


def test_leftovers_of_a_kill_go_after_a_day_and_at_once_where_one_process_writes(tmp_path):
    old, young, other = (partial_path(tmp_path / name) for name in ("a", "a", "a.b"))
    for path in (old, other):
        path.mkdir()
        (path / "x").write_text("half")
    young.write_text("half")
    long_ago = time.time() - LEFTOVER_SECONDS - 10
    for path in (old, other):
        os.utime(path / "x", (long_ago, long_ago))
        os.utime(path, (long_ago, long_ago))
    mine = tmp_path / ".mine.partial"
    mine.write_text("not ours")
    write_json(tmp_path / "a", 1)
    assert names(tmp_path) == sorted([young.name, other.name, "a", ".mine.partial"])

    with atomic_folder(tmp_path / "whole") as folder:
        (folder / "x").write_text("whole")
    os.rename(tmp_path / "whole", tmp_path / ".whole.former")  # as a kill between the two renames leaves it
    recover_writes(tmp_path)
    assert names(tmp_path) == [".mine.partial", "a", "whole"] and (tmp_path / "whole" / "x").read_text() == "whole"
    recover_writes(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_many_writers_and_readers_at_once_find_one_whole_version(tmp_path, kind):
    target = tmp_path / "target"

    def write(content: str) -> None:
        if kind == "file":
            with atomic_write(target) as partial:
                partial.write_text(content * 1000)
        else:
            with atomic_folder(target) as folder:
                for name in "abc":
                    (folder / name).write_text(content * 1000)

    errors = []

    def work(content: str) -> None:
        try:
            for _ in range(15):
                write(content)
                recover_folder(target)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    recover_folder(target)
    files = [target] if kind == "file" else sorted(target.iterdir())
    assert len(files) == (1 if kind == "file" else 3)
    assert len({path.read_text() for path in files}) == 1 and len(files[0].read_text()) == 1000
    assert names(tmp_path) == ["target"]


def test_files_are_put_beside_others_together_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(KeyboardInterrupt), atomic_files(folder) as partial:
        (partial / "a").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []  # nor is the folder that was not there before
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_files(folder) as partial:
        (partial / "a").write_text("half")
        raise KeyboardInterrupt
    assert [(folder / name).read_text() for name in names(folder)] == ["old", "old"]
    with atomic_files(folder) as partial:
        (partial / "a").write_text("new")
        (partial / "c").write_text("new")
        # Only there can a file be renamed into `folder`, if that is a file system of its own.
        assert partial.parent == folder
    assert [(name, (folder / name).read_text()) for name in names(folder)] == [
        ("a", "new"),
        ("b", "old"),
        ("c", "new"),
    ]


def test_leftovers_of_writes_inside_of_writes_are_found(tmp_path):
    inner = partial_path(partial_path(tmp_path / "data"))
    inner.mkdir()
    for name in ("other", ".data"):
        partial_path(tmp_path / name).mkdir()
    assert partials(tmp_path, "data") == [inner]


def test_what_may_still_be_written_is_reported_and_what_cannot_be_is_removed(tmp_path, caplog):
    long_ago = time.time() - LEFTOVER_SECONDS - 10
    left = [partial_path(tmp_path / "data") for _ in range(2)]
    for path in left:
        path.mkdir()
        (path / "events").write_text("x")
    os.utime(left[0] / "events", (long_ago, long_ago))
    for path in left:  # one of them is appended to, which is no change of the folder
        os.utime(path, (long_ago, long_ago))
    report_leftovers(tmp_path / "data")
    assert names(tmp_path) == [left[1].name]
    (message,) = caplog.messages
    assert message.startswith(str(left[1])) and "running or was killed" in message
