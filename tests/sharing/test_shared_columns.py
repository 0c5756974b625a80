"""The columns of a log survive prepare, save, push, load, split, pack and batch, on random logs against plain Python."""

from pathlib import Path

import polars as pl
import pytest
from datasets import load_dataset
from history_cases import ROWS, ends_of, history_of
from huggingface_hub import snapshot_download
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.batches import PackingCollator
from blossomrec_hf.commands import prepare
from blossomrec_hf.data import split
from blossomrec_hf.data.metadata import read_item_metadata


START = 1_600_000_000


def unpack(batch: dict, names: list[str]) -> list[dict]:
    """The histories of a packed batch."""
    ends = batch["cu_seq_lens_q"].tolist()
    return [{name: batch[name][0, a:b].tolist() for name in names} for a, b in zip(ends, ends[1:])]


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=ROWS,
    options=st.fixed_dictionaries(
        {},
        optional={
            "targets": st.sampled_from(["buy", "buy,view"]),
            "weight": st.just("weight"),
            "session_gap": st.just("2.5s"),
            "group": st.just("timestamp"),
        },
    ),
)
def test_columns_survive_from_the_log_to_the_batch(local_hub, tmp_path_factory, monkeypatch, rows, options):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    local_hub.reset()
    folder = tmp_path_factory.mktemp("columns")
    rows = [*rows, (9, 0, "buy", 0.0, 1.0), (9, 1, "view", 1.0, 2.0), (9, 2, "buy", 2.0, 1.0), (9, 3, "buy", 3.0, 1.0)]
    log = pl.DataFrame(rows, ["user", "item", "kind", "time", "weight"], orient="row")
    log.with_columns(pl.col("time") + START).write_csv(folder / "log.csv")
    features = {item: (f"g{item % 2}|all", [item / 4, -1.0]) for item in range(0, 5, 2)}
    items = [{"item": item, "genre": genre, "place": place} for item, (genre, place) in features.items()]
    pl.DataFrame(items).write_ndjson(folder / "items.jsonl")
    repository = f"ada/{folder.name}"
    command = [str(folder / "log.csv"), "--output_dir", str(folder / "out"), "--push_to_hub", repository]
    command += ["--event_type", "kind", "--event_types", "view,cart,buy", "--items", str(folder / "items.jsonl")]
    command += ["--item_categories", "genre", "--item_vectors", "place"]
    prepare.main([*command, *(word for name, value in options.items() for word in (f"--{name}", value))])

    dataset = load_dataset(repository, split="train", cache_dir=str(folder / "cache"))
    files = snapshot_download(repository, repo_type="dataset", cache_dir=str(folder / "cache"))
    tokenizer = BlossomRecTokenizer.from_pretrained(files)
    assert f'load_dataset("{repository}", split="train")' in Path(files, "README.md").read_text()
    table = read_item_metadata(files)
    assert tokenizer.decode_items(table["input_id"].to_list()) == table["item"].to_list()
    for row in table.iter_rows(named=True):
        genre, place = features.get(row["item"], (None, None))
        assert row["genre"] == (None if genre is None else genre.split("|")) and row["place"] == place

    kinds = ["view", "cart", "buy"]
    assert dataset.features["event_type_ids"].feature.names == kinds
    names = ["timestamps", "event_type_ids", *(["weights"] if options.keys() & {"targets", "weight"} else [])]
    names += [
        {"session_gap": "session_starts", "group": "basket_starts"}[name]
        for name in options
        if name in ("session_gap", "group")
    ]
    histories = {}
    for user in dict.fromkeys(row[0] for row in rows):
        history = history_of([row for row in rows if row[0] == user], options)
        events = {"input_ids": tokenizer.encode_items([event["item"] for event in history])}
        for name in names:
            events[name] = [event[name] for event in history]
        events["timestamps"] = [START + second for second in events["timestamps"]]
        events["event_type_ids"] = [kinds.index(kind) for kind in events["event_type_ids"]]
        histories[user] = events, dict(zip(("train", "validation", "test"), ends_of(history, options)))
    assert list(dataset["user_id"]) == list(histories)
    for row in dataset:
        events, ends = histories[row["user_id"]]
        assert {name: row[name] for name in events} == events
        assert {part: row[f"{part}_end"] for part in ends} == ends

    for part, end in (("train", "train"), ("validation", "train"), ("test", "validation")):
        try:
            view = split(dataset, part, columns=names)
        except ValueError as error:
            assert "no user with enough items" in str(error)
            continue
        found = unpack(PackingCollator(columns=names)(view), ["input_ids", *names])
        assert len(found) == len(view) > 0
        for user, row in zip(view["user_id"], found):
            events, ends = histories[user]
            stop = ends[end]
            for name in ("input_ids", *names):
                assert row[name] == events[name][:stop], (part, name)
