"""The arguments of the log that a command reads, and what they stand for: a table of events, a tokenizer, item features."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..data.event_table import FEATURES_FILE, METADATA_FILE, EventTable, recode_event_types
from ..data.filters import FilterReport
from ..data.holdout import choose_fold
from ..data.options import EventOptions, FilterOptions, LogOptions
from ..data.splits import repeat_share
from ..model.tokenization_blossomrec import BlossomRecTokenizer
from ..utils.files import recover_folder


if TYPE_CHECKING:
    import polars as pl
    from datasets import Dataset

    from ..model.features_blossomrec import ItemFeatures


_OPTIONS = (LogOptions, EventOptions, FilterOptions)


@dataclass(frozen=True, kw_only=True)
class _LogSource:
    """The file of a log; the first options of a command."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "A log, a folder that `blossomrec prepare` wrote, or a file that `blossomrec export --data` wrote; by default, the "
            "built-in data set."
        },
    )
    fold: int | None = field(
        default=None,
        metadata={"help": "Fold of prepared data (prepare --split folds), from 0; by default, the last one."},
    )
    titles: str | None = field(
        default=None,
        metadata={
            "help": "File of item titles (movies.dat, .item, CSV, ...) to save with the model; by default, the titles of the log."
        },
    )


@dataclass(frozen=True, kw_only=True)
class LogArguments(FilterOptions, EventOptions, LogOptions, _LogSource):
    """The interaction log that a command reads, with the options of `blossomrec prepare` for one that is not prepared."""

    # No option here: `--event_types` of `blossomrec train` makes the model read the types.
    event_types: ClassVar[None] = None

    def __post_init__(self) -> None:
        for options in _OPTIONS:
            options.__post_init__(self)

    @property
    def is_exported(self) -> bool:
        """Whether `data` is a file of `blossomrec export --data`."""
        return self.data is not None and self.data.endswith(".safetensors")

    @property
    def _is_built(self) -> bool:
        return self.data is not None and all((Path(self.data) / x).is_file() for x in ("state.json", "tokenizer.json"))

    def read_table(
        self, tokenizer: BlossomRecTokenizer | None = None, event_types: Sequence[str] | None = None
    ) -> tuple[EventTable, BlossomRecTokenizer]:
        """
        Read the log as an [`~blossomrec_hf.data.EventTable`]; arguments and errors as in [`~LogArguments.build`].

        A file of `blossomrec export --data` is memory-mapped, and needs neither `polars` nor `datasets` unless its ids
        change.
        """
        if self.is_exported:
            table, own = self._load_exported()
            if tokenizer is None or own.get_vocab().items() <= tokenizer.get_vocab().items():
                return recode_event_types(table, event_types), own if tokenizer is None else tokenizer
        dataset, tokenizer = self.build(tokenizer)
        return recode_event_types(EventTable.from_dataset(dataset), event_types), tokenizer

    def build(
        self, tokenizer: BlossomRecTokenizer | None = None, event_types: Sequence[str] | None = None
    ) -> "tuple[Dataset, BlossomRecTokenizer]":
        """
        Read the log as sequences and their vocabulary, see [`~blossomrec_hf.data.build_sequences`]. A folder of
        `blossomrec prepare` and a file of `blossomrec export --data` are loaded without further processing.

        Args:
            tokenizer: the vocabulary of a model, in which the items are looked up unless its start is that of the data
                ([`~blossomrec_hf.data.growth.recode`]). Defaults to that of the data.
            event_types: the event types of a model, in which those of the data are looked up. Defaults to those of the data.

        Raises:
            ValueError: if `event_types` is given for data without event types, if options for a log are given for prepared
                data, and for a damaged file or folder.
        """
        from ..data.growth import recode, recode_dataset_types

        dataset, built = self._read_dataset(tokenizer)
        dataset = dataset if tokenizer is None else recode(dataset, built, tokenizer)
        return recode_dataset_types(dataset, event_types), built if tokenizer is None else tokenizer

    def _read_dataset(self, tokenizer: BlossomRecTokenizer | None) -> "tuple[Dataset, BlossomRecTokenizer]":
        """The log and its vocabulary, which is `tokenizer` for a raw log and otherwise its own."""
        from ..data import build_sequences, generate_log
        from ..data.storage import load_folder

        if self.is_exported:
            table, built = self._load_exported()
            return table.to_dataset(), built
        if self.data is not None:
            recover_folder(self.data)
        if self._is_built:
            self._refuse_options()
            dataset, built = load_folder(self.data), BlossomRecTokenizer.from_pretrained(self.data)
            return dataset if self.fold is None else choose_fold(dataset, self.fold), built
        if self.fold is not None:
            raise ValueError(f"`fold` is {self.fold}, but `data` is not prepared; prepare it with --split folds.")
        source = generate_log() if self.data is None else self.data
        return build_sequences(source, tokenizer=tokenizer, **self._options(*_OPTIONS))

    def _load_exported(self) -> tuple[EventTable, BlossomRecTokenizer]:
        self._refuse_options()
        table = EventTable.load(self.data)
        return table if self.fold is None else choose_fold(table, self.fold), table.tokenizer()

    def _options(self, *groups: type) -> dict[str, Any]:
        return {option.name: getattr(self, option.name) for group in groups for option in fields(group)}

    def _refuse_options(self) -> None:
        defaults = LogArguments()
        for name, value in self._options(*_OPTIONS).items():
            if value != getattr(defaults, name):
                raise ValueError(f"`{name}` is {value}, but {self.data} is already prepared; give the log instead.")

    def repeat_share(self, dataset: "Dataset | EventTable") -> float:
        """The share of test targets that already occur in their user's history: stored with prepared data, or measured."""
        if self.fold is not None:  # what is stored is of the last fold
            return repeat_share(dataset)
        if isinstance(dataset, EventTable) and dataset.repeat_share is not None:
            return dataset.repeat_share
        report = FilterReport.load(self.data) if self._is_built else None
        return repeat_share(dataset) if report is None or report.repeat_share is None else report.repeat_share

    def item_titles(self, tokenizer: BlossomRecTokenizer) -> "pl.DataFrame | None":
        """The titles of the vocabulary's items if they are known, see [`~blossomrec_hf.data.metadata.item_metadata`]."""
        source: Any = self.titles
        if source is None and self.is_exported:
            content = EventTable.load(self.data).files.get(METADATA_FILE)
            if content is None:
                return None
            import polars as pl

            source = pl.read_parquet(content)
        from ..data import generate_titles
        from ..data.metadata import item_metadata
        from ..data.readers import open_log

        if source is None and self.data is None:
            source = generate_titles()
        elif source is None and self._is_built:
            stored = Path(self.data) / METADATA_FILE
            source = stored if stored.exists() else None
        elif source is None:
            source = open_log(self.data, LogOptions(**self._options(LogOptions))).titles
        return None if source is None else item_metadata(source, tokenizer, item=self.item)

    def item_features(self, names: str, dataset: EventTable, tokenizer: BlossomRecTokenizer) -> "ItemFeatures":
        """
        The features of the vocabulary's items.

        Args:
            names: columns of the item table, separated by commas, or `"all"`.
            dataset: the data of these arguments.

        Raises:
            ValueError: if there is no item table, or no such feature in it.
        """
        from ..data.item_features import choose_columns, item_features, load_item_features

        columns = None if names == "all" else [name.strip() for name in names.split(",")]
        if FEATURES_FILE in dataset.files:
            return choose_columns(load_item_features(dataset.files[FEATURES_FILE]), columns)
        table = self.item_table(tokenizer)
        if table is None:
            raise ValueError(
                f"`item_features` is {names!r}, but the data has no item table; prepare it with `blossomrec prepare --items FILE`."
            )
        return item_features(table, tokenizer.num_items, columns)

    def item_table(self, tokenizer: BlossomRecTokenizer) -> "pl.DataFrame | None":
        """The item table: of prepared data, with all items and features; otherwise that of `item_titles`."""
        import polars as pl

        if self.titles is None and self.is_exported:
            content = EventTable.load(self.data).files.get(METADATA_FILE)
            return None if content is None else pl.read_parquet(content)
        if self.titles is None and self._is_built and (Path(self.data) / METADATA_FILE).exists():
            return pl.read_parquet(Path(self.data) / METADATA_FILE, glob=False)
        return self.item_titles(tokenizer)
