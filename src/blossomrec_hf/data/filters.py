"""The report of a build: how the log was read and what each filter removed."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.files import read_json
from .splits import repeat_share


if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)

REPORT_FILE = "filters.json"


@dataclass
class FilterReport:
    """
    The report of a build, stored as `filters.json`.

    Args:
        source (`str`): name of the log.
        format (`str`): its format.
        interactions_read (`int`): events that were read.
        bad_rows (`int`): rows that were skipped.
        time_unit (`str`, *optional*): unit of the times: s, ms, us or ns.
        license (`str`, *optional*): license of a public data set.
        repeat_share (`float`, *optional*): see [`~blossomrec_hf.data.repeat_share`].
        steps: [name, events, users, items] after each filter.
        bad_row_reasons: number of bad rows by reason.
        notes: sentences on how the log was read.
    """

    source: str
    format: str
    interactions_read: int = 0
    bad_rows: int = 0
    time_unit: str | None = None
    license: str | None = None
    repeat_share: float | None = None
    steps: list[list] = field(default_factory=list)
    bad_row_reasons: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, sentences: Iterable[str]) -> None:
        """Logs sentences on how the log is read, and adds them to the report."""
        for sentence in sentences:
            logger.warning("%s: %s", self.source, sentence)
            self.notes.append(sentence)

    def read(self, interactions: int, bad_row_reasons: Mapping[str, int]) -> None:
        """
        Records how many events were read, and why rows were skipped.

        Raises:
            ValueError: if no event was read.
        """
        self.interactions_read = interactions
        self.bad_row_reasons, self.bad_rows = dict(bad_row_reasons), sum(bad_row_reasons.values())
        logger.info(
            "read %s interactions, skipped %s bad rows%s", f"{interactions:,}", f"{self.bad_rows:,}", self._reasons()
        )
        if not interactions:
            skipped = f" ({self.bad_rows} bad rows skipped{self._reasons()})" if self.bad_rows else ""
            raise ValueError(f"{self.source} has no interaction{skipped}; a log needs at least one.")

    def add(self, name: str, interactions: int, users: int, items: int) -> None:
        """
        Records what a filter left.

        Raises:
            ValueError: if it left nothing.
        """
        before = self.steps[-1][1] if self.steps else self.interactions_read
        logger.info(
            "after %s: %s interactions, %s users, %s items", name, *map("{:,}".format, (interactions, users, items))
        )
        if not interactions:
            raise ValueError(
                f'{self.source}: the filter "{name}" leaves nothing of {before} interactions; loosen it, or see whether '
                "the columns are the right ones."
            )
        self.steps.append([name, int(interactions), int(users), int(items)])

    def measure_repeats(self, dataset: "Dataset", split: str = "leave_one_out") -> None:
        """Measures and logs the share of test targets that already occur in their user's history."""
        self.repeat_share = repeat_share(dataset)
        message = "split %s: %.1f %% of the test targets already occur in their user's history"
        logger.info(message, split, 100 * self.repeat_share)

    def _reasons(self) -> str:
        counts = ", ".join(f"{count:,} with {reason}" for reason, count in sorted(self.bad_row_reasons.items()))
        return f": {counts}" if counts else ""

    def save(self, folder: Path) -> None:
        """Writes `filters.json`."""
        (folder / REPORT_FILE).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "FilterReport | None":
        """
        The report of a data set's folder, or `None` if it has none.

        Raises:
            ValueError: if the file is damaged.
        """
        path = Path(folder) / REPORT_FILE
        if not path.is_file():
            return None
        values = read_json(path)
        if values.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"{path} is damaged, or of another version; build the data set again.")
        return cls(**values)

    def __str__(self) -> str:
        lines = [
            f"{self.interactions_read:,} interactions read from {self.source} ({self.bad_rows:,} bad rows skipped)."
        ]
        lines += [f"Bad rows{self._reasons()}."] if self.bad_row_reasons else []
        lines += [f"Note: {note}." for note in self.notes]
        lines += [f"After {name}: {n:,} interactions, {u:,} users, {i:,} items." for name, n, u, i in self.steps]
        return "\n".join(lines)
