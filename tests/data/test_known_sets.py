"""Public sets by name, fetched from a server of the test's own."""

import gzip
import hashlib
import io
import logging
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from blossomrec_hf.data import build_sequences, known_sets


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("ml-1m/ratings.dat", "1::20::5::30\n1::10::5::10\n")
        file.writestr("ml-1m/movies.dat", "10::Ten::Drama\n20::Twenty::Comedy\n")
    return buffer.getvalue()


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """Serves `served` under any address and counts the requests; the set's checksum is that of the true archive."""
    state = {"served": archive(), "requests": 0, "length": None}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state["requests"] += 1
            self.send_response(200)
            self.send_header("Content-Length", str(state["length"] or len(state["served"])))
            self.end_headers()
            self.wfile.write(state["served"])

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/ml-1m.zip"
    md5 = hashlib.md5(archive()).hexdigest()
    known = known_sets.KnownSet(
        url, "ml-1m/ratings.dat", "ml-1m", "free to test", "https://page", md5, "ml-1m/movies.dat"
    )
    monkeypatch.setitem(known_sets.KNOWN, "ml-1m", known)
    monkeypatch.setenv("BLOSSOMREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield state
    server.shutdown()


def test_fetched_once_with_titles_and_license(publisher, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for number in range(2):
        dataset, tokenizer = build_sequences("ml-1m", output_dir=tmp_path / f"out{number}")
        assert tokenizer.decode_items(dataset["input_ids"][0]) == [10, 20]
        assert (tmp_path / f"out{number}" / "items.parquet").is_file()
    assert publisher["requests"] == 1
    assert caplog.text.count("free to test") == 1


def test_a_wrong_checksum_is_not_kept(publisher, tmp_path):
    publisher["served"] += b"!"
    with pytest.raises(ValueError, match="has the checksum .*it was removed"):
        build_sequences("ml-1m")
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []
    publisher["served"] = archive()
    assert len(build_sequences("ml-1m")[0]) == 1


def test_a_broken_connection_leaves_nothing(publisher, tmp_path):
    publisher["length"] = len(archive()) + 100
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        build_sequences("ml-1m")
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []


def test_without_network_a_sentence_says_where_to_put_the_file(publisher, tmp_path, monkeypatch):
    nowhere = known_sets.KnownSet("http://127.0.0.1:9/ml-1m.zip", "ml-1m/ratings.dat", "ml-1m", "free", "https://page")
    monkeypatch.setitem(known_sets.KNOWN, "ml-1m", nowhere)
    place = tmp_path / "cache" / "ml-1m" / "ml-1m.zip"
    with pytest.raises(FileNotFoundError, match=f"put it at {place}"):
        build_sequences("ml-1m")
    place.write_bytes(archive())
    assert len(build_sequences("ml-1m")[0]) == 1


def test_without_a_published_checksum_the_first_download_is_the_measure(publisher, tmp_path, monkeypatch):
    known = known_sets.KNOWN["ml-1m"]
    monkeypatch.setitem(
        known_sets.KNOWN, "ml-1m", known_sets.KnownSet(known.url, known.log, "ml-1m", "free", "https://page")
    )
    folder = known_sets.fetch("ml-1m")
    (folder / ".complete").unlink()
    (folder / "ml-1m.zip").write_bytes(archive() + b"!")
    with pytest.raises(ValueError, match="another edition"):
        known_sets.fetch("ml-1m")


@pytest.mark.parametrize("damage", ["page", "cut off", "empty", "other member", "damaged member", "gzip"])
def test_a_damaged_download_is_not_kept(publisher, tmp_path, monkeypatch, damage):
    """Neither is its checksum, where the publisher states none."""
    known = known_sets.KNOWN["ml-1m"]
    log, text = (
        ("ratings.csv.gz", gzip.compress(b"user,item\n1,20\n1,10\n")) if damage == "gzip" else (known.log, archive())
    )
    format = "csv" if damage == "gzip" else known.format
    url = known.url.replace("ml-1m.zip", log) if damage == "gzip" else known.url
    monkeypatch.setitem(known_sets.KNOWN, "ml-1m", known_sets.KnownSet(url, log, format, "free", "https://page"))
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("readme", "moved")
    publisher["served"] = {
        "page": b"<html>Moved</html>",
        "cut off": text[:-30],
        "empty": b"",
        "other member": other.getvalue(),
        "damaged member": text.replace(b"1::20::5::30", b"1::21::5::30"),
        "gzip": text[:-5],
    }[damage]
    with pytest.raises(ValueError, match="ml-1m/.* is damaged or another edition .*; it was removed"):
        build_sequences("ml-1m")
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []
    publisher["served"] = text
    dataset, tokenizer = build_sequences("ml-1m")
    assert set(tokenizer.decode_items(dataset["input_ids"][0])) == {10, 20}


def test_a_page_in_place_of_a_log_is_not_kept(publisher, tmp_path, monkeypatch):
    known = known_sets.KNOWN["ml-1m"]
    url = known.url.replace("ml-1m.zip", "ratings_Beauty.csv")
    monkeypatch.setitem(
        known_sets.KNOWN, "ml-1m", known_sets.KnownSet(url, "ratings_Beauty.csv", "amazon-csv", "free", "https://page")
    )
    publisher["served"] = b"<html>\n<p>Not here, sorry.\n</html>\n"
    with pytest.raises(ValueError, match="ratings_Beauty.csv is damaged or another edition"):
        build_sequences("ml-1m")
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []
