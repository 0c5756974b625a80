"""
Measure how well items are recommended that no user had in the training log, by their features alone.

    blossomrec prepare ml-1m/interactions.txt --items ml-1m/items.parquet --item_categories genres,year --item_text title \
        --text_model MODEL --output_dir ml-1m
    blossomrec export --data ml-1m --output ml-1m.safetensors          # then, also on a machine without polars:
    python examples/benchmarks/cold_items.py --data ml-1m.safetensors --seeds 1 2 3 --config_overrides '{"scoring": "cosine"}'

A random `--share` of the items is withheld: a model with item features learns the log without their events. The items are
then added to its catalog with their features, and are recommended without training. It is compared with two models of the
same size: one with the same features that learned the whole log ("trained on them"), and one of ids alone that learned the
log without the withheld items.

The test is leave-one-out, seen items are masked. "Withheld" targets are ranked among the withheld items: by the models, by
the popularity in the whole training log, and in random order. "Share" is the share of withheld items in the top 10 of the
whole catalog, over all users. "Warm" targets are all others: ranked among the warm items, as the model of ids alone does,
and in the whole catalog. "Validation" is the same of the validation targets that are withheld, by which settings are chosen.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from statistics import fmean
from time import perf_counter

import numpy as np
import torch
from transformers import set_seed

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.data import split
from blossomrec_hf.model.features_blossomrec import ItemFeatures
from blossomrec_hf.model.ids_blossomrec import NUM_SPECIAL_IDS
from blossomrec_hf.training import LogArguments, LoopArguments, initialize_model, train
from blossomrec_hf.utils.command_line import HelpFormatter, exit_on_error


K = 10
MODELS = ["without training", "trained on them", "ids alone"]
BATCH = 512  # users that are ranked at a time


class Log:
    """
    A log in which some items are withheld, which have the last vocabulary ids.

    Attributes:
        train: the training part of each history, of vocabulary ids.
        past: the history before the test target.
        validation, test: the held-out items, of which there may be none.
        first_withheld: the first id of the withheld items.
        vocab_size: number of ids.
        order: the ids in the data, less 2, in the order of the new ids.
    """

    def __init__(self, rows: list[dict[str, np.ndarray]], num_items: int, share: float, seed: int) -> None:
        generator = np.random.default_rng(seed)
        withheld = np.zeros(num_items, bool)
        withheld[generator.permutation(num_items)[: round(share * num_items)]] = True
        self.order = np.append(np.flatnonzero(~withheld), np.flatnonzero(withheld))
        new_ids = np.zeros(num_items + NUM_SPECIAL_IDS, np.int64)
        new_ids[self.order + NUM_SPECIAL_IDS] = np.arange(num_items) + NUM_SPECIAL_IDS
        self.train, self.past, self.validation, self.test = (
            [new_ids[row[name]] for row in rows] for name in ("train", "past", "validation", "test")
        )
        self.first_withheld = NUM_SPECIAL_IDS + int((~withheld).sum())
        self.vocab_size = num_items + NUM_SPECIAL_IDS

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each item occurs in the training part, int64 [vocab_size]."""
        return np.bincount(np.concatenate(self.train), minlength=self.vocab_size)[:vocab_size]

    def training_rows(self, vocab_size: int) -> list[dict]:
        """The training histories, without the events of items that the vocabulary lacks."""
        rows = [history[history < vocab_size] for history in self.train]
        return [{"input_ids": history} for history in rows if len(history) > 1]

    def validation_rows(self, vocab_size: int, max_length: int) -> list[dict]:
        """The histories before the validation targets, likewise."""
        rows = []
        for user, (history, target) in enumerate(zip(self.train, self.validation)):
            history = history[history < vocab_size]
            if len(target) and target[0] < vocab_size and len(history):
                before = {"input_ids": history[-max_length:], "seen_ids": history}
                rows.append({"user_id": user, "target_ids": target, **before})
        return rows


def read_log(data: str, columns: str) -> tuple[list[dict[str, np.ndarray]], ItemFeatures]:
    """The parts of each history, vocabulary ids of the data, and the features of all items."""
    log = LogArguments(data=data)
    table, tokenizer = log.read_table()
    rows = []
    tests = {row["user_id"]: row for row in split(table, "test")}
    validations = {row["user_id"]: row for row in split(table, "validation")}
    for row in split(table, "train"):
        user, nothing = row["user_id"], np.zeros(0, np.int64)
        test, validation = tests.get(user), validations.get(user)
        rows.append(
            {
                "train": np.asarray(row["input_ids"], np.int64),
                "past": np.asarray(test["input_ids"] if test else nothing, np.int64),
                "validation": np.asarray(validation["target_ids"] if validation else nothing, np.int64),
                "test": np.asarray(test["target_ids"] if test else nothing, np.int64),
            }
        )
    return rows, log.item_features(columns, table, tokenizer)


def train_model(
    log: Log, features: ItemFeatures | None, vocab_size: int, args: argparse.Namespace, seed: int
) -> BlossomRecForSequentialRecommendation:
    """Train a model on the items below `vocab_size`, and return it as it was after its best epoch."""
    config = BlossomRecConfig(
        vocab_size=vocab_size,
        item_features=None if features is None else features.config(),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_value_heads,
        intermediate_size=2 * args.hidden_size,
        attention_types=args.attention,
        repeat_share=0.0,
        **json.loads(args.config_overrides),
    )
    model = initialize_model(config, seed=seed, counts=log.counts(vocab_size), features=features)
    with tempfile.TemporaryDirectory() as folder:
        settings = LoopArguments(
            output_dir=folder,
            seed=seed,
            max_length=args.max_length,
            save_seconds=1e9,
            mixed_precision="bf16" if torch.cuda.is_available() else "no",
            **{"eval_epochs": 4, "patience": 4, **json.loads(args.training)},
        )
        validation = log.validation_rows(vocab_size, args.max_length)
        result = train(model, log.training_rows(vocab_size), validation, args=settings)
    kind = "ids" if features is None else "features"
    print(f"{kind}, {vocab_size} ids: best epoch {result.best_epoch}, {result.best_metric:.4f}", flush=True)
    return model.eval()


@torch.no_grad()
def top_items(
    model: BlossomRecForSequentialRecommendation,
    histories: list[np.ndarray],
    max_length: int,
    candidates: range | None = None,
) -> np.ndarray:
    """The ten best items for each history, among all or some ids, int64 [histories, 10]."""
    found = [
        model.recommend(
            [history.tolist() for history in histories[start : start + BATCH]],
            top_k=K,
            exclude_seen=True,
            candidate_ids=candidates,
            max_length=max_length,
        ).item_ids
        for start in range(0, len(histories), BATCH)
    ]
    return torch.cat(found).cpu().numpy()


def recall_and_ndcg(found: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    hits = found == targets[:, None]
    return float(hits.any(1).mean()), float((hits / np.log2(np.arange(2, K + 2))).sum(1).mean())


def model_figures(
    model: BlossomRecForSequentialRecommendation, cases: "Cases", first: int, max_length: int
) -> dict[str, float]:
    """The figures of one model, by what they measure; `first` is the first id of the withheld items."""
    figures, size = {}, model.config.vocab_size
    measured = {"warm, among the warm": (cases.warm, range(NUM_SPECIAL_IDS, first))}
    if size > first:
        withheld = range(first, size)
        measured |= {"warm": (cases.warm, None), "withheld": (cases.withheld, withheld)}
        measured |= {"validation": (cases.validation, withheld)}
    for name, ((histories, targets), candidates) in measured.items():
        histories = [history[history < size] for history in histories]
        recall, ndcg = recall_and_ndcg(top_items(model, histories, max_length, candidates), targets)
        figures |= {f"{name}: recall@10": recall, f"{name}: ndcg@10": ndcg}
    if size > first:
        histories = cases.warm[0] + cases.withheld[0]
        figures["share in the top 10"] = float((top_items(model, histories, max_length) >= first).mean())
    return figures


class Cases:
    """
    What is tested: pairs of the histories before targets, and the targets, int64.

    Attributes:
        warm, withheld: of the test targets that are warm and withheld.
        validation: of the validation targets that are withheld.

    Raises:
        ValueError: if there are no targets of one kind, as in a small log.
    """

    def __init__(self, log: Log) -> None:
        tested, validated = (
            [(past, int(target[0])) for past, target in zip(pasts, targets) if len(target) and len(past)]
            for pasts, targets in ((log.past, log.test), (log.train, log.validation))
        )
        first = log.first_withheld
        chosen = {
            "warm test": [case for case in tested if case[1] < first and case[0].min() < first],
            "withheld test": [case for case in tested if case[1] >= first],
            "withheld validation": [case for case in validated if case[1] >= first],
        }
        if empty := [kind for kind, cases in chosen.items() if not cases]:
            number = log.vocab_size - first
            raise ValueError(
                f"`share` withholds {number} of {log.vocab_size - NUM_SPECIAL_IDS} items, and no target is a "
                f"{empty[0]} target; give another share, other seeds, or a larger log."
            )
        self.warm, self.withheld, self.validation = map(_unzip, chosen.values())


def _unzip(cases: Sequence[tuple[np.ndarray, int]]) -> tuple[list[np.ndarray], np.ndarray]:
    histories, targets = zip(*cases)
    return list(histories), np.array(targets)


def measure(
    rows: list[dict[str, np.ndarray]], features: ItemFeatures, args: argparse.Namespace, seed: int
) -> dict[str, float]:
    """The figures of one draw."""
    log = Log(rows, features.num_items, args.share, seed)
    features = features.select(log.order)
    first, everything, cases = log.first_withheld, log.vocab_size, Cases(log)
    figures = {"withheld items": everything - first, "withheld targets": len(cases.withheld[1])}

    set_seed(seed)
    for name in args.models:
        if name == "trained on them":
            model = train_model(log, features, everything, args, seed)
        elif name == "ids alone":
            model = train_model(log, None, first, args, seed)
        else:
            model = train_model(log, features.select(np.arange(first - NUM_SPECIAL_IDS)), first, args, seed)
            model.resize_token_embeddings(everything)
            withheld_rows = np.arange(first, everything) - NUM_SPECIAL_IDS
            model.set_item_features(features.select(withheld_rows), first_id=first)
        measured = model_figures(model, cases, first, args.max_length)
        figures |= {f"{figure}, {name}": value for figure, value in measured.items()}

    popular, rankable = [], []
    order = first + np.argsort(-log.counts(everything)[first:], kind="stable")
    for history, target in zip(*cases.withheld):
        unseen = order[~np.isin(order, history)]
        popular.append(target in unseen[:K])
        rankable.append(len(unseen))
    figures["withheld: recall@10, popularity"] = fmean(popular)
    figures["withheld: recall@10, random order"] = fmean(min(1.0, K / number) for number in rankable)
    return dict(sorted(figures.items()))


@exit_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--data", required=True, help="a prepared data set with item features, or the file of its export"
    )
    parser.add_argument("--features", default="all", help="columns of the item table, separated by commas")
    parser.add_argument("--share", type=float, default=0.1, help="share of the items to withhold")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds; each withholds other items")
    parser.add_argument("--max_length", type=int, default=200)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key_value_heads", type=int, default=2)
    parser.add_argument("--attention", default="blossom", help="attention_types of BlossomRecConfig")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="the models to train")
    parser.add_argument(
        "--training",
        default="{}",
        help="other arguments of blossomrec train as JSON; by default, there is a validation every 4 epochs, and training "
        "ends after 4 without improvement",
    )
    parser.add_argument("--config_overrides", default="{}", help="other settings of BlossomRecConfig as JSON")
    args = parser.parse_args()

    if not 0 < args.share < 1:
        raise ValueError(f"`share` must lie between 0 and 1, got {args.share}.")
    rows, features = read_log(args.data, args.features)
    runs = []
    for seed in args.seeds:
        began = perf_counter()
        runs.append(measure(rows, features, args, seed))
        print(f"seed {seed}, {perf_counter() - began:.0f} s: {json.dumps(runs[-1])}", flush=True)
    width = max(map(len, runs[0]))
    print(f"\n{'':<{width}}{'mean':>10}" + "".join(f"{f'seed {seed}':>10}" for seed in args.seeds))
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"{name:<{width}}" + "".join(f"{value:>10.4f}" for value in [fmean(values), *values]))


if __name__ == "__main__":
    main()
