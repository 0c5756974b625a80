"""Files of a log: encodings, compression, archives, Hive partitions and other file systems; lists of events in one row."""

import json
import zipfile

import fsspec
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blossomrec_hf.data import build_sequences
from blossomrec_hf.data.filters import FilterReport
from blossomrec_hf.data.metadata import read_item_metadata


TEXT = "user,item,timestamp\nann,Café,3\nbob,thé,2\nann,thé,1\n"


def events(source, **options) -> dict:
    dataset, tokenizer = build_sequences(source, **options)
    return {row["user_id"]: tokenizer.decode_items(row["input_ids"]) for row in dataset}


WANTED = {"ann": ["thé", "Café"], "bob": ["thé"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_encoding_is_recognized_or_named(tmp_path, encoding, end):
    path = tmp_path / "log.csv"
    path.write_bytes(TEXT.replace("\n", end).encode(encoding))
    assert events(path) == events(path, encoding=encoding) == WANTED
    build_sequences(path, output_dir=tmp_path / "out")
    notes = FilterReport.load(tmp_path / "out").notes
    assert bool(notes) == (not encoding.startswith("utf-8"))
    assert not notes or notes[0].startswith(f"the encoding is recognized as {encoding}")


def test_another_encoding_is_named(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(TEXT.replace("Café", "кофе").replace("thé", "чай").encode("cp1251"))
    assert events(path, encoding="cp1251") == {"ann": ["чай", "кофе"], "bob": ["чай"]}
    for encoding, said in (
        ("utf-16-be", "it is not utf-16-be .*encoding=…"),
        ("utf-8", "line 2 is not UTF-8; name the enc"),
    ):
        with pytest.raises(ValueError, match=f"log.csv can not be read to its end: {said}"):
            build_sequences(path, encoding=encoding)


@pytest.mark.parametrize("kind", ["zst", "zip", "zip member", "zst in zip"])
def test_compressed_files(tmp_path, kind):
    path = tmp_path / ("log.csv.zst" if kind == "zst" else "logs.zip")
    with pa.OSFile(str(tmp_path / "log.csv.zst"), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(TEXT.encode())
    stored = (tmp_path / "log.csv.zst").read_bytes()
    if kind != "zst":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(*(("log.csv.zst", stored) if kind == "zst in zip" else ("data/log.csv", TEXT)))
            if kind == "zip member":
                archive.writestr("readme.txt", "of another kind")
    if kind == "zip member":
        with pytest.raises(
            ValueError,
            match=r"logs.zip has 2 members \(data/log.csv, readme.txt\); name one of them, such as zip://data",
        ):
            build_sequences(path)
        assert events(f"zip://data/*::{path}") == WANTED
        path = f"zip://data/log.csv::{path}"
    assert events(path) == WANTED
    if kind == "zst":
        path.write_bytes(stored[:-9])
        with pytest.raises(OSError, match="log.csv.zst can not be read to its end: it is no complete zstd file"):
            build_sequences(path)
    elif kind == "zip":
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(OSError, match="logs.zip can not be read: it is no complete zip file"):
            build_sequences(path)


def test_other_file_systems():
    """`fsspec`'s own in memory stands for s3, gs and hf."""
    system = fsspec.filesystem("memory")
    lines = TEXT.splitlines(keepends=True)
    with system.open("/logs/a/1.csv", "wb") as file:
        file.write("".join(lines[:2]).encode())
    with system.open("/logs/a/2.csv", "wb") as file:
        file.write("".join([lines[0], *lines[2:]]).encode())
    pl.DataFrame({"user": [1, 1], "item": [3, 2]}).write_parquet(file := pa.BufferOutputStream())
    with system.open("/logs/log.parquet", "wb") as stored:
        stored.write(file.getvalue())
    assert events("memory://logs/a") == events("memory://logs/a/*.csv") == events("memory://logs/**/*.csv") == WANTED
    assert events("memory://logs/log.parquet") == {1: [3, 2]}
    with pytest.raises(FileNotFoundError, match="'memory://logs/none.csv' is no file"):
        build_sequences("memory://logs/none.csv")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_partition_folders(tmp_path, suffix):
    """The keys are columns: of times by their usual names, or as they are named; hidden files are none."""
    log = pl.DataFrame({"user": [1, 2], "item": ["a", "b"], "price": [1, 2]})
    for day in ("2024-01-02", "2024-01-01"):
        folder = tmp_path / "log" / "kind=view%20it" / f"date={day}"
        folder.mkdir(parents=True)
        (folder / "_SUCCESS").touch()
        part = log.with_columns(item=pl.format(f"{{}}{day[-1]}", "item"))
        (part.write_csv if suffix == "csv" else part.write_parquet)(folder / f"part-0.{suffix}")
    wanted = {1: ["a1", "a2"], 2: ["b1", "b2"]}
    for source in (
        tmp_path / "log",
        f"{tmp_path}/log/**/*.{suffix}",
        f"{tmp_path}/log/kind=view%20it/*/part-0.{suffix}",
    ):
        assert events(source) == events(source, timestamp="date") == wanted
        assert events(source, timestamp="") == wanted  # the folders are in the order of their names
    assert "timestamps" not in build_sequences(tmp_path / "log", timestamp="")[0].column_names
    with pytest.raises(ValueError, match="user='kind' is a folder's name"):
        build_sequences(tmp_path / "log", user="kind")
    with pytest.raises(ValueError, match="timestamp='day' is no column of .*; it has 'user', 'item', 'price'"):
        build_sequences(tmp_path / "log", timestamp="day")


ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=5)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, form=st.sampled_from(["objects", "lists", "parquet", "table"]), broken=st.booleans())
def test_events_in_lists_are_read_as_plain_python_reads_them(tmp_path, rows, form, broken):
    expected: dict[int, list] = {}
    for user, seen in rows:
        for item, time in seen:
            expected.setdefault(user, []).append((time, item))
    expected = {
        user: [item for _, item in sorted(seen, key=lambda event: event[0])] for user, seen in expected.items()
    }
    columns = {
        "session": [user for user, _ in rows],
        "items": [[item for item, _ in seen] for _, seen in rows],
        "times": [[time for _, time in seen] for _, seen in rows],
    }
    options = {"user": "session", "item": "items", "timestamp": "times"}
    if form == "objects":
        options = {"user": "session", "item": "events.aid", "timestamp": "ts"}
        sessions = [{"session": u, "events": [{"aid": i, "ts": t, "x": [1]} for i, t in seen]} for u, seen in rows]
    else:
        sessions = [dict(zip(columns, values)) for values in zip(*columns.values())]
    first = (
        {"session": 0, "events": [{"aid": 0, "ts": 0}]}
        if form == "objects"
        else {"session": 0, "items": [0], "times": [0]}
    )
    path = tmp_path / "log.jsonl"
    text = "".join(json.dumps(session) + "\n" for session in [first, *sessions])
    path.write_text(text + '{"session": 3, "events": 7, "items": [1], "times": [1, 2]}\n{"session": 4,\n' * broken)
    expected[0] = [0, *expected.get(0, [])] if form in ("objects", "lists") else expected.get(0, [])
    expected = {user: items for user, items in expected.items() if items}
    if form in ("objects", "lists"):
        assert events(path, on_bad_rows="skip", **options) == expected
        if broken:
            with pytest.raises(ValueError, match=f"log.jsonl, line {len(rows) + 2}: not a usable"):
                build_sequences(path, **options)
        return
    types = {"session": pl.Int64, "items": pl.List(pl.Int64), "times": pl.List(pl.Int64)}
    table = pl.DataFrame(columns, schema=types)
    if not expected:
        return
    if form == "parquet":
        table.write_parquet(tmp_path / "log.parquet")
    assert events(table if form == "table" else tmp_path / "log.parquet", **options) == expected


def test_a_folder_of_several_kinds_of_files_is_refused_and_one_of_recbole_read(tmp_path, caplog):
    (tmp_path / "log.csv").write_text("user,item\n1,2\n")
    (tmp_path / "items.jsonl").write_text('{"item": 2, "title": "b"}\n')
    with pytest.raises(
        ValueError, match=r"files of several kinds \(items.jsonl, log.csv\); name the files of the log"
    ):
        build_sequences(tmp_path)
    recbole = tmp_path / "mine"
    recbole.mkdir()
    (recbole / "mine.inter").write_text("user_id:token\titem_id:token\n1\t2\n")
    (recbole / "mine.item").write_text("item_id:token\ttitle:token_seq\n2\tb\n")
    (recbole / "mine.user").write_text("user_id:token\tage:float\n1\t30\n")
    for source in (recbole, recbole / "mine.inter"):
        dataset, tokenizer = build_sequences(source, output_dir=tmp_path / "out", overwrite=True)
        assert tokenizer.decode_items(dataset["input_ids"][0]) == [2]
        assert read_item_metadata(tmp_path / "out")["title"].to_list() == ["b"]
        assert "item titles are those of mine.item" in caplog.text
    assert "the events are those of the .inter files of mine, not of mine.item, mine.user" in caplog.text
    (recbole / "mine.item").write_text("item_id:token\tgenre:token_seq\n2\tb\n")  # no titles
    build_sequences(recbole, output_dir=tmp_path / "out", overwrite=True)
    assert read_item_metadata(tmp_path / "out") is None
    (tmp_path / "log.txt").write_text((recbole / "mine.inter").read_text())  # a name that does not say what it is
    assert build_sequences(tmp_path / "log.txt", format="recbole")[0]["input_ids"][0] == [2]
