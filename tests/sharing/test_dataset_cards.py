"""The card of a prepared data set, and its upload."""

import numpy as np
import polars as pl
import pytest
from card_rules import metadata_errors
from datasets import Dataset
from huggingface_hub import DatasetCard, HfApi

from blossomrec_hf.data import build_sequences
from blossomrec_hf.sharing.dataset_cards import dataset_card, push_dataset


@pytest.fixture
def log() -> pl.DataFrame:
    """Users of 1, 2, 3 … 100 events."""
    users = np.repeat(np.arange(100), np.arange(1, 101))
    items = np.concatenate([np.arange(length) for length in range(1, 101)])
    return pl.DataFrame({"user": users, "item": items, "timestamp": 1_600_000_000 + np.arange(users.size)})


def test_the_card_says_what_is_in_the_folder(log, tmp_path):
    log.write_csv(tmp_path / "log.csv")
    build_sequences(tmp_path / "log.csv", k_core=5, output_dir=tmp_path / "out")
    card = DatasetCard(dataset_card(tmp_path / "out"))
    assert "sequential-recommendation" in card.data.tags
    for text in ("`log.csv`", "k-core 5, 5", "| `input_ids` | `list<", "not known", "| Users | 96 |"):
        assert text in card.text
    assert str(tmp_path) not in card.text


def test_the_card_of_a_data_set_is_valid(tmp_path):
    log = tmp_path / "ring.csv"
    log.write_text("user,item,timestamp\n" + "".join(f"{u},{i},{i}\n" for u in range(5) for i in range(6)))
    build_sequences(log, output_dir=tmp_path / "built")
    card = DatasetCard(dataset_card(tmp_path / "built"))
    assert metadata_errors(str(card), "dataset") == []
    assert card.data.license == "other" and "ring.csv" in card.text


def test_a_push_is_private_and_complete(local_hub, log, tmp_path, monkeypatch):
    """The repository is made; what would reach it then is recorded."""
    calls = {}
    build_sequences(log, output_dir=tmp_path / "out")
    generated = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    monkeypatch.setattr(Dataset, "push_to_hub", lambda self, repo, **kw: calls.update(rows=len(self), repo=repo, **kw))
    monkeypatch.setattr(DatasetCard, "load", classmethod(lambda cls, repo, **kw: DatasetCard(generated)))
    monkeypatch.setattr(DatasetCard, "push_to_hub", lambda self, repo, **kw: calls.update(card=str(self)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kw: calls.update(upload=kw) or "address")
    with pytest.raises(PermissionError, match="Cannot push to ada/log: no valid token was found; .*hf auth login"):
        push_dataset(tmp_path / "out", "ada/log")
    assert not calls
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert push_dataset(tmp_path / "out", "ada/log") == "address"
    assert (calls["rows"], calls["repo"], calls["private"]) == (100, "ada/log", True)
    assert local_hub.repository("ada/log", "dataset").private
    assert "path: data/train-*" in calls["card"] and "## Filters" in calls["card"]
    assert calls["upload"]["repo_type"] == "dataset" and "items.parquet" in calls["upload"]["allow_patterns"]
    push_dataset(tmp_path / "out", "ada/log", private=False)
    assert calls["private"] is False
