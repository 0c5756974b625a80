"""The benchmark of the cache runs and says what it measured."""

import json


def test_the_cache_beside_recomputing(run_example, tmp_path):
    printed = run_example(
        "benchmark_serving.py", "--device", "cpu", "--history", 100, "--batch", 2, "--items", 50, "--seconds", 0,
        "--attention_types", "blossom,full", "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert "append, blossom" in printed and "recompute, full" in printed
    results = json.loads((tmp_path / "figures.json").read_text())
    assert [f["what"].split(",")[0] for f in results["figures"]] == ["append", "recompute", "prefill"] * 2
    assert all(f["p99_ms"] >= f["p50_ms"] > 0 and f["mib"] > 0 for f in results["figures"])
    differences = [float(line.split()[-1]) for line in printed.splitlines() if "largest difference" in line]
    assert len(differences) == 2 and max(differences) < 1e-4
