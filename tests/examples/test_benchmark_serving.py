"""The benchmark of serving runs, section by section, and says what it measured."""

import json

import pytest


def test_the_cache_beside_recomputing(run_example, tmp_path):
    printed = run_example(
        "benchmarks/serving.py", "--sections", "cache", "--device", "cpu", "--history", 100, "--batch", 2,
        "--items", 50, "--seconds", 0, "--attention_types", "blossom,full", "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert "append, blossom" in printed and "recompute, full" in printed
    results = json.loads((tmp_path / "figures.json").read_text())
    assert [f["what"].split(",")[0] for f in results["figures"]] == ["append", "recompute", "prefill"] * 2
    assert all(f["p99_ms"] >= f["p50_ms"] > 0 and f["mib"] > 0 for f in results["figures"])
    differences = [float(line.split()[-1]) for line in printed.splitlines() if "largest difference" in line]
    assert len(differences) == 2 and max(differences) < 1e-4


def test_a_catalog_and_the_users_of_a_log(run_example, tmp_path, log_file):
    pytest.importorskip("faiss")
    settings = [
        "--sections", "catalog,users", "--device", "cpu", "--items", 3000, "--steps", 2, "--step_tokens", 256,
        "--users", 3, "--probes", 1, 999, "--folder", tmp_path, "--data", log_file, "--lengths", 8, 100,
        "--repeats", 1, "--json", tmp_path / "figures.json",
    ]  # fmt: skip
    assert "trained 2 steps" in run_example("benchmarks/serving.py", *settings)
    assert "trained" not in run_example("benchmarks/serving.py", *settings)  # it is kept
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    catalog = [f for f in figures if f["section"] == "catalog"]
    assert [f["what"] for f in catalog][:2] == ["exact", "index, 1 probes"] and len(catalog) == 3
    assert catalog[2]["recall@10"] == 1 and all(f["p50_ms"] > 0 for f in catalog)
    users = [f for f in figures if f["section"] == "users"]
    assert [f["length"] for f in users] == [8] * 3 + [100] * 3 and all(f["users_per_s"] > 0 for f in users)
    for blossom, packed, padded in (users[:3], users[3:]):
        assert blossom["blossom/packed"] == pytest.approx(blossom["users_per_s"] / packed["users_per_s"])
        assert blossom["blossom/padded"] == pytest.approx(blossom["users_per_s"] / padded["users_per_s"])


def test_a_section_that_there_is_not_is_told(run_example):
    error = run_example("benchmarks/serving.py", "--sections", "cache,users,else", status=2, field="stderr")
    assert "--sections has else; it must be of cache, catalog, users" in error
