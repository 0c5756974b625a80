"""The study of counted work: rooflines are those of the parts, parts of the study join, and tables can be drawn again."""

import json

import pytest
from example_cases import load_example


TINY = ("--lengths", "24", "--what", "inference", "--contestants", "blossom", "--seconds", 0)
TINY += ("--device", "cpu", "--tokens", 96)


def make_results(machine="NVIDIA H100 80GB HBM3", **changes):
    figures = [
        {"what": "training", "row": f"L={length}", "length": length, "contestant": contestant, "ms": 5.0}
        for length in (200, 65_536)
        for contestant in ("blossom", "full (cuDNN)")
    ]
    return {
        "code": [{"hash": "0" * 12, "files": {}}],
        "machine": machine,
        "torch": "2.11.0",
        "dtype": "torch.bfloat16",
        "tokens": 65_536,
        "layers, width, key/value heads": [2, 128, 2],
        **{"compile": True, "graphs": True, "loss": "last", "seconds": 100},
        **{"copy_bytes_per_s": 2e12, "matrix_operations_per_s": 6e14, "figures": figures},
        **changes,
    }


@pytest.fixture
def operations():
    return load_example("studies/operations.py")


def test_the_roofline_adds_up_the_slower_of_products_and_bytes(operations):
    results = make_results()
    short, _, blossom, full = (operations.count(figure, results) for figure in results["figures"])
    assert blossom["roofline_ms"] == pytest.approx(sum(blossom["parts"].values()))
    # One history of 65,536 items: 65,536 · 65,537 / 2 pairs of 8 heads of width 16, two products forward, four backward.
    attention = 2 * 3 * 4 * 128 * 65_536 * 65_537 / 2
    assert full["attention_gflop"] == {"full": pytest.approx(attention / 6 / 1e9)}
    assert full["parts"]["attention"] == pytest.approx(1e3 * attention / 989.4e12)
    assert full["bound"] == "operations" and blossom["bound"] == short["bound"] == "bytes"
    assert sum(blossom["attention_gflop"].values()) < full["attention_gflop"]["full"] / 20
    # q and the output of width 128, k and v of 32, 16 gates: read and written in bf16, forward and backward.
    numbers = (2 * 128 + 2 * 32 + 16) + (3 * 128 + 4 * 32 + 2 * 16)
    assert short["parts"]["attention"] == pytest.approx(1e3 * 2 * (65_536 // 200 * 200) * numbers * 2 / 3.35e12)


def test_peaks_are_those_of_the_gpu_or_measured(operations):
    assert operations.peaks_of(make_results()) == (989.4e12, 3.35e12)
    assert operations.peaks_of(make_results(machine="NVIDIA H200")) == (989.4e12, 4.8e12)
    assert operations.peaks_of(make_results(machine="2 threads of a CPU")) == (6e14, 2e12)


def test_the_study_measures_counts_and_draws(operations, run_example, tmp_path):
    printed = run_example("studies/operations.py", *TINY, "--folder", tmp_path)
    results = json.loads((tmp_path / "operations.json").read_text())
    (figure,) = results["figures"]
    assert figure["ms"] > 0 and figure["length"] == 24
    assert (tmp_path / "operations.png").stat().st_size > 0
    assert printed.endswith(operations.report(results) + "\n")
    assert (tmp_path / "operations.md").read_text("utf-8") == operations.report(results)


def test_parts_of_one_machine_are_joined(operations):
    first, second = make_results(), make_results(code=[{"hash": "1" * 12, "files": {}}])
    joined = operations.join([first, second])
    assert joined["figures"] == 2 * first["figures"] and joined["seconds"] == 200 and len(joined["code"]) == 2
    assert len(operations.join([first, first])["code"]) == 1
    with pytest.raises(ValueError, match="different machine, dtype"):
        operations.join([first, make_results(machine="NVIDIA H200", dtype="torch.float32")])
