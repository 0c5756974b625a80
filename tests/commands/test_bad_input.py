"""Bad input ends a command with one sentence on stderr and exit code 2, and leaves nothing half-written."""

import importlib
import sys

import pytest
import torch
from authors_cases import AuthorsModel
from checkpoint_cases import change_byte, change_config, small_model, small_tokenizer
from example_cases import REPOSITORY, write_log


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a command of `blossomrec` in this process; gives its exit code and what it wrote to stderr."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"blossomrec {name}", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            importlib.import_module(f"blossomrec_hf.commands.{name}").main()
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    small_model().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def theirs(tmp_path):
    torch.save({"state_dict": AuthorsModel(30, 16, 4).state_dict()}, tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


def is_one_sentence(result, *words):
    code, error = result
    lines = [line for line in error.splitlines() if line and "Loading weights" not in line]
    assert code == 2 and len(lines) == 1, error
    assert all(word in lines[0] for word in words), lines[0]


DAMAGES = {
    "weights": (lambda folder: change_byte(folder / "model.safetensors"), "model.safetensors of"),
    "header of the weights": (lambda folder: change_byte(folder / "model.safetensors", 2), "model.safetensors of"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), "config"),
    "value of the config": (lambda folder: change_config(folder, hidden_act="gelo"), "`hidden_act` is 'gelo'"),
    "sizes": (lambda folder: change_config(folder, vocab_size=10**8), "`vocab_size` 100000000"),
    "index": (lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.index.json"), "index"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "manifest": (lambda folder: (folder / "checkpoint_manifest.json").write_text("["), "checkpoint_manifest.json"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_model(run_here, checkpoint, tmp_path, damage):
    change, word = DAMAGES[damage]
    change(checkpoint)
    is_one_sentence(run_here("export", "--model", checkpoint, "--output", tmp_path / "out" / "model.pt2"), word)
    is_one_sentence(run_here("convert", "--model", checkpoint, "--output_file", tmp_path / "back.pth"), word)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"{}", b"[1]"])
def test_a_damaged_tokenizer(run_here, checkpoint, tmp_path, content):
    (checkpoint / "tokenizer.json").write_bytes(content)
    result = run_here("recommend", "--model", checkpoint, "--data", "nowhere", "--output_dir", tmp_path / "out")
    is_one_sentence(result, "tokenizer.json of")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a checkpoint"])
def test_a_damaged_checkpoint_of_the_authors(run_here, tmp_path, content):
    (tmp_path / "theirs.pth").write_bytes(content)
    result = run_here("convert", "--checkpoint", tmp_path / "theirs.pth", "--output_dir", tmp_path / "out")
    is_one_sentence(result, "theirs.pth", "torch.save")
    is_one_sentence(run_here("convert", "--checkpoint", tmp_path / "nowhere.pth"), "nowhere.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pth"]


def test_an_output_that_cannot_be_made(run_here, theirs, checkpoint, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        is_one_sentence(
            run_here("convert", "--checkpoint", theirs, "--num_attention_heads", 4, "--output_dir", place),
            "is a file; give another path",
        )
    is_one_sentence(run_here("convert", "--model", checkpoint, "--output_file", tmp_path), "")
    is_one_sentence(
        run_here("export", "--model", checkpoint, "--output", tmp_path / "file" / "model.pt2"), "is a file"
    )
    assert (tmp_path / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "checkpoint", "theirs.pth"}


def ends_with_a_full_disk(error):
    lines = [line for line in error.splitlines() if line and "Writing model shards" not in line]
    assert "File too large" in lines[-1] and "Traceback" not in error, error


def test_a_full_disk_while_a_program_is_exported(run_command, checkpoint, tmp_path):
    """A limit on the size of files stands in for the full disk: the system refuses the write either way."""
    arguments = ("--model", checkpoint, "--output", tmp_path / "out" / "model.pt2")
    ends_with_a_full_disk(run_command("export", *arguments, max_file_bytes=8192, status=2, field="stderr"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_a_full_disk(run_command, theirs, tmp_path):
    """What was there before stays."""
    small_model(num_items=5).save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    arguments = ("--checkpoint", theirs, "--num_attention_heads", 4, "--output_dir", tmp_path / "out")
    ends_with_a_full_disk(run_command("convert", *arguments, max_file_bytes=16384, status=2, field="stderr"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "theirs.pth"}


@pytest.mark.parametrize("content", ["[", "[1]", "{}", '[{"seed": 1}]'])
def test_a_card_of_a_damaged_file(run_here, tmp_path, content):
    (tmp_path / "damaged.json").write_text(content)
    results = REPOSITORY / "model_cards" / "blossomrec-ml-1m.json"
    for options in (
        ("--results", tmp_path / "damaged.json"),
        ("--results", results, "--published", tmp_path / "damaged.json"),
    ):
        result = run_here("card", *options, "--output", tmp_path / "card.md")
        is_one_sentence(result)
    (tmp_path / "damaged.json").rename(tmp_path / "training_summary.json")
    is_one_sentence(run_here("card", "--folder", tmp_path))
    is_one_sentence(run_here("card", "--results", results, "--output", tmp_path), "is a folder")
    is_one_sentence(run_here("card", "--results", results, "--output", tmp_path / "no" / "card.md"), "no")
    assert [path.name for path in tmp_path.iterdir()] == ["training_summary.json"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"text"])
def test_damaged_ranks(run_here, tmp_path, content):
    (tmp_path / "ranks.npz").write_bytes(content)
    result = run_here("compare", "--reports", tmp_path, "--first", "a", "--second", "b")
    is_one_sentence(result, "ranks.npz is damaged")


@pytest.mark.parametrize("name", ["run.yaml", "items.parquet", "vectors.parquet", "vectors.safetensors"])
def test_damaged_files_beside_a_model(run_here, checkpoint, tmp_path, name):
    (checkpoint / name).write_bytes(b"[1")
    arguments = ["--model", checkpoint, "--data", write_log(tmp_path / "log.csv"), "--output_dir", tmp_path / "out"]
    if name.startswith("vectors"):
        arguments += ["--item_vectors", checkpoint / name]
    code, error = run_here("finetune", *arguments)
    assert code == 2 and name in error.splitlines()[-1], error
    assert not (tmp_path / "out").exists()


def test_outputs_are_checked_before_the_work(run_here, checkpoint, tmp_path):
    (tmp_path / "file").write_text("mine")
    for script, options in (
        ("evaluate", ["--models", checkpoint]),
        ("finetune", ["--model", checkpoint]),
        ("train", []),
    ):
        for place in (tmp_path / "file", tmp_path / "file" / "below"):
            result = run_here(script, *options, "--data", "nowhere", "--output_dir", place)
            is_one_sentence(result, "is a file; give another path")
    out = ["--data", "nowhere", "--output_dir", tmp_path / "out", "--results_json"]
    is_one_sentence(run_here("train", *out, tmp_path / "file"), "file is damaged: it is no JSON file")
    is_one_sentence(run_here("train", *out, tmp_path), str(tmp_path))
    is_one_sentence(
        run_here("convert", "--model", checkpoint, "--output_file", tmp_path / "no" / "x.pth"), str(tmp_path / "no")
    )
    assert {path.name for path in tmp_path.iterdir()} == {"file", "checkpoint"}


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *((("evaluate", "--models", "none"), name, 0) for name in ("ks", "max_length", "max_tokens", "samples")),
        (("evaluate", "--models", "none"), "num_negatives", -1),
        *((("compare", "--reports", "none", "--first", "a", "--second", "b"), name, 0) for name in ("k", "samples")),
        (("train",), "eval_ks", 0),
        (("train",), "eval_negatives", -1),
    ],
)
def test_numbers_are_checked_before_the_work(run_here, tmp_path, monkeypatch, command, option, value):
    monkeypatch.chdir(tmp_path)
    least = value + 1
    is_one_sentence(run_here(*command, f"--{option}", value), f"`{option}` is {value}; it must be at least {least}.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("time", "--validation_from", "2024-02-01", "--test_from", "2024-01-31"),
            "--test_from is 2024-01-31, before",
        ),
        (("time", "--validation_from", ".9", "--test_from", ".8"), "--test_from is .8, before --validation_from .9"),
        (("time", "--validation_from", "soon", "--test_from", ".8"), "--validation_from is 'soon'; it may be"),
        (("folds", "--test_from", "2024-13-01"), "--test_from is '2024-13-01'; it may be"),
        (("folds", "--test_from", ".8", "--fold_width", "week"), "--fold_width is 'week'; it may be"),
    ],
)
def test_times_of_a_split_are_checked_before_the_log_is_read(run_here, tmp_path, options, said):
    arguments = ("--output_dir", tmp_path / "out", "--split", *options)
    is_one_sentence(run_here("prepare", tmp_path / "no log", *arguments), said)


def test_similar_items_of_bad_ids(run_here, checkpoint, tmp_path):
    """The items of the checkpoint are 100 … 139."""
    lines, empty, binary = tmp_path / "lines.txt", tmp_path / "empty.txt", tmp_path / "binary.txt"
    lines.write_text("101\n7\n102\n8\n")
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe\xfd")
    for arguments, *words in (
        ((101, 7, 8), "The command line has 2 of 3 items that are not in the model's vocabulary ('7', '8')"),
        (("--items", lines), "lines.txt has 2 of 4 items", "remove them"),
        (("abc",), "'abc'", "all raw ids of this tokenizer are int"),
        (("--items", empty), "empty.txt is empty"),
        (("--items", binary), "binary.txt is not UTF-8"),
        (("--items", tmp_path / "nowhere.txt"), "nowhere.txt"),
        ((101, "--items", lines), "`items`"),
        ((), "`items`"),
        ((101, "--top_k", 0), "`top_k` is 0; it must lie in 1 … 40"),
        ((101, "--candidates", empty), "empty.txt is empty"),
    ):
        is_one_sentence(run_here("similar", *arguments, "--model", checkpoint), *words)
    is_one_sentence(run_here("similar", 101, "--model", "nowhere"), "--model is nowhere")


def test_an_unknown_objective(run_here, tmp_path):
    log = write_log(tmp_path / "log.csv")
    overrides = ("--config_overrides", '{"objective": "hinge"}')
    result = run_here("train", "--data", log, *overrides, "--output_dir", tmp_path / "out")
    is_one_sentence(result, "`objective` is 'hinge'", "'bce', 'bpr', 'cross_entropy', 'gbce', 'sampled_softmax'")
    assert not (tmp_path / "out").exists()
