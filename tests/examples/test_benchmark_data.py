"""The benchmark runs, and what it prints can be read by a program."""

import json

import pytest


@pytest.fixture
def run_benchmark(run_example, tmp_path):
    """Runs the benchmark and returns the lines that it printed."""

    def run(*arguments):
        printed = run_example("benchmarks/data.py", "--folder", tmp_path / "folder", *arguments, spawn_by_fork=True)
        return [json.loads(line) for line in printed.splitlines()]

    return run


@pytest.mark.slow
def test_the_benchmark_prints_a_line_a_run_and_the_slope(run_benchmark, tmp_path):
    sizes = [20000, 60000]
    lines = run_benchmark("--interactions", *sizes, "--bare_sort")
    assert [line.get("log") for line in lines] == [f"log-{size}.parquet" for size in sizes for _ in range(2)] + [None]
    for line in lines[:-1]:
        assert line["seconds"] > 0 and line["peak_MiB"] > 50 and line["users"] > 0
    assert lines[1]["users"] <= lines[0]["users"]  # the 5-core can only drop users
    assert list(lines[-1]) == ["slope of log seconds over log interactions", "slope of log CPU seconds"]
    made = [f"{kind}{size}.parquet" for kind in ("log-", "items-of-log-") for size in sizes]
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == sorted(made)


@pytest.mark.slow
def test_the_benchmark_compares_builds_with_and_without_columns(run_benchmark):
    *lines, ratios = run_benchmark("--interactions", 20000, "--columns", 1)
    assert ["timestamp=" in line["what"] for line in lines] == [True, False, False]
    assert ["event_type=event_type" in line["what"] for line in lines] == [False, False, True]
    assert len({line["users"] for line in lines}) == 1
    for line, ratio in zip(lines, ratios.values(), strict=False):  # of one pair, the median is the ratio
        assert ratio == pytest.approx({name: lines[2][name] / line[name] for name in ratio}, abs=1e-3)
    assert list(ratios) == ["all columns to without times", "all columns to with times alone"]


@pytest.mark.slow
def test_the_benchmark_of_batches_says_how_full_they_are(run_benchmark, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("".join(f"{user} {item}\n" for user in range(200) for item in range(user % 40 + 3)))
    options = ["--max_tokens", 512, "--max_length", 30, "--workers", 1, "--step_seconds", 0]
    lines = run_benchmark("--log", log, *options)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    lengths = [min(user % 40 + 1, 30) for user in range(200) if user % 40 + 1 >= 2]
    for line in lines:
        assert line["sizes"] == [512]
        assert line["filled"] == round(sum(lengths) / 512 / line["steps"], 4) > 0.9
        assert line["own_cpu_ms_a_step"] > 0
