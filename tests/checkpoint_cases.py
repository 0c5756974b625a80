"""Small models with their tokenizers for the tests of checkpoints and of the Hub."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from small_cases import make_model

from blossomrec_hf import BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.model.manifest_blossomrec import update_manifest
from blossomrec_hf.sharing import push


def small_model(num_items: int = 40, **changes) -> BlossomRecForSequentialRecommendation:
    """A model of two narrow layers with weights and counts drawn wide."""
    model = make_model(num_items + 2, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.item_counts.random_(100)
    return model


def small_tokenizer(num_items: int = 40) -> BlossomRecTokenizer:
    """Raw ids 100, 101, …"""
    return BlossomRecTokenizer.from_items(list(range(100, 100 + num_items)))


def save_and_push(
    repo_id: str, model: BlossomRecForSequentialRecommendation, tokenizer: BlossomRecTokenizer, **options
) -> CommitInfo:
    """Save both to a new folder and upload it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return push(folder, repo_id, **options)


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether all weights and buffers are the same, to the last bit."""
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_config(folder: Path, **changes) -> None:
    """Writes another configuration, as if it had been saved so."""
    change_json(folder / "config.json", **changes)
    update_manifest(folder, ["config.json"])


def change_byte(path: Path, place: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def error_message(call: Callable, kind: type[BaseException]) -> str:
    """The message of the error that `call` raises."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")
