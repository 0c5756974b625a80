"""gSASRec's published layout, written as its script does, and read back."""

import random
from pathlib import Path

import pytest

from blossomrec_hf.batches import HistoryStore
from blossomrec_hf.commands import prepare
from blossomrec_hf.data import build_sequences, split
from blossomrec_hf.data.storage import load_folder


@pytest.fixture
def histories() -> list[list[str]]:
    return [[str(random.randint(1, 40)) for _ in range(random.randint(4, 12))] for _ in range(20)]


def write_split(folder: Path, histories: list[list[str]], validated: set[int]) -> Path:
    """The last item is the test; the one before it the validation of some users, whose training ends one item earlier."""
    files = {name: [] for name in ("train/input", "val/input", "val/output", "test/input", "test/output")}
    for user, items in enumerate(histories):
        files["train/input"].append(items[:-3] if user in validated else items[:-2])
        if user in validated:
            files["val/input"].append(items[:-2])
            files["val/output"].append(items[-2:-1])
        files["test/input"].append(items[:-1])
        files["test/output"].append(items[-1:])
    for name, lines in files.items():
        path = folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(" ".join(items) + "\n" for items in lines))
    return folder


def views(dataset, tokenizer) -> dict[str, list]:
    """What is read and predicted, by raw items; of training, each target with the items before it."""
    views = {}
    for part in ("validation", "test"):
        rows = split(dataset, part)
        views[part] = [tuple(map(tokenizer.decode_items, (row["input_ids"], row["target_ids"]))) for row in rows]
    store, pairs = HistoryStore.from_rows(split(dataset, "train")), []
    for row in range(len(store)):
        batch = store.pack([row], labels=True)
        items = tokenizer.decode_items(batch["input_ids"][0].tolist())
        pairs += [(items[:n], items[n]) for n, label in enumerate(batch["labels"][0].tolist()) if label >= 0]
    return views | {"train": pairs}


def test_each_part_has_the_published_events(tmp_path, histories):
    validated = set(random.sample(range(20), 6))
    folder = write_split(tmp_path / "ml1m", histories, validated)
    raw = [[int(item) for item in items] for items in histories]
    wanted = {
        "validation": [(items[:-2], items[-2:-1]) for user, items in enumerate(raw) if user in validated],
        "test": [(items[:-1], items[-1:]) for items in raw],
        "train": [
            (items[:n], items[n])
            for user, items in enumerate(raw)
            for n in range(1, len(items) - (3 if user in validated else 2))
        ],
    }
    built = build_sequences(folder)
    assert views(*built) == wanted
    assert built[0]["user_id"] == list(range(1, 21))
    prepare.main([str(folder), "--output_dir", str(tmp_path / "out"), "--split", "given"])
    assert views(load_folder(tmp_path / "out"), built[1]) == wanted


def test_files_that_do_not_belong_together_are_refused(tmp_path, histories):
    folder = write_split(tmp_path / "log", histories, {3, 7})
    files = {name: (folder / name).read_text() for name in ("train/input.txt", "val/output.txt", "test/output.txt")}
    for name, text, problem in (
        (
            "train/input.txt",
            files["train/input.txt"] + "1 2\n",
            "train/input.txt, test/input.txt, test/output.txt have 21, 20, 20 lines",
        ),
        ("train/input.txt", "999 " + files["train/input.txt"], "line 1 of train/input.txt is not the line of test"),
        ("test/output.txt", "1 " + files["test/output.txt"], "line 1 of train/input.txt is not"),
        (
            "val/output.txt",
            files["val/output.txt"] + "1\n",
            "the lines of val are not those of the users whose last 2",
        ),
    ):
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=f"gSASRec's split, but {problem}"):
            build_sequences(folder)
        (folder / name).write_text(files[name])
    with pytest.raises(ValueError, match="user='uid' names a column, but"):
        build_sequences(folder, user="uid")
