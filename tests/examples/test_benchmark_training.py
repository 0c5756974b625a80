import json


def test_the_ways_to_make_the_full_softmax_agree(run_example, tmp_path):
    settings = ("--items", 3000, "--positions", 200, "--width", 16, "--seconds", 0, "--device", "cpu")
    run_example(
        "benchmarks/training.py", *settings, "--implementations", "plain", "torch", "--json", tmp_path / "f.json"
    )
    report = json.loads((tmp_path / "f.json").read_text())
    assert report["items"] == 3000
    for figure in report["figures"]:
        assert figure["seconds"] > 0 and figure["peak_MiB"] >= 0
        assert figure["loss_difference"] < 1e-5 and figure["relative_gradient_difference"] < 1e-5


def test_packed_and_padded_steps_hold_the_same_histories(run_example, log_file, tmp_path):
    settings = (
        "--data",
        log_file,
        "--max_length",
        50,
        "--tokens",
        300,
        "--steps",
        2,
        "--seconds",
        0,
        "--device",
        "cpu",
    )
    run_example("benchmarks/training.py", "--what", "padding", *settings, "--json", tmp_path / "f.json")
    packed, padded = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert packed["share_of_epoch"] == padded["share_of_epoch"] > 0
    assert padded["positions"] % 50 == 0 and padded["positions"] > packed["positions"]


def test_an_epoch_is_timed_with_ready_batches_and_with_the_loader(run_example, log_file, tmp_path):
    settings = (
        "--data",
        log_file,
        "--max_length",
        20,
        "--tokens",
        300,
        "--epochs",
        1,
        "--workers",
        1,
        "--device",
        "cpu",
    )
    run_example("benchmarks/training.py", "--what", "epoch", *settings, "--json", tmp_path / "f.json")
    blossom, full = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert blossom["attention_types"] == "blossom" and full["attention_types"] == "full"
    assert blossom["steps"] == full["steps"] > 1
    assert min(figure[kind] for figure in (blossom, full) for kind in ("seconds", "with_loader")) > 0
