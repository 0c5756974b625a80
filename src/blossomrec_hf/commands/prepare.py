"""
From an interaction log to item-id sequences, in one command.

    blossomrec prepare ml-1m --output_dir data/ml-1m --report data/ml-1m.html
    blossomrec prepare ratings.csv --min_rating 4 --k_core 5 --output_dir data/mine
    blossomrec prepare week.csv --tokenizer runs/mine --output_dir data/week
    blossomrec prepare "clicks/*.parquet" --user uid --item sku --timestamp at --output_dir data/clicks

The folder holds the Dataset (`datasets.load_from_disk`), the tokenizer (`BlossomRecTokenizer.from_pretrained`), item
titles if known, what each filter removed, and a card. It appears complete or not at all.
"""

import argparse
import logging
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from datasets import disable_progress_bars, load_from_disk

from .. import BlossomRecTokenizer
from ..data import build_sequences, hold_out_nothing, split_by_time, split_by_user
from ..data.filters import FilterReport
from ..data.formats import FORMATS
from ..data.known_sets import KNOWN
from ..data.overview import describe, summary, write_report
from ..data.storage import check_output_dir
from ..sharing.dataset_cards import dataset_card, push_dataset
from ..utils.command_line import HelpFormatter, exit_on_error, load_checkpoint
from ..utils.files import atomic_folder


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("source", help=f"file, folder, pattern, Hub data set, or one of {', '.join(KNOWN)}")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the result")
    parser.add_argument("--overwrite", action="store_true", help="replace output_dir if it is there")
    parser.add_argument("--format", choices=sorted(FORMATS), help="found out by looking, if not given")
    for name in ("user", "item", "timestamp", "rating"):
        parser.add_argument(f"--{name}", help=f"name of the column of {name}s; the usual names are found without")
    parser.add_argument(
        "--titles",
        help="file of item titles: movies.dat, u.item, .item, CSV, JSON lines, Parquet; those that come with the log, if not given",
    )
    parser.add_argument(
        "--min_rating", type=float, help="rows rated lower are no interactions; every row is one, if not given"
    )
    parser.add_argument(
        "--deduplicate",
        choices=("none", "first", "last"),
        default="none",
        help="which of a user's events with one item stays",
    )
    parser.add_argument(
        "--k_core", type=int, nargs="+", default=[1], help="least interactions a user and an item have"
    )
    parser.add_argument("--min_history", type=int, default=1, help="users with fewer events go")
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="folder or Hub id of a model whose item ids to use; items it lacks become [UNK]; the "
        "log's own items, if not given",
    )
    parser.add_argument("--max_history", type=int, help="the latest events of a user to keep; all, if not given")
    parser.add_argument(
        "--on_bad_rows", choices=("fail", "skip"), default="fail", help="what to do about rows that cannot be read"
    )
    parser.add_argument(
        "--time_format", help="how texts of times are written, as for strftime; numbers and ISO 8601, if not given"
    )
    parser.add_argument("--keep_na_ids", action="store_true", help="NA, NULL, nan and None are ids, not missing ones")
    parser.add_argument(
        "--split",
        choices=("leave_one_out", "time", "user", "none"),
        default="leave_one_out",
        help="what is held out: each user's last items, a time, users, or nothing",
    )
    parser.add_argument(
        "--validation_from", type=float, help="--split time: first time of validation, in the log's unit"
    )
    parser.add_argument("--test_from", type=float, help="--split time: first time of the test, in the log's unit")
    parser.add_argument("--validation_users", type=float, default=0.1, help="--split user: share of users")
    parser.add_argument("--test_users", type=float, default=0.1, help="--split user: share of users")
    parser.add_argument("--seed", type=int, default=0, help="--split user: which users")
    parser.add_argument(
        "--report", type=Path, help="page (.html) or picture (.png) about the result; none, if not given"
    )
    parser.add_argument(
        "--push_to_hub", metavar="OWNER/NAME", help="data set repository to push the result to; none, if not given"
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public; it is private otherwise")
    parsed = parser.parse_args(arguments)
    if parsed.split == "time" and None in (parsed.validation_from, parsed.test_from):
        parser.error("--split time needs --validation_from and --test_from")
    if len(parsed.k_core) > 2:
        parser.error("--k_core takes one number, or two: users and items")
    if parsed.report is not None:
        if parsed.report.suffix not in (".html", ".png"):
            parser.error("--report takes a name that ends in .html or .png")
        if parsed.report.is_dir() or not parsed.report.absolute().parent.is_dir():
            parser.error(
                f"--report is {parsed.report}, which cannot be written: give the name of a file in a folder that exists"
            )
        if find_spec("matplotlib") is None:
            parser.error("--report needs matplotlib: pip install blossomrec-hf[report]")
    return parsed


def build(args: argparse.Namespace, folder: Path) -> None:
    """Writes the data set to `folder`."""
    dataset, _ = build_sequences(
        args.source,
        user=args.user,
        item=args.item,
        timestamp=args.timestamp,
        rating=args.rating,
        format=args.format,
        min_rating=args.min_rating,
        deduplicate=args.deduplicate,
        k_core=(args.k_core[0], args.k_core[-1]),
        min_history=args.min_history,
        max_history=args.max_history,
        on_bad_rows=args.on_bad_rows,
        time_format=args.time_format,
        keep_na_ids=args.keep_na_ids,
        titles=args.titles,
        tokenizer=None
        if args.tokenizer is None
        else load_checkpoint(BlossomRecTokenizer, args.tokenizer, "tokenizer"),
        output_dir=folder,
        overwrite=True,
    )
    if args.split != "leave_one_out":
        # Only the ends differ, but a folder on disk has to hold them: it is written again, and takes the other's place.
        if args.split == "time":
            dataset = split_by_time(dataset, args.validation_from, args.test_from)
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
            report.measure_repeats(dataset)
            report.save(split)
    (folder / "README.md").write_text(dataset_card(folder), encoding="utf-8")


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "matplotlib", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        disable_progress_bars()  # those of `datasets`; ours are silent by themselves
    check_output_dir(args.output_dir, overwrite=args.overwrite)
    with atomic_folder(args.output_dir) as folder:
        build(args, folder)

    figures = write_report(args.report, args.output_dir) if args.report else describe(load_from_disk(args.output_dir))
    for name, value in summary(figures, FilterReport.load(args.output_dir)):
        print(f"{name}: {value}")
    print(f"Saved to {args.output_dir}" + (f", report in {args.report}" if args.report else ""))
    if args.push_to_hub:
        print("Pushed to", push_dataset(args.output_dir, args.push_to_hub, private=not args.public))


if __name__ == "__main__":
    main()
