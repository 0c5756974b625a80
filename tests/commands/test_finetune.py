import json

import numpy as np
import polars as pl
import pytest
import torch
from checkpoint_cases import small_model, small_tokenizer
from example_cases import write_log
from transformers import AutoModelForCausalLM, AutoTokenizer

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.data import build_sequences, item_counts, split
from blossomrec_hf.data.growth import join_logs
from blossomrec_hf.data.metadata import item_metadata, read_item_metadata, write_item_metadata
from blossomrec_hf.evaluation import evaluate


def check_the_adapter(before, after, folder):
    """The grown base model with the saved adapter merged is the saved model."""
    before.resize_token_embeddings(77)
    before.model.item_embedding.weight.data.copy_(after.model.item_embedding.weight)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(before, folder).merge_and_unload()
    assert set(merged.state_dict()) == set(after.state_dict())
    for name, weight in after.state_dict().items():
        if name != "model.log_statistics.item_counts":
            torch.testing.assert_close(merged.state_dict()[name], weight)


@pytest.mark.parametrize("train_only", ["all", "embeddings", "lora"])
def test_new_items_are_learned_and_old_ones_kept(run_command, log_file, trained, tmp_path, train_only):
    if train_only == "lora":
        pytest.importorskip("peft")
    new_log = write_log(tmp_path / "new.csv", num_users=60, num_items=75)
    printed = run_command("finetune", "--model", trained[0], "--data", new_log, "--max_length", 20, "--output_dir", tmp_path / "run",
        "--max_steps", 20, "--train_only", train_only, "--use_cpu", "true", "--per_device_train_batch_size", 8,
        *(("--replay", "none") if train_only == "embeddings" else ()),
    )  # fmt: skip
    assert ("Continues " in printed) == (train_only != "embeddings")
    assert "15 new items; the catalog now has 75." in printed

    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (trained[0], tmp_path / "run"))
    old_tokenizer, tokenizer = (AutoTokenizer.from_pretrained(path) for path in (trained[0], tmp_path / "run"))
    assert old_tokenizer.get_vocab().items() <= tokenizer.get_vocab().items()
    assert after.config.vocab_size == len(tokenizer) == 77
    frozen = torch.equal(before.model.layers[0].up_proj.weight, after.model.layers[0].up_proj.weight)
    assert frozen == (train_only == "embeddings")
    old_rows_stay = torch.equal(before.model.item_embedding.weight, after.model.item_embedding.weight[:62])
    assert old_rows_stay == (train_only == "lora")

    old_log = None if train_only == "embeddings" else build_sequences(log_file, tokenizer=tokenizer)[0]
    dataset = join_logs(old_log, build_sequences(new_log, tokenizer=tokenizer)[0])
    expected = evaluate(after, split(dataset, "test"), max_length=20, progress=False)
    figures = json.loads((tmp_path / "run" / "test_results.json").read_text())
    assert {name: figures[f"test_{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
    if train_only == "lora":
        check_the_adapter(before, after, tmp_path / "run" / "adapter")


def test_new_items_that_the_preparation_dropped_are_reported(run_command, log_file, trained, tmp_path):
    new_log = write_log(tmp_path / "new.csv", num_users=20, num_items=75)
    run_command("prepare", new_log, "--tokenizer", trained[0], "--output_dir", tmp_path / "data")
    told = run_command("finetune", "--model", trained[0], "--data", tmp_path / "data", "--max_length", 20, "--output_dir",
        tmp_path / "run", "--max_steps", 1, "--use_cpu", "true", field="stderr",
    )  # fmt: skip
    unknown = pl.read_csv(new_log).filter(pl.col("item") >= 60).height
    assert unknown and f"{unknown} events of {tmp_path / 'data'} are on items that the tokenizer" in told
    assert "prepare the log without `--tokenizer`" in told
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == 62


def test_titles_of_old_and_new_items_stand_beside_the_model(run_command, tmp_path):
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
        "finetune", "--model", tmp_path / "old", "--data", tmp_path / "new.csv", "--titles", tmp_path / "titles.csv",
        "--output_dir", tmp_path / "run", "--max_steps", 1, "--use_cpu", "true", "--eval_users", 1,
    )  # fmt: skip
    for wrong, named in (
        (("--report_to", "no_tracker"), "`report_to` is 'no_tracker'"),
        (("--eval_users", -1), "`eval_users` must be 0 or more, got -1."),
    ):
        assert named in run_command(*arguments, *wrong, status=2, field="stderr")
    log = run_command(*arguments, field="stderr")
    # Where there is no terminal: a line for the validation, one for the test, and no bars.
    assert [line.split(":")[0] for line in log.splitlines() if line.startswith("Epoch")] == ["Epoch 1, step 1"] * 2
    assert "it/s" not in log and "\r" not in log
    assert read_item_metadata(tmp_path / "run").rows() == [
        (101, "an old one", 3),
        (139, "the right one", 41),
        (7, "a new one", AutoTokenizer.from_pretrained(tmp_path / "run").encode_items([7])[0]),
    ]


def save_checkpoint(folder, tokenizer):
    model = small_model(len(tokenizer) - 2)
    model.item_counts.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_events(path, events):
    """(user, item, time) each"""
    path.write_text("user,item,timestamp\n" + "".join(f"{user},{item},{time}\n" for user, item, time in events))
    return path


def test_a_week_of_digits_continues_a_text_log_and_counts_once(run_command, tmp_path):
    """
    The catalog has text, the week's ids are digits, and of 53 users many have fewer than three events in the week. The
    earlier log is a folder that was prepared before the vocabulary grew.
    """
    rng = np.random.default_rng()
    names = [f"B-{index}" for index in range(20)] + [str(index) for index in range(100, 120)]
    old = [(user, name, time) for user in range(53) for time, name in enumerate(rng.choice(names, 6))]
    week = [
        (user, item, 10 + time) for user in range(53) for time, item in enumerate(rng.integers(100, 125, 1 + user % 5))
    ]
    write_events(tmp_path / "old.csv", old)
    prepared, tokenizer = build_sequences(tmp_path / "old.csv", output_dir=tmp_path / "prepared")
    save_checkpoint(tmp_path / "model", tokenizer)
    write_events(tmp_path / "week.csv", week)
    common = ("--use_cpu", "true", "--max_steps", 2, "--max_length", 20)

    def finetune(model, log, output, replay):
        folder = tmp_path / output
        printed = run_command("finetune", "--model", tmp_path / model, "--data", tmp_path / log, "--replay", replay, "--output_dir",
            folder, *common,
        )  # fmt: skip
        grown = BlossomRecTokenizer.from_pretrained(folder)
        assert grown.item_type == "str" and grown.get_vocab().items() >= tokenizer.get_vocab().items()
        counts = AutoModelForCausalLM.from_pretrained(folder).item_counts
        return grown, {token: int(counts[index]) for token, index in grown.get_vocab().items()}, printed

    grown, after_week, printed = finetune("model", "week.csv", "week", tmp_path / "prepared")
    assert f"Continues {tmp_path / 'prepared'}." in printed
    new = {str(item) for _, item, _ in week} - set(names)
    assert set(grown.get_vocab()) == set(tokenizer.get_vocab()) | new

    # The model was there before it counted anything: its counts are what the week adds.
    past = build_sequences(tmp_path / "old.csv", tokenizer=grown)[0]
    joined = join_logs(past, build_sequences(tmp_path / "week.csv", tokenizer=grown)[0])
    added = item_counts(joined, len(grown)) - item_counts(past, len(grown))
    assert after_week == {token: max(added[index], 0) for token, index in grown.get_vocab().items()}

    # The log with the week in it, on the model that has learned both: nothing is new, and nothing counts again. The
    # model, which now lies elsewhere, still knows the logs of both runs. What it never counted, it does now.
    write_events(tmp_path / "whole.csv", old + week)
    (tmp_path / "model").rename(tmp_path / "before")
    (tmp_path / "week").rename(tmp_path / "model")
    _, after_whole, printed = finetune("model", "whole.csv", "whole", "auto")
    assert f"Continues {tmp_path / 'prepared'}, {tmp_path / 'week.csv'}." in printed
    assert "The earlier log contains every event of the new one" in printed
    alone = join_logs(None, build_sequences(tmp_path / "whole.csv", tokenizer=grown)[0])
    whole = item_counts(alone, len(grown))
    assert after_whole == {token: max(after_week[token], whole[index]) for token, index in grown.get_vocab().items()}


def test_a_log_that_grew_under_its_name_is_counted_and_a_model_is_not_overwritten(run_command, tmp_path):
    """The log that the first run learned has one more user and item when the second run reads it."""
    save_checkpoint(tmp_path / "model", BlossomRecTokenizer.from_items([100, 101, 102]))
    log, common = tmp_path / "log.csv", ("--max_steps", 1, "--use_cpu", "true", "--max_length", 20)
    events = [("u", 100, 1), ("u", 101, 2)]
    for model, output, more in (("model", "first", []), ("first", "second", [("v", 101, 1), ("v", 103, 2)])):
        write_events(log, events + more)
        printed = run_command(
            "finetune", "--model", tmp_path / model, "--data", log, "--output_dir", tmp_path / output, *common
        )
    assert f"Continues {log}." in printed
    model, tokenizer = (kind.from_pretrained(tmp_path / "second") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.item_counts[tokenizer.encode_items([100, 101, 102, 103])].tolist() == [1, 2, 0, 1]

    said = run_command("finetune", "--model", tmp_path / "first", "--data", log, "--output_dir", f"{tmp_path}/first/", *common,
        status=2, field="stderr",
    )  # fmt: skip
    assert said.splitlines()[-1].startswith("`output_dir` ") and "the folder of `model`" in said


def test_text_for_a_catalog_of_integers_is_refused_in_one_sentence(run_command, tmp_path):
    save_checkpoint(tmp_path / "model", BlossomRecTokenizer.from_items([100, 101, 102]))
    write_events(tmp_path / "week.csv", [("u", item, time) for time, item in enumerate(["100", "X-1", "102", "100"])])
    said = run_command("finetune", "--model", tmp_path / "model", "--data", tmp_path / "week.csv", "--output_dir",
        tmp_path / "run", status=2, field="stderr",
    )  # fmt: skip
    assert said.splitlines()[-1].startswith(
        "`items` has the text id 'X-1', but the ids of this vocabulary are integers"
    )
    assert not (tmp_path / "run").exists()


def test_a_log_too_small_to_hold_anything_out_is_learned(run_command, tmp_path):
    save_checkpoint(tmp_path / "model", BlossomRecTokenizer.from_items([100, 101, 102]))
    write_events(tmp_path / "week.csv", [("u", 100, 1), ("u", 101, 2), ("v", 102, 1), ("v", 103, 2)])
    said = run_command("finetune", "--model", tmp_path / "model", "--data", tmp_path / "week.csv", "--output_dir",
        tmp_path / "run", "--min_steps", 20, "--num_train_epochs", 2, "--use_cpu", "true", field="stderr",
    )  # fmt: skip
    assert "there is no validation" in said
    assert "small and is learned for 20 steps, more than 2 epochs (`num_train_epochs`)" in said
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "run"))
    assert after.config.vocab_size == 6 and not torch.equal(before.lm_head.weight, after.lm_head.weight[:5])
    assert not (tmp_path / "run" / "test_results.json").exists() and (tmp_path / "run" / "README.md").exists()


@pytest.mark.slow
def test_processes_that_do_not_work_together_are_refused(run_command, tmp_path):
    error = run_command("finetune", "--output_dir", tmp_path / "run", num_processes=2, status=2, field="stderr")
    assert "WORLD_SIZE is 2, but 1 process works alone" in error and not (tmp_path / "run").exists()
