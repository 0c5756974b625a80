import importlib

import polars as pl
import pytest
from example_cases import write_log
from small_cases import make_model

from blossomrec_hf import BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.data import build_sequences
from blossomrec_hf.model.files_blossomrec import partial_path


def arguments(trained, data, folder):
    model = ("--model", trained[0], "--data", data, "--output_dir", folder)
    return (*model, "--top_k", 5, "--shard_users", 17, "--max_length", 20, "--max_tokens", 100)


def test_all_users_get_their_items_and_a_cut_run_goes_on(run_command, trained, log_file, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    printed = run_command("recommend", *arguments(trained, log_file, folder))
    assert printed.strip() == f"60 users in 4 shards in {folder}"

    tokenizer = BlossomRecTokenizer.from_pretrained(trained[0])
    dataset, _ = build_sequences(log_file, tokenizer=tokenizer)
    model = BlossomRecForSequentialRecommendation.from_pretrained(trained[0])
    expected = model.recommend(dataset["input_ids"][:], top_k=5, max_length=20)
    written = pl.read_parquet(folder)
    assert written["user_id"].to_list() == dataset["user_id"][:]
    assert written["item_id"].to_list() == tokenizer.decode_items(expected.item_ids)
    for ours, theirs in zip(written["score"].to_list(), expected.scores.tolist()):
        assert ours == pytest.approx(theirs, abs=1e-4)

    # As after a kill: a shard is missing, another was half written. The built data set gives the same; so do two ranks.
    shards = sorted(folder.glob("*.parquet"))
    before = [path.stat().st_mtime_ns for path in shards]
    shards[2].unlink()
    partial_path(shards[2]).write_bytes(b"half")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # joins the processes
    run_command("recommend", *arguments(trained, log_file, folder), num_processes=2)
    again = pl.read_parquet(folder)
    assert again.drop("score").equals(written.drop("score"))
    # Processes that compute with fewer threads add up in another order.
    for ours, theirs in zip(again["score"].to_list(), written["score"].to_list()):
        assert ours == pytest.approx(theirs, abs=1e-5)
    after = [path.stat().st_mtime_ns for path in shards]
    assert [new == old for new, old in zip(after, before)] == [True, True, False, True]
    assert not list(folder.glob(".*"))


def test_a_saved_data_set_is_read_and_shards_of_other_settings_are_refused(run_command, trained, log_file, tmp_path):
    tokenizer = BlossomRecTokenizer.from_pretrained(trained[0])
    build_sequences(log_file, tokenizer=tokenizer, output_dir=tmp_path / "data")
    folder = tmp_path / "out"
    run_command("recommend", *arguments(trained, tmp_path / "data", folder))
    assert pl.read_parquet(folder).height == 60
    other = (*arguments(trained, tmp_path / "data", folder), "--exclude_seen", "False")
    error = run_command("recommend", *other, status=2, field="stderr")
    assert "output_dir" in error


LOG = {"user": ["u", "u", "u", "v", "v"], "item": [1, 2, 3, 2, 3]}


@pytest.mark.parametrize(
    "change",
    [
        {"item": [1, 2, 3, 3, 2]},  # other items in histories of the same lengths
        {"user": ["u", "u", "u", "w", "w"]},
        {"weights": True},
        {"config": {"importance_threshold": 0.1}},
        {"vocabulary": [3, 2, 1, 4]},
        {"top_k": 7},
        {"max_length": 3},
        {"mixed_precision": "bf16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_the_recommendations_depend_on_changes_the_fingerprint(change):
    module = importlib.import_module("blossomrec_hf.commands.recommend")

    def fingerprint(**change):
        tokenizer = BlossomRecTokenizer.from_items(change.pop("vocabulary", [1, 2, 3, 4]))
        columns = {name: change.pop(name, values) for name, values in LOG.items()}
        dataset, _ = build_sequences(pl.DataFrame(columns), tokenizer=tokenizer)
        model = make_model(6, **change.pop("config", {}))
        for weight in model.parameters():
            weight.data.fill_(0.5)
        if change.pop("weights", False):
            model.model.item_embedding.weight.data[5, 0] += 1e-3
        precision = change.pop("mixed_precision", "no")
        return module.fingerprint(model, tokenizer, dataset, module.RecommendArguments(**change), precision)

    assert fingerprint() == fingerprint() == fingerprint(max_tokens=5, output_dir="elsewhere")
    assert fingerprint(**change) != fingerprint()


def test_recommendations_of_yesterday_are_not_kept(run_command, trained, tmp_path):
    """Another log under the same name, with the same users and history lengths, and the same output folder."""
    log, folder = tmp_path / "log.csv", tmp_path / "out"
    write_log(log, num_users=60, num_items=60)
    run_command("recommend", *arguments(trained, log, folder))
    frame = pl.read_csv(log)
    frame.with_columns(item=pl.col("item").reverse()).write_csv(log)
    error = run_command("recommend", *arguments(trained, log, folder), status=2, field="stderr")
    assert "made with another model, log or setting; give another folder, or remove the file" in error


def test_a_time_before_the_latest_event_is_refused_before_any_work(run_command, tmp_path):
    tokenizer = BlossomRecTokenizer.from_items([7, 8, 9])
    make_model(len(tokenizer), time_features=["next_gap"]).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "log.csv").write_text("user,item,timestamp\nu,7,1795680000\nu,8,1795680009\nv,9,1795680001\n")
    call = ("recommend", "--model", tmp_path / "model", "--data", tmp_path / "log.csv", "--top_k", 2)
    for now in ("1795680008", "2026-11-26"):
        error = run_command(*call, "--output_dir", tmp_path / "out", "--now", now, status=2, field="stderr")
        assert (
            f"`now` is {now}, before the latest event of the log, 2026-11-26T08:00:09 UTC (1795680009); give" in error
        )
        assert not (tmp_path / "out").exists()
    assert "2 users in 1 shard in" in run_command(*call, "--output_dir", tmp_path / "out", "--now", "1795680009")
