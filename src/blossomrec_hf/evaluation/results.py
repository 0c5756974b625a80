"""A JSON file for the results of many runs."""

import json
import time
from pathlib import Path
from typing import Any

from ..utils.files import read_json, write_json


LOCK_SECONDS = 30.0


def append_result(
    path: str | Path, *, configuration: dict[str, Any], seed: int, commit: str | None, **figures: Any
) -> None:
    """
    Add a run to a results file, a JSON list of `{"configuration", "seed", "commit", ...}`. A run with the same
    configuration, seed and commit is replaced. A lock file serializes concurrent runs, and the write is atomic.

    Raises:
        ValueError: if the file exists and is not such a list.
        TimeoutError: if another run locks the file for more than 30 seconds.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + ".lock")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            lock.touch(exist_ok=False)
            break
        except FileExistsError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{lock} is locked by another run; remove the file if no run is active.") from None
            time.sleep(0.05)
    try:
        results = read_results(path)
        key = {"configuration": configuration, "seed": seed, "commit": commit}
        # Through JSON, because the file is compared: tuples become lists.
        key = json.loads(json.dumps(key, default=str))
        results = [result for result in results if any(result.get(name) != value for name, value in key.items())]
        write_json(path, [*results, {**key, **figures}])
    finally:
        lock.unlink()


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Read the runs in a results file; an empty list if it does not exist."""
    path = Path(path)
    if not path.exists():
        return []
    results = read_json(path, list)
    if not all(isinstance(result, dict) for result in results):
        raise ValueError(f"{path} is not a list of results; give a file that `--results_json` wrote.")
    return results
