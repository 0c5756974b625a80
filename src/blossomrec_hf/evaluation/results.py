"""One JSON file for the results of many runs, which may be spread over days and machines."""

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
    Adds one run to a results file, a JSON list of `{"configuration", "seed", "commit", ...}`.

    A run with the same configuration, seed and commit replaces the one that stands there. Runs that end at the same
    time wait for each other, and the file is never seen half-written.

    Raises:
        ValueError: if the file is there and is no such list. Nothing is written then.
        TimeoutError: if another run holds the file for more than half a minute.
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
                raise TimeoutError(f"{lock} is held by another run; remove it if there is none.") from None
            time.sleep(0.05)
    try:
        results = read_results(path)
        key = {"configuration": configuration, "seed": seed, "commit": commit}
        # Through JSON, so that what is compared is what is read back (tuples are lists there).
        key = json.loads(json.dumps(key, default=str))
        results = [result for result in results if any(result.get(name) != value for name, value in key.items())]
        write_json(path, [*results, {**key, **figures}])
    finally:
        lock.unlink()


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The runs in a results file; none if it is not there."""
    path = Path(path)
    if not path.exists():
        return []
    results = read_json(path, list)
    if not all(isinstance(result, dict) for result in results):
        raise ValueError(f"{path} is no list of results.")
    return results
