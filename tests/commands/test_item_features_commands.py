"""Item features through the commands: prepare, train, export, finetune, similar, recommend."""

import polars as pl
import pytest
import torch
from example_cases import SMALL_MODEL
from safetensors.torch import load_file
from small_cases import small_log
from transformers import AutoModelForCausalLM, AutoTokenizer

from blossomrec_hf.data.metadata import read_item_metadata


def write_items(path, num_items: int):
    """Items with one of six genres, two countries and a vector."""
    rows = range(num_items)
    frame = {
        "item_id": rows,
        "title": [f"Title {i}" for i in rows],
        "genre": [f"genre {i % 6}|{'ab'[i % 2]}" for i in rows],
    }
    frame["place"] = [f"{i % 7 - 3}.5 {i % 5}" for i in rows]
    pl.DataFrame(frame).write_csv(path)
    return path


@pytest.fixture(scope="module")
def prepared(run_command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    small_log().write_csv(folder / "log.csv")
    columns = ("--item_categories", "genre", "--item_vectors", "place")
    run_command(
        "prepare",
        folder / "log.csv",
        "--output_dir",
        folder / "data",
        "--items",
        write_items(folder / "items.csv", 60),
        *columns,
    )
    small_log(num_items=70).write_csv(folder / "new.csv")
    run_command(
        "prepare",
        folder / "new.csv",
        "--output_dir",
        folder / "new",
        "--items",
        write_items(folder / "more.csv", 70),
        *columns,
    )
    return folder


def test_features_from_the_log_to_new_items(run_command, prepared, tmp_path):
    run, settings = tmp_path / "run", ("--num_train_epochs", 2, "--item_features", "all")
    scores = ("--config_overrides", '{"scoring": "cosine", "item_dropout_prob": 0.1}')
    run_command("train", *SMALL_MODEL, "--data", prepared / "data", "--output_dir", run, *settings, *scores, "--refit")
    model = AutoModelForCausalLM.from_pretrained(run)
    assert {name: feature["kind"] for name, feature in model.config.item_features.items()} == {
        "genre": "categories", "place": "vectors",
    }  # fmt: skip
    assert len(model.config.item_features["genre"]["names"]) == 8 and model.config.scoring == "cosine"
    assert "it reads the features of items (genre, place)" in (run / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(run / "refit").config.item_features == model.config.item_features
    # The same from one exported file, which needs no polars, to the last bit.
    run_command("export", "--data", prepared / "data", "--output", tmp_path / "data.safetensors")
    run_command(
        "train",
        *SMALL_MODEL,
        "--data",
        tmp_path / "data.safetensors",
        "--output_dir",
        tmp_path / "again",
        *settings,
        *scores,
    )
    weights, others = (load_file(path / "model.safetensors") for path in (run, tmp_path / "again"))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    assert "lm_head.weight" not in weights and weights["model.item_features.columns.1.table"].dtype == torch.float16

    tuned = tmp_path / "tuned"
    printed = run_command("finetune", "--model", run, "--data", prepared / "new", "--output_dir", tuned, "--max_steps", 4,
        "--max_length", 20, "--use_cpu", "true", "--per_device_train_batch_size", 8,
    )  # fmt: skip
    assert "10 new items; the catalog now has 70." in printed
    grown, tokenizer = AutoModelForCausalLM.from_pretrained(tuned), AutoTokenizer.from_pretrained(tuned)
    names, columns = grown.config.item_features["genre"]["names"], grown.model.item_features.columns
    for item in (3, 61, 69):
        row = tokenizer.encode_items([item])[0]
        codes = columns[0].codes[columns[0].offsets[row] : columns[0].offsets[row + 1]]
        assert {names[code - 1] for code in codes} == {f"genre {item % 6}", "ab"[item % 2]}
        place = torch.tensor([item % 7 - 2.5, item % 5])
        torch.testing.assert_close(columns[1].table[row].float(), place / place.norm(), rtol=0, atol=1e-3)
    assert set(read_item_metadata(tuned)["item"]) == set(range(70))
    # A file of new items as it comes, with categories and vectors as text, is merged with the stored table.
    (tmp_path / "items.csv").write_text("item_id,title,genre,place\n61,X,genre 2|a,1 3\n")
    run_command("finetune", "--model", run, "--data", prepared / "new.csv", "--output_dir", tmp_path / "file", "--max_steps", 1,
        "--max_length", 20, "--use_cpu", "true", "--titles", tmp_path / "items.csv",
    )  # fmt: skip
    row = read_item_metadata(tmp_path / "file").row(by_predicate=pl.col("item") == 61, named=True)
    assert row["genre"] == ["genre 2", "a"] and row["place"] == [1.0, 3.0]
    given, tokens = (kind.from_pretrained(tmp_path / "file") for kind in (AutoModelForCausalLM, AutoTokenizer))
    place = given.model.item_features.columns[1].table[tokens.encode_items([61])[0]].float()
    torch.testing.assert_close(place, torch.tensor([1.0, 3.0]) / 10**0.5, rtol=0, atol=1e-3)
    similar = run_command("similar", 61, "--model", tuned, "--top_k", 3)
    assert len(similar.split()) > 3
    run_command("export", "--model", tuned, "--output", tmp_path / "model.pt2")
    history = torch.tensor([tokenizer.encode_items([1, 2, 3, 60])])
    scorer = torch.export.load(tmp_path / "model.pt2").module()
    expected = grown.recommend(history, top_k=70, exclude_seen=False)
    exported = scorer(history, torch.ones_like(history))
    torch.testing.assert_close(exported.gather(1, expected.item_ids), expected.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--item_features", "genre,size"), "The item table has no column 'size'"),
        (("--item_features", "title", "--config_overrides", '{"tie_word_embeddings": false}'), "must be True"),
    ],
)
def test_bad_features_are_refused_in_a_sentence(run_command, prepared, tmp_path, arguments, message):
    error = run_command("train", *SMALL_MODEL, "--data", prepared / "data", "--output_dir", tmp_path / "run", *arguments,
        status=2, field="stderr",
    )  # fmt: skip
    assert message in " ".join(error.split()) and "Traceback" not in error
    error = run_command("train", *SMALL_MODEL, "--data", prepared / "log.csv", "--output_dir", tmp_path / "run",
        "--item_features", "all", status=2, field="stderr",
    )  # fmt: skip
    assert "the data has no item table" in " ".join(error.split())
