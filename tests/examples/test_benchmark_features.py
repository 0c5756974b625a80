import json


def test_each_set_of_features_is_timed_next_to_none(run_example, tmp_path):
    sizes = ("--items", 30, "--tokens", 60, "--max_length", 20, "--append_to", 12, "--rounds", 1, "--device", "cpu")
    run_example("benchmarks/features.py", *sizes, "--json", tmp_path / "f.json")
    report = json.loads((tmp_path / "f.json").read_text())
    for what in ("append", "training step"):
        first, *others = report[what]
        assert first["features"] == "none" and first["ratio"] == 1
        assert len(others) == 5 and all(figure["seconds"] > 0 for figure in others)
