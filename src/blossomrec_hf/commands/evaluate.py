"""
Evaluate checkpoints on a log, next to baselines that need no training.

    blossomrec evaluate --models runs/ml-1m --data ml-1m/interactions.txt --max_length 1000
    accelerate launch -m blossomrec_hf.commands.evaluate --models runs/a runs/b --data log.csv --part validation --output_dir reports

All items are ranked for every user. If at most 1 % of the test targets already occur in their user's history, seen items
are excluded from the ranking. Otherwise nothing is excluded, and repeated and new targets are also reported separately.
Metrics that end in `_uni100` rank each target among 100 sampled items, as RecBole does, and those that end in `_given99` among
the 99 items of the user in the file of `--negatives`.

A model whose time features depend on "now", the time of the event to be predicted, is evaluated twice: without and with now.

The baselines are the most popular items, overall and in the 7 days before the user's latest event (if the log has times), the
user's most frequent items, and the items that followed the user's last item in training. If the log has event types, the items
that the user viewed most recently; if a model sees now, the items that are popular after a gap as long as the one before now.

Output files: `evaluation.json` (metrics with bootstrap intervals, also by history length, coverage and popularity lift),
`evaluation.md` (a table), and `ranks.npz` (all ranks, for `blossomrec compare`).
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from .. import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from ..data import item_counts, split
from ..data.splits import user_ids
from ..data.time_units import as_seconds
from ..evaluation import (
    PROTOCOL,
    HeldOutItems,
    describe_evaluation,
    markdown_table,
    rank_by_now,
    rank_by_scores,
)
from ..evaluation.baselines import make_baselines
from ..evaluation.reports import NOW_LABEL
from ..sharing.summary import SUMMARY_FILE, read_summary
from ..training import LogArguments, parse_arguments
from ..training.event_features import require_event_columns
from ..utils.command_line import check_at_least, exit_on_error, load_checkpoint
from ..utils.environment import check_processes, describe_environment
from ..utils.files import atomic_files, require_folder, write_json
from ..utils.progress import set_up_logging


@dataclass
class EvaluationArguments:
    """The models and the protocol."""

    models: list[str] = field(
        default_factory=list, metadata={"help": "Folders of trained models, or Hub ids; at least one."}
    )
    part: str = field(default="test", metadata={"help": "Part of the data to evaluate: test or validation."})
    max_length: int = field(
        default=200, metadata={"help": "Number of latest items that a model reads of each history."}
    )
    max_tokens: int = field(default=65536, metadata={"help": "Number of items per batch and process."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16; by default, the setting of `accelerate launch`."}
    )
    ks: list[int] = field(default_factory=lambda: [1, 5, 10, 20], metadata={"help": "Cut-offs of the metrics."})
    num_negatives: int = field(
        default=100, metadata={"help": "Number of sampled items for the sampled metrics; 0 for none."}
    )
    negatives: str | None = field(
        default=None,
        metadata={
            "help": "File of items for the sampled metrics in place of sampled ones, such as S3-Rec's _sample.txt: in each line "
            "a user id and as many item ids, separated by spaces."
        },
    )
    known_targets: bool = field(
        default=False,
        metadata={
            "help": "Drop targets whose item never occurs in the training part of the log, and count them. Histories have [UNK] "
            "in place of such items."
        },
    )
    test_after: str | None = field(
        default=None,
        metadata={
            "help": "Evaluate only users whose last input and held-out events are after this time: seconds since 1970, or a date "
            "(UTC). By default, all users."
        },
    )
    exclude_seen: bool | None = field(
        default=None,
        metadata={
            "help": "Exclude seen items from the ranking. By default, the models' setting is used, or, if they have none, the "
            "share of repeated targets in the log decides."
        },
    )
    all_and_unseen: bool = field(
        default=False, metadata={"help": "Also report the metrics with nothing excluded and with seen items excluded."}
    )
    samples: int = field(default=1000, metadata={"help": "Number of bootstrap samples."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampled items and of the bootstrap."})
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Folder for the reports."})

    def __post_init__(self):
        if self.part not in ("test", "validation"):
            raise ValueError(f"`part` must be test or validation, got {self.part!r}.")
        if not self.models:
            raise ValueError("`models` must name at least one folder of a checkpoint.")
        check_at_least(
            1, max_length=self.max_length, max_tokens=self.max_tokens, samples=self.samples, ks=min(self.ks)
        )
        check_at_least(0, num_negatives=self.num_negatives)
        if self.negatives is not None and not Path(self.negatives).is_file():
            raise ValueError(f"`negatives` is {self.negatives!r}, which is no file; give the path of one.")
        if self.test_after is not None:
            as_seconds("`test_after`", self.test_after)


def common_event_types(configs: Mapping[str, BlossomRecConfig]) -> list[str] | None:
    """
    The event types that the models read; `None` if none of them reads any.

    Raises:
        ValueError: if two of them read other types.
    """
    by_model = {folder: config.event_types for folder, config in configs.items() if config.event_types is not None}
    (first, types), *others = by_model.items() or [(None, None)]
    for folder, other in others:
        if other != types:
            raise ValueError(
                f"`models`: {folder} reads the event types {', '.join(other)}, and {first} {', '.join(types)}; evaluate them in "
                "two runs."
            )
    return types


@exit_on_error()
def main() -> None:
    log_args, args = parse_arguments(LogArguments, EvaluationArguments, description=__doc__)
    set_up_logging()
    require_folder(args.output_dir)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    check_processes(accelerator.num_processes)
    ranking = {"num_negatives": args.num_negatives, "seed": args.seed, "accelerator": accelerator}

    configs = {folder: load_checkpoint(BlossomRecConfig, folder, "models") for folder in args.models}
    test_after = None if args.test_after is None else as_seconds("`test_after`", args.test_after)
    event_types = common_event_types(configs)
    read = {name for config in configs.values() for name in config.event_columns}
    needed = read | (set() if test_after is None else {"timestamps"})

    ranks, reports, tokenizers = {}, {}, []
    for folder in args.models:
        tokenizer = load_checkpoint(BlossomRecTokenizer, folder, "models")
        model = load_checkpoint(BlossomRecForSequentialRecommendation, folder, "models").to(accelerator.device)
        # Baselines and held-out items are shared by models with the same catalog.
        if not tokenizers or tokenizer.get_vocab() != tokenizers[-1].get_vocab():
            if tokenizers:
                raise ValueError(
                    f"`models`: {folder} has another catalog than {args.models[0]}; evaluate them in two runs."
                )
            dataset, _ = log_args.read_table(tokenizer, event_types)
            for config in configs.values():
                require_event_columns(config, dataset.column_names, "give models that do not read them")
            counts = item_counts(dataset, len(tokenizer))
            view = split(dataset, args.part, columns=sorted(needed), counts=counts if args.known_targets else None)
            held_out = HeldOutItems.from_rows(
                view, max_length=args.max_length, columns=sorted(read), test_after=test_after
            )
            if args.negatives is not None:
                ranking["negatives"] = held_out.read_negatives(args.negatives, tokenizer, user_ids(dataset))
            ranking["top_k"] = min(max(args.ks), tokenizer.num_items)
            ranking["exclude_seen"] = args.exclude_seen
        if args.exclude_seen is None:
            if model.config.repeat_share is None:
                model.config.repeat_share = log_args.repeat_share(dataset)
            if ranking["exclude_seen"] not in (None, model.config.exclude_seen):
                raise ValueError(
                    f"`models`: {folder} and {args.models[0]} differ in whether seen items are excluded; give "
                    "--exclude_seen true or --exclude_seen false for all of them."
                )
            ranking["exclude_seen"] = model.config.exclude_seen
        tokenizers.append(tokenizer)
        for now, of_now in rank_by_now(model, held_out, max_tokens=args.max_tokens, **ranking).items():
            ranks[f"{folder}{NOW_LABEL if now else ''}"] = of_now
    baselines = make_baselines(dataset, args.part, held_out, counts, accelerator.device)
    for name, scores in baselines.items():
        ranks[name] = rank_by_scores(scores, held_out, vocab_size=len(counts), device=accelerator.device, **ranking)
    if not accelerator.is_main_process:
        return

    refits = [
        folder
        for folder in args.models
        if (Path(folder) / SUMMARY_FILE).is_file() and read_summary(folder).get("refit", False)
    ]
    for name, of_name in ranks.items():
        described = describe_evaluation(
            of_name,
            held_out,
            item_counts=counts,
            ks=args.ks,
            all_and_unseen=args.all_and_unseen,
            samples=args.samples,
            seed=args.seed,
        )
        reports[name] = {
            "sees_now": name.endswith(NOW_LABEL),
            "refit": name.removesuffix(NOW_LABEL) in refits,
            **described,
        }
    arguments = {**asdict(log_args), **asdict(args)}
    report = {"arguments": arguments, "protocol": PROTOCOL, **describe_environment(), "reports": reports}
    arrays = {
        f"{name}{suffix}": values
        for name, of_name in ranks.items()
        for suffix, values in of_name.by_suffix(all_and_unseen=args.all_and_unseen).items()
    }
    arrays |= {"user_ids": np.array(held_out.user_ids), "users": held_out.target_users}
    arrays |= {"repeated": held_out.repeated, "exclude_seen": ranking["exclude_seen"]}
    k = 10 if 10 in args.ks else max(args.ks)
    names = [name for name in next(iter(reports.values()))["metrics"] if re.match(rf"(recall|ndcg)@{k}(_|$)", name)]
    table = markdown_table(reports, [*names, f"coverage@{k}", f"popularity_lift@{k}"])
    notes = [PROTOCOL, *(f"{folder} is a refit: it was trained on the held-out events, too." for folder in refits)]
    with atomic_files(args.output_dir) as folder:
        write_json(folder / "evaluation.json", report)
        np.savez_compressed(folder / "ranks.npz", **arrays)
        (folder / "evaluation.md").write_text("\n\n".join([table, *notes]) + "\n", encoding="utf-8")
    if test_after is not None:
        print(f"Users whose last input and held-out events are after {args.test_after}: ", end="")
    masking = "seen items are" if ranking["exclude_seen"] else "nothing is"
    print(
        f"{len(held_out)} users, {tokenizer.num_items} items; {held_out.repeat_share:.1%} of the held-out items already ",
        end="",
    )
    print(
        f"occur in their user's history, {masking} excluded; ± is half a 95% interval over users",
        table,
        *notes,
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
