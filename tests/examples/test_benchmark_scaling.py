import json


def test_two_processes_are_compared_with_one(run_example, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results = tmp_path / "scaling.jsonl"
    settings = "--items 300 400 --max_length 32 --tokens 64 --hidden_size 32 --warmup 1 --steps 2".split()
    run_example("benchmarks/scaling.py", *settings, "--results", results, num_processes=1)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    printed = run_example("benchmarks/scaling.py", *settings, "--results", results, launcher=launcher)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["processes"], line["items"]) for line in lines] == [(1, 300), (1, 400), (2, 300), (2, 400)]
    report = json.loads(printed.strip().splitlines()[-1])
    expected = lines[3]["items_per_second"] / lines[1]["items_per_second"] / 2
    assert abs(report["efficiency"] - expected) < 1e-3
    assert report["kind"] == "replicated" and report["peak_MiB"] >= report["persistent_MiB"] > 0


def test_results_that_cannot_be_added_to_are_reported_before_measuring(run_example, tmp_path):
    results = tmp_path / "scaling.jsonl"
    results.write_text('{"processes": 1}\n')
    error = run_example("benchmarks/scaling.py", "--results", results, status=2, field="stderr")
    assert error == f"`results` is {results}, damaged in line 1; remove that line, or give another file.\n"
    missing = tmp_path / "missing" / "scaling.jsonl"
    error = run_example("benchmarks/scaling.py", "--results", missing, status=2, field="stderr")
    assert error.endswith(f"--results is {missing}, in a folder that does not exist\n")
    error = run_example("benchmarks/scaling.py", "--max_length", 0, status=2, field="stderr")
    assert error.endswith("--max_length is [0]; it must be 1 or more\n")
