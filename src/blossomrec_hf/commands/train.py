"""
Train a BlossomRec model on an interaction log, evaluate it by full ranking, and save it.

    accelerate launch examples/train.py           # the built-in data set, a few minutes on a CPU
    blossomrec train --data ml-1m/interactions.txt --recipe long --mixed_precision bf16 --seed 1
    blossomrec train --data ml-100k.inter --hidden_size 64 --max_length 50 --output_dir runs/ml-100k --resume
    blossomrec train --data shop.csv --output_dir runs/shop --refit   # runs/shop/refit: trained on all events
"""

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .. import BlossomRecConfig, BlossomRecForSequentialRecommendation
from ..data import EventTable, has_users, hold_out_nothing, item_counts, split
from ..data.event_table import METADATA_FILE, TableView
from ..evaluation import HeldOutItems, append_result, evaluate, read_results
from ..evaluation.ranking import NOW_SUFFIX
from ..model.features_blossomrec import ItemFeatures
from ..sharing.cards import write_card
from ..sharing.summary import write_summary
from ..training import (
    LogArguments,
    LoopArguments,
    SelectionWatch,
    TrainingLoop,
    changed_arguments,
    check_refit_folder,
    initialize_model,
    parse_arguments,
    refit,
    refit_folder,
    save_arguments,
)
from ..training.event_features import EventFeatureArguments, require_event_columns
from ..training.recipes import RECIPES, suitable_recipe
from ..utils.command_line import check_at_least, exit_on_error, report_replacement
from ..utils.environment import check_processes, describe_environment
from ..utils.files import atomic_write, require_folder
from ..utils.progress import count_noun, set_up_logging


logger = logging.getLogger("blossomrec_hf.train")

# Defaults for the built-in data set: a few minutes on two CPU cores.
BUILT_IN = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.1,
    "tokens_per_step": 2048,
    "learning_rate": 3e-3,
    "warmup_steps": 50,
    "num_train_epochs": 36,
    "eval_epochs": 2,
}


@dataclass
class ModelArguments(EventFeatureArguments):
    """The model; all other settings of `BlossomRecConfig` keep their defaults."""

    attention_types: list[str] = field(
        default_factory=lambda: ["blossom"],
        metadata={
            "help": "Attention of each layer: blossom, long_term, short_term or full; one value applies to all layers."
        },
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of the item embeddings and of every layer."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Number of layers."})
    num_attention_heads: int = field(default=8, metadata={"help": "Number of query heads."})
    num_key_value_heads: int | None = field(
        default=None,
        metadata={
            "help": "Number of key/value heads; by default, one per query head. Fewer of them need less time and memory, and "
            "rank worse."
        },
    )
    intermediate_size: int = field(default=256, metadata={"help": "Width inside the feed-forward blocks."})
    hidden_dropout_prob: float = field(
        default=0.3,
        metadata={"help": "Dropout probability after the embedding, the attention and the feed-forward block."},
    )
    item_features: str | None = field(
        default=None,
        metadata={
            "help": "Features of the items that are part of their vectors: columns of the item table, separated by commas, or "
            "all; by default, none."
        },
    )
    config_overrides: str = field(
        default="{}",
        metadata={"help": 'Other settings of BlossomRecConfig as JSON, for example {"objective": "gbce"}.'},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "blossom_torch, blossom_triton or eager; by default, the fastest that the hardware supports."
        },
    )

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        try:
            unknown = json.loads(self.config_overrides).keys() - BlossomRecConfig().to_dict().keys()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"`config_overrides` is {self.config_overrides!r}; it must be a JSON object.") from error
        if unknown:
            raise ValueError(
                f"`config_overrides` names {', '.join(sorted(unknown))}; BlossomRecConfig has no such setting."
            )


@dataclass
class OutputArguments:
    """Which results are reported and saved."""

    eval_ks: list[int] = field(default_factory=lambda: [1, 5, 10, 20], metadata={"help": "Cut-offs of the metrics."})
    all_and_unseen: bool = field(
        default=False,
        metadata={"help": "Also report the test metrics with nothing excluded and with seen items excluded."},
    )
    eval_negatives: int = field(
        default=0,
        metadata={"help": "Also rank each test item among this many sampled items (usually 100); 0 for none."},
    )
    known_targets: bool = field(
        default=False,
        metadata={
            "help": "Drop validation and test targets whose item never occurs in the training part of the log, and count them. "
            "Histories have [UNK] in place of such items."
        },
    )
    refit: bool = field(
        default=False,
        metadata={
            "help": "After training, train a new model on all events, including validation and test, with the same schedule "
            "up to the best epoch, and save it to refit/ in the output directory."
        },
    )
    watch: bool = field(
        default=False, metadata={"help": "Record gates and block selection in selection.jsonl and selection.png."}
    )
    results_json: str | None = field(
        default=None,
        metadata={
            "help": "JSON file to add the results to, keyed by configuration, seed and commit; by default, none."
        },
    )

    def __post_init__(self) -> None:
        check_at_least(0, eval_negatives=self.eval_negatives)
        check_at_least(1, eval_ks=min(self.eval_ks))


@exit_on_error()
def main() -> None:
    parse = partial(
        parse_arguments,
        *(LogArguments, ModelArguments, LoopArguments, OutputArguments),
        description=__doc__,
        built_in=BUILT_IN,
        recipes=RECIPES,
    )
    log_args, model_args, args, output_args = parse()
    set_up_logging()

    require_folder(args.output_dir)
    if not args.resume:
        report_replacement(args.output_dir)
    if output_args.results_json is not None:
        read_results(output_args.results_json)  # fails before the training if results cannot be added
    if output_args.refit:
        check_refit_folder(args)
    dataset, tokenizer = log_args.read_table()
    _, model_args, args, _ = parse(suitable=suitable_recipe(np.diff(dataset.offsets)))
    embedded_titles = dataset.files.get(METADATA_FILE) if log_args.titles is None else None
    titles = log_args.item_titles(tokenizer) if embedded_titles is None else None
    features = None
    if model_args.item_features is not None:
        features = log_args.item_features(model_args.item_features, dataset, tokenizer)
        model_args.item_features = ",".join(features.columns)  # "all" depends on the data
    model = new_model(model_args, args.seed, dataset, len(tokenizer), log_args.repeat_share(dataset), features)
    config = model.config

    # Without held-out items, the model is trained to the last epoch.
    views: dict[str, TableView | None] = {"validation": None, "test": None}
    counts = model.item_counts.numpy() if output_args.known_targets else None
    for part in views:
        if has_users(dataset, part, counts):
            views[part] = split(dataset, part, max_length=args.max_length, columns=config.event_columns, counts=counts)
        else:
            logger.warning("No user has an item to predict for %s, so there are no %s metrics.", part, part)
    if output_args.eval_negatives and views["test"] is not None:
        # Fails before the training if a user has interacted with every item.
        HeldOutItems.from_rows(views["test"]).sample_negatives(output_args.eval_negatives, vocab_size=len(tokenizer))
    train_length = args.max_length if args.windows == "latest" else None
    train_view = split(dataset, "train", max_length=train_length, columns=config.event_columns)
    watched = views["validation"] or train_view
    watch = {"max_length": args.max_length, "columns": config.event_columns}
    callbacks = [SelectionWatch(watched, **watch)] if output_args.watch else []
    loop = TrainingLoop(
        model,
        train_view,
        views["validation"],
        args=args,
        tokenizer=tokenizer,
        callbacks=callbacks,
    )
    accelerator = loop.accelerator
    check_processes(accelerator.num_processes)
    size = f"{len(dataset)} users, {tokenizer.num_items} items; {model.num_parameters():,} weights"
    place = f"{accelerator.num_processes} processes ({accelerator.device.type})"
    accelerator.print(f"{size} on {accelerator.device if accelerator.num_processes == 1 else place}", flush=True)
    result = loop.run()
    figures = {}
    if views["test"] is not None:
        figures["test"] = evaluate(
            model,
            views["test"],
            ks=output_args.eval_ks,
            max_tokens=args.eval_tokens,
            num_negatives=output_args.eval_negatives,
            all_and_unseen=output_args.all_and_unseen,
            accelerator=accelerator,
        )
    if result.best_figures:
        figures["validation"] = result.best_figures

    configuration = {**asdict(log_args), **asdict(model_args), **args.resume_critical_args()}
    for name in ("eval_negatives", "all_and_unseen", "known_targets"):
        if value := getattr(output_args, name):
            configuration[name] = value
    run = {"seed": configuration.pop("seed"), "configuration": configuration, **figures}
    run["changed_arguments"] = changed_arguments(configuration)
    run |= {"repeat_share": config.repeat_share, "exclude_seen": config.exclude_seen}
    run |= {"training": result.summary(), **describe_environment()}

    def keep(folder: Path | str, run: dict) -> None:
        """Write arguments, item titles, summary and card next to a model."""
        save_arguments(f"{folder}/run.yaml", log_args, model_args, args, output_args)
        if embedded_titles is not None:
            with atomic_write(Path(folder) / METADATA_FILE) as partial:
                partial.write_bytes(embedded_titles)
        elif titles is not None:
            from ..data.metadata import write_item_metadata  # imports polars

            write_item_metadata(folder, titles)
        write_summary(folder, run)
        shown = run.get("test", run.get("validation", {}))
        ks = [int(name.removeprefix("recall@")) for name in shown if re.fullmatch(r"recall@\d+", name)]
        write_card(folder, name=Path(args.output_dir).resolve().name, k=10 if 10 in ks or not ks else max(ks))

    if accelerator.is_main_process:
        print(f"\n{count_noun(result.epochs, 'epoch')} in {result.seconds:.0f} s", end="")
        if result.best_metric is not None:
            print(f"; the best was epoch {result.best_epoch}, validation ", end="")
            print(f"{args.metric_for_best_model} {result.best_metric:.4f}", end="")
        print(f". Saved in {args.output_dir}.")
        if "test" in figures:
            print(f"{config.repeat_share:.1%} of the test targets already occur in their user's history: ", end="")
            print(f"{'seen items are' if config.exclude_seen else 'nothing is'} excluded from the ranking.")
            print_figures(figures["test"], output_args.eval_ks, exclude_seen=config.exclude_seen)
        # The saved model: a sharded one computes only if all processes take part.
        saved = BlossomRecForSequentialRecommendation.from_pretrained(args.output_dir).to(accelerator.device)
        named = {} if titles is None else dict(titles.select("item", "title").drop_nulls().iter_rows())
        print_recommendations(saved, tokenizer, (views["test"] or train_view)[0], args.max_length, named)
        if output_args.results_json is not None:
            append_result(output_args.results_json, **run)
        keep(args.output_dir, run)
        sys.stdout.flush()  # the refit takes as long again

    folder = Path(args.output_dir)
    if output_args.refit:
        everything, folder = hold_out_nothing(dataset), refit_folder(args)
        model = new_model(model_args, args.seed, everything, len(tokenizer), config.repeat_share, features)
        refit_view = split(everything, "train", max_length=train_length, columns=config.event_columns)
        refitted = refit(model, refit_view, result, args=args, tokenizer=tokenizer)
        if accelerator.is_main_process:
            run.pop("test", None)
            run |= {"configuration": {**configuration, "refit": True}, "training": refitted.summary(), "refit": True}
            run["changed_arguments"] = changed_arguments(run["configuration"])
            keep(folder, run)
            print(f"\nA new model, trained on all events for {count_noun(refitted.epochs, 'epoch')}: {folder}.")
    if args.push_to_hub and accelerator.is_main_process:
        print(f"\nPushed: {loop.push_to_hub(folder).commit_url}")


def new_model(
    model_args: ModelArguments,
    seed: int,
    dataset: EventTable,
    vocab_size: int,
    repeat_share: float,
    features: ItemFeatures | None = None,
) -> BlossomRecForSequentialRecommendation:
    """The model of the arguments, with the item frequencies of the training events."""
    settings = asdict(model_args)
    attn_implementation, types = settings.pop("attn_implementation"), settings["attention_types"]
    settings |= {"attention_types": types[0] if len(types) == 1 else types, "repeat_share": repeat_share}
    settings["item_features"] = None if features is None else features.config()
    settings |= model_args.event_settings(dataset) | json.loads(settings.pop("config_overrides"))
    config = BlossomRecConfig(vocab_size=vocab_size, **settings)
    require_event_columns(config, dataset.column_names, "drop `time_features` or `event_types`")
    counts = item_counts(dataset, vocab_size)
    return initialize_model(
        config, seed=seed, counts=counts, features=features, attn_implementation=attn_implementation
    )


def print_figures(figures: dict[str, float], ks: Sequence[int], *, exclude_seen: bool) -> None:
    """Print the test metrics as a table, one row per metric and kind of target."""
    width = 36 if any(name.endswith(NOW_SUFFIX) for name in figures) else 24
    print(f"\n{'test':<{width}}" + "".join(f"{'@' + str(k):>9}" for k in ks))
    kinds = {"": "unseen items" if exclude_seen else "all items", "_repeated": "repeated", "_new": "new"}
    kinds |= {"_all": "all items", "_unseen": "unseen items"}
    for suffix in dict.fromkeys(re.fullmatch(r"\w+@\d+(.*)", name)[1] for name in figures):
        protocol = suffix.removesuffix(NOW_SUFFIX)
        kind = kinds.get(protocol) or f"{protocol.removeprefix('_uni')} drawn"
        kind += ", now known" if suffix != protocol else ""
        for name in ("recall", "ndcg", "mrr"):
            row = "".join(f"{figures[f'{name}@{k}{suffix}']:>9.4f}" for k in ks)
            print(f"{name + ', ' + kind:<{width}}{row}")


def print_recommendations(model, tokenizer, row: dict, max_length: int, titles: Mapping[int | str, str]) -> None:
    """Print ten recommendations for one user, with the titles of items if they are known, by raw id."""
    events = {name: torch.tensor(row[name], device=model.device)[None] for name in model.config.event_columns}
    history = torch.tensor(row["input_ids"], device=model.device)[None]
    recommended = model.recommend(
        history,
        top_k=min(10, tokenizer.num_items),
        exclude_ids=row.get("seen_ids", row["input_ids"]) if model.config.exclude_seen else None,
        max_length=max_length,
        **events,
    )
    found = recommended.item_ids[0] >= 0
    items, scores = tokenizer.decode_items(recommended.item_ids[0][found]), recommended.scores[0][found].tolist()
    print(f"\nuser {row['user_id']}: the latest items {tokenizer.decode_items(row['input_ids'][-10:])}")
    for item, score in zip(items, scores):
        print(f"{item!s:>12} {score:8.3f}  {titles.get(item, '')}".rstrip())


if __name__ == "__main__":
    main()
