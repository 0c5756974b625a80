"""Progress bars that stay out of logs."""

import os

from tqdm.auto import tqdm


def progress_bar(*, total: int, description: str, enabled: bool = True, initial: int = 0, leave: bool = True) -> tqdm:
    """
    A `tqdm` bar, silent when `enabled` is false, when standard error is not a terminal, or when `TQDM_DISABLE` is set.
    """
    silent = not enabled or os.environ.get("TQDM_DISABLE", "").lower() in ("1", "true", "yes", "on")
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        leave=leave,
        dynamic_ncols=True,
        disable=True if silent else None,
    )
