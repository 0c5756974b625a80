"""
Builds item-id sequences from a log of events.

    blossomrec prepare ml-1m --output_dir data/ml-1m --report data/ml-1m.html
    blossomrec prepare ratings.csv --min_rating 4 --k_core 5 --output_dir data/mine
    blossomrec prepare week.csv --tokenizer runs/mine --output_dir data/week
    blossomrec prepare train.csv --validation validation.csv --test test.csv --output_dir data/given
    blossomrec prepare "clicks/*.parquet" --user uid --item sku --timestamp at --output_dir data/clicks

The folder contains the Dataset (`datasets.load_from_disk`), the tokenizer (`BlossomRecTokenizer.from_pretrained`), item
titles if there are any, a report on what each filter removed, and a card. It is written completely or not at all.
"""

import shutil
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from .. import BlossomRecTokenizer
from ..data import build_sequences, hold_out_nothing, split_by_time, split_by_user, split_into_folds
from ..data.filters import FilterReport
from ..data.known_sets import KNOWN
from ..data.options import EventOptions, FilterOptions, ItemOptions, LogOptions
from ..data.overview import describe_folder, summary, write_report
from ..data.readers import find_given_split
from ..data.storage import check_output_dir
from ..data.time_units import as_seconds, duration_seconds
from ..sharing.dataset_cards import dataset_card, push_dataset
from ..utils.command_line import HelpFormatter, exit_on_error, load_checkpoint
from ..utils.files import atomic_folder
from ..utils.progress import set_up_logging


@dataclass
class PrepareArguments:
    """What is written, and which events of each history are held out."""

    output_dir: Path = field(metadata={"help": "Folder for the result."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing output_dir."})
    items: str | None = field(
        default=None,
        metadata={
            "help": "File of item titles and features: movies.dat, u.item, .item, CSV, JSON lines, Parquet, with item ids in a "
            "column called as in the log (--item) or by a usual name; by default, that of the log."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a model whose item ids to use; items that it lacks become [UNK]. By default, ids are "
            "made for the items of the log."
        },
    )
    split: Literal["leave_one_out", "time", "folds", "user", "given", "none"] | None = field(
        default=None,
        metadata={
            "help": "What is held out: each user's last two targets, a period of time, rolling periods (folds), users, what the "
            "files say (given: --validation and --test, or a folder of RecBole's benchmark files or of gSASRec's split), or nothing. By default, "
            "given if --validation or --test is given, otherwise leave_one_out."
        },
    )
    validation: str | None = field(
        default=None, metadata={"help": "Events of validation, if the source has those of training alone."}
    )
    test: str | None = field(
        default=None, metadata={"help": "Events of the test, if the source has those of training alone."}
    )
    validation_from: str | None = field(
        default=None,
        metadata={
            "help": "For the split by time: beginning of validation, as a date, seconds, or a share of the events (0.8)."
        },
    )
    test_from: str | None = field(
        default=None,
        metadata={"help": "For the splits by time and into folds: beginning of the (first) test, likewise."},
    )
    folds: int = field(default=1, metadata={"help": "For the split into folds: number of tests, one after another."})
    fold_width: str = field(
        default="7d", metadata={"help": "For the split into folds: duration of a test, such as 12h or 7d."}
    )
    validation_users: float = field(default=0.1, metadata={"help": "For the split by user: share of users."})
    test_users: float = field(default=0.1, metadata={"help": "For the split by user: share of users."})
    seed: int = field(default=0, metadata={"help": "For the split by user: seed of the draw."})
    report: Path | None = field(
        default=None, metadata={"help": "Page (.html) or picture (.png) about the result; by default, none."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Data set repository (owner/name) to push the result to; by default, none."}
    )
    public: bool = field(default=False, metadata={"help": "Make a new repository public; by default, it is private."})

    def __post_init__(self) -> None:
        named = "--validation" if self.validation is not None else "--test" if self.test is not None else None
        if self.split is None:
            self.split = "leave_one_out" if named is None else "given"
        if named is not None and self.split != "given":
            raise ValueError(
                f"--split is {self.split}, but {named} names the events of a given split; leave one of them out."
            )
        if self.split == "time" and None in (self.validation_from, self.test_from):
            raise ValueError("--split is time, which needs --validation_from and --test_from; give both.")
        if self.split == "folds" and self.test_from is None:
            raise ValueError("--split is folds, which needs --test_from; give the beginning of the first test.")
        self._check_times()
        if self.report is None:
            return
        if self.report.suffix not in (".html", ".png"):
            raise ValueError(f"--report is {self.report}; it takes a name that ends in .html or .png.")
        if self.report.is_dir() or not self.report.absolute().parent.is_dir():
            raise ValueError(
                f"--report is {self.report}, which cannot be written: give the name of a file in a folder that exists."
            )
        if find_spec("matplotlib") is None:
            raise ValueError("--report needs matplotlib: pip install blossomrec-hf[report].")

    def _check_times(self) -> None:
        """Raise `ValueError` for times that the split, which comes after the log is read, would refuse."""
        given = {name: getattr(self, name) for name in ("validation_from", "test_from")}
        times = {
            name: as_seconds(f"--{name}", time, "a share of the events between 0 and 1")
            for name, time in given.items()
            if time is not None
        }
        if self.split == "folds":
            duration_seconds("--fold_width", self.fold_width)
        elif self.split == "time":
            first, second = times.values()
            if second < first and (first < 1) == (second < 1):  # two dates, or two shares
                raise ValueError(f"--test_from is {self.test_from}, before --validation_from {self.validation_from}.")


def build(source: str, args: PrepareArguments, options: dict[str, Any], folder: Path) -> None:
    """Writes the data set to `folder`."""
    tokenizer = None
    if args.tokenizer is not None:
        tokenizer = load_checkpoint(BlossomRecTokenizer, args.tokenizer, "tokenizer")
    dataset, _ = build_sequences(
        find_given_split(source, args.validation, args.test) if args.split == "given" else source,
        tokenizer=tokenizer,
        items=args.items,
        output_dir=folder,
        overwrite=True,
        **options,
    )
    if args.split not in ("leave_one_out", "given"):
        # Only the ends differ, but they are columns: the folder is written again, and replaces the first one.
        if args.split == "time":
            dataset = split_by_time(dataset, args.validation_from, args.test_from)
        elif args.split == "folds":
            dataset = split_into_folds(dataset, args.test_from, width=args.fold_width, folds=args.folds)
        elif args.split == "none":
            dataset = hold_out_nothing(dataset)
        else:
            dataset = split_by_user(dataset, validation=args.validation_users, test=args.test_users, seed=args.seed)
        with atomic_folder(folder) as split:
            dataset.save_to_disk(split)
            for file in folder.iterdir():
                if file.suffix != ".arrow" and not (split / file.name).exists():
                    shutil.copy(file, split)
            report = FilterReport.load(split)
            report.measure_repeats(dataset, args.split)
            report.save(split)
    (folder / "README.md").write_text(dataset_card(folder), encoding="utf-8")


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        (PrepareArguments, LogOptions, EventOptions, FilterOptions, ItemOptions),
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "source", help=f"File, folder, glob pattern, data set of the Hub, or one of {', '.join(KNOWN)}."
    )
    args, *groups, rest = parser.parse_args_into_dataclasses(arguments)
    options = {name: value for group in groups for name, value in asdict(group).items()}
    set_up_logging()
    check_output_dir(args.output_dir, overwrite=args.overwrite)
    with atomic_folder(args.output_dir) as folder:
        build(rest.source, args, options, folder)

    figures = write_report(args.report, args.output_dir) if args.report else describe_folder(args.output_dir)
    for name, value in summary(figures, FilterReport.load(args.output_dir)):
        print(f"{name}: {value}")
    print(f"Saved to {args.output_dir}" + (f", report in {args.report}" if args.report else ""))
    if args.push_to_hub:
        print("Pushed to", push_dataset(args.output_dir, args.push_to_hub, private=not args.public))


if __name__ == "__main__":
    main()
