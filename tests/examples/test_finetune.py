import json

import polars as pl
import pytest
import torch
from checkpoint_cases import small_model, small_tokenizer
from example_cases import write_log
from transformers import AutoModelForCausalLM, AutoTokenizer

from blossomrec_hf.data import build_sequences, split
from blossomrec_hf.data.metadata import item_metadata, read_item_metadata, write_item_metadata
from blossomrec_hf.training import evaluate


def check_the_adapter(before, after, folder):
    """The grown base model with the saved adapter merged is the saved model."""
    before.resize_token_embeddings(77)
    before.model.item_embedding.weight.data.copy_(after.model.item_embedding.weight)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(before, folder).merge_and_unload()
    assert set(merged.state_dict()) == set(after.state_dict())
    for name, weight in after.state_dict().items():
        if name != "model.item_counts":
            torch.testing.assert_close(merged.state_dict()[name], weight)


@pytest.mark.parametrize("train_only", ["all", "embeddings", "lora"])
def test_new_items_are_learned_and_old_ones_kept(run_example, trained, tmp_path, train_only):
    if train_only == "lora":
        pytest.importorskip("peft")
    new_log = write_log(tmp_path / "new.csv", num_users=60, num_items=75)
    printed = run_example(
        "finetune.py", "--model", trained[0], "--data", new_log, "--max_length", 20, "--output_dir", tmp_path / "run",
        "--num_train_epochs", 3, "--train_only", train_only, "--use_cpu", "true", "--per_device_train_batch_size", 8,
        *(("--replay", "none") if train_only == "embeddings" else ()),
    )  # fmt: skip
    assert ("Old users are learned from as well" in printed) == (train_only != "embeddings")
    assert "15 new items; the catalogue now holds 75." in printed

    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (trained[0], tmp_path / "run"))
    old_tokenizer, tokenizer = (AutoTokenizer.from_pretrained(path) for path in (trained[0], tmp_path / "run"))
    assert old_tokenizer.get_vocab().items() <= tokenizer.get_vocab().items()
    assert after.config.vocab_size == len(tokenizer) == 77
    frozen = torch.equal(before.model.layers[0].up_proj.weight, after.model.layers[0].up_proj.weight)
    assert frozen == (train_only == "embeddings")
    old_rows_stay = torch.equal(before.model.item_embedding.weight, after.model.item_embedding.weight[:62])
    assert old_rows_stay == (train_only == "lora")
    mean = before.model.item_embedding.weight[2:].mean(0)
    assert (after.model.item_embedding.weight[62:] - mean).abs().max() > 1e-3

    dataset, _ = build_sequences(new_log, tokenizer=tokenizer)
    expected = evaluate(after, split(dataset, "test"), max_length=20, progress=False)
    figures = json.loads((tmp_path / "run" / "test_results.json").read_text())
    assert {name: figures[f"test_{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
    if train_only == "lora":
        check_the_adapter(before, after, tmp_path / "run" / "adapter")


def test_titles_of_old_and_new_items_stand_beside_the_model(run_example, tmp_path):
    """Of 40 old items, 100 to 139, and two new ones; what `--titles` tells of an old one takes the place of the old title."""
    tokenizer = small_tokenizer()
    small_model().save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old")
    titles = pl.DataFrame({"item": [101, 139], "title": ["an old one", "a wrong one"]})
    write_item_metadata(tmp_path / "old", item_metadata(titles, tokenizer))
    (tmp_path / "new.csv").write_text(
        "user,item\n" + "".join(f"u,{item}\nv,{item}\n" for item in (100, 101, 7, 139, 8))
    )
    (tmp_path / "titles.csv").write_text("item,title\n7,a new one\n139,the right one\n9,not in the log\n")
    arguments = (
        "finetune.py", "--model", tmp_path / "old", "--data", tmp_path / "new.csv", "--titles", tmp_path / "titles.csv",
        "--output_dir", tmp_path / "run", "--max_steps", 1, "--use_cpu", "true", "--eval_users", 1,
    )  # fmt: skip
    assert "`report_to` is 'no_tracker'" in run_example(
        *arguments, "--report_to", "no_tracker", status=2, field="stderr"
    )
    log = run_example(*arguments, field="stderr")
    # Where there is no terminal: a line for the validation, one for the test, and no bars.
    assert [line.split(":")[0] for line in log.splitlines() if line.startswith("Epoch")] == ["Epoch 1, step 1"] * 2
    assert "it/s" not in log and "\r" not in log
    assert read_item_metadata(tmp_path / "run").rows() == [
        (101, "an old one", 3),
        (139, "the right one", 41),
        (7, "a new one", AutoTokenizer.from_pretrained(tmp_path / "run").encode_items([7])[0]),
    ]
