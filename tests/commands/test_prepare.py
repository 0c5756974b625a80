"""`blossomrec prepare`: what cannot be read or written ends it with one sentence and exit code 2, and leaves nothing."""

import gzip
import os

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blossomrec_hf.commands import prepare


GOOD = "user,item,time\n1,a,1\n1,b,2\n1,c,3\n"


def parquet(path) -> bytes:
    """With checksums, by which a reader can find what is damaged."""
    table = pa.table({"user": np.arange(5000), "item": np.arange(5000)})
    pq.write_table(table, path, write_page_checksum=True)
    return path.read_bytes()


def last_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("log.csv", b"user,item\n1,2,3\n", "line 2: more fields than the header has"),
        ("log.csv", b"user,item\n1,caf\xe9\x81\n", "line 2 is not UTF-8"),
        ("log.csv", bytes(range(256)) * 9, "has no column known to be the user"),
        ("log.csv", b"user item\n1 2\n", "has no header of names"),
        ("log.jsonl", b'{"user": 1, "item": 2}\n{"user": 1, ', "line 2: not a usable user or item"),
        ("log.jsonl", b"[" * 100_000, "looks like no known format"),
        ("log.parquet", b"PAR1 no more", "log.parquet can not be read to its end"),
        ("log.parquet", None, "log.parquet can not be read to its end"),
        ("log.csv.gz", gzip.compress(GOOD.encode() * 99, mtime=0)[:-9], "is no complete gzip file"),
        ("log.csv.gz", GOOD.encode(), "is no complete gzip file"),
    ],
    ids=range(10),  # every process that collects the tests must find the same names
)  # fmt: skip
def test_damaged_logs(tmp_path, capsys, name, content, said):
    if content is None:
        content = parquet(tmp_path / name)
        content = content[:1000] + bytes(500) + content[1500:]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        prepare.main([str(tmp_path / name), "--output_dir", str(tmp_path / "out")])
    assert ended.value.code == 2 and said in last_line(capsys)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--output_dir", "file"], "because .*file is a file"),
        (["--output_dir", "file/out", "--overwrite"], "because .*file is a file"),
        (["--output_dir", "folder"], "pass overwrite=True .--overwrite."),
        (["--output_dir", "folder", "--overwrite"], "has files, but no data set"),
        (["--output_dir", "out", "--report", "nowhere/page.html"], "--report is nowhere/page.html"),
        (["--output_dir", "out", "--items", "nowhere.csv"], "items 'nowhere.csv' is no file"),
        (["--output_dir", "out", "--items", "file"], "file can not be read|items has the columns"),
        (["--output_dir", "out", "--time_format", "%d/%m/%Y"], "the times look like '1'"),
    ],
)
def test_outputs_that_cannot_be_written_and_options_that_do_not_fit(tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.csv").write_text(GOOD)
    (tmp_path / "file").write_bytes(b"\x00\xff\n\x01")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("Dear reader")
    with pytest.raises(SystemExit) as ended:
        prepare.main(["log.csv", *options])
    message = last_line(capsys)
    assert ended.value.code == 2
    assert pl.Series([message]).str.contains(said).item(), message
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "log.csv"]
    assert (tmp_path / "folder" / "letter.txt").read_text() == "Dear reader"


@pytest.mark.slow
@pytest.mark.parametrize("limit", [20_000, 200_000, 700_000])
def test_nothing_is_left_of_a_full_disk(run_command, tmp_path, monkeypatch, limit):
    """A limit on the size of files stands in for the full disk: the system refuses the write either way."""
    log = pl.DataFrame({"user": np.arange(90_000) % 7, "item": np.arange(90_000), "time": np.arange(90_000)})
    log.write_csv(tmp_path / "log.csv")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    split = ("--split", "time", "--validation_from", 80000, "--test_from", 85000)
    error = run_command("prepare", tmp_path / "log.csv", "--output_dir", tmp_path / "out", *split,
        max_file_bytes=limit, status=2, field="stderr",
    )  # fmt: skip
    assert "Traceback" not in error, error
    assert any(word in error.splitlines()[-1] for word in ("room", "File too large")), error
    assert os.listdir(tmp_path) == ["log.csv"]
