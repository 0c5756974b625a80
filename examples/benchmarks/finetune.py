"""
Measure how well new items are recommended after fine-tuning on the latest part of a log, and how old items are affected.

    python examples/benchmarks/finetune.py --data ratings.parquet --seeds 1 2 3
    python examples/benchmarks/finetune.py --data ratings.parquet --save_events events.npz   # then, on another machine:
    python examples/benchmarks/finetune.py --data events.npz --seeds 1 2 3 --parallel 3

A random `--new_share` of the items with at least `--least_events` events is withheld. The old log is the part before the
latest `--late_share` of the events, without the withheld items. Two models learn the late events, except for the last fifth
of each user's: a model trained on the old log and fine-tuned as by `blossomrec finetune`, and a model trained from scratch
on the old log and the late events, stopped at its best epoch on the targets.

The late events are then predicted from the events before them. All items are ranked, seen items masked. Targets are events
of withheld items after the first event of the item ("new") and of other items ("old"), at most `--targets` each. "Learned"
targets were part of the training, "held out" ones are the last fifth. The output is Recall@10 and, for the fine-tuned models,
its ratio to that of the retrained model.

`--variants` compares settings of fine-tuning. The vectors of new items start from their `events` (`initialize_from_events`)
or at the `mean` of the old ones.
"""

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import fmean
from time import perf_counter

import numpy as np
import torch
from transformers import TrainingArguments, set_seed

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.batches import HistoryStore, PackingCollator
from blossomrec_hf.evaluation import HeldOutItems, rank_held_out_items
from blossomrec_hf.model.ids_blossomrec import NUM_SPECIAL_IDS
from blossomrec_hf.training import (
    LoopArguments,
    SequentialRecommendationTrainer,
    initialize_from_events,
    train,
)
from blossomrec_hf.training.fine_tuning import (
    FINE_TUNING_DEFAULTS,
    MIN_STEPS,
    REPLAY_SHARE,
    count_steps,
    windows_to_learn,
)
from blossomrec_hf.utils.command_line import HelpFormatter


HELD_OUT_SHARE = 0.2
METRIC = "recall@10"
VARIANT = "start:learning_rate:epochs:share of replayed targets:batch size:schedule"
DEFAULT_VARIANT = (
    "events:{learning_rate}:{num_train_epochs}:{0}:{per_device_train_batch_size}:{lr_scheduler_type}".format(
        REPLAY_SHARE, **FINE_TUNING_DEFAULTS
    )
)


def read_events(data: str) -> dict[str, np.ndarray]:
    """Arrays `item` (int32 codes), `user` (int32 codes, ascending) and `time` (int64), one entry per event, in time order."""
    if data.endswith(".npz"):
        return dict(np.load(data))
    from blossomrec_hf.data import build_sequences

    table = build_sequences(data)[0].with_format("arrow")[:]
    if "timestamps" not in table.column_names:
        raise ValueError(f"`data` {data} has no times; give a log with times, which define its latest part.")
    items, times = (table[name].combine_chunks().flatten().to_numpy() for name in ("input_ids", "timestamps"))
    lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
    return {
        "item": items - NUM_SPECIAL_IDS,
        "user": np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        "time": times,
    }


@dataclass
class Case:
    """
    Histories of vocabulary ids.

    Attributes:
        num_past: number of events of each history before the late part.
        num_learned: number of events of each history that are learned; the others are held out.
        first_new: the first id of the withheld items, which are the last of the vocabulary.
    """

    histories: list[np.ndarray]
    num_past: list[int]
    num_learned: list[int]
    first_new: int
    vocab_size: int

    def places(self, *, new: bool, learned: bool) -> list[tuple[int, int]]:
        """(history, position) of the late events that are targets, of new or old items."""
        found, met = [], set()
        for row, history in enumerate(self.histories):
            limits = self.num_past[row], self.num_learned[row], len(history)
            for place in range(*(limits[:2] if learned else limits[1:])):
                item = history[place]
                first = new and learned and item not in met
                if place and (item >= self.first_new) == new and not first:
                    found.append((row, place))
                met.add(item)
        return found


def divide(
    events: dict[str, np.ndarray], *, new_share: float, least_events: int, late_share: float, seed: int
) -> Case:
    """Withhold items and mark the late part, as described above."""
    item, user, time = events["item"], events["user"], events["time"]
    counts = np.bincount(item)
    frequent = np.flatnonzero(counts >= least_events)
    withheld = np.random.default_rng(seed).permutation(frequent)[: round(len(frequent) * new_share)]
    is_late = time >= np.quantile(time, 1 - late_share)
    kept = ~np.isin(item, withheld) | is_late
    item, user, is_late = item[kept], user[kept], is_late[kept]
    is_new = np.zeros(len(counts), bool)
    is_new[withheld] = True
    occurring = np.unique(item)
    in_order = np.concatenate([occurring[~is_new[occurring]], occurring[is_new[occurring]]])
    ids = np.zeros(len(counts), np.int64)
    ids[in_order] = np.arange(len(in_order)) + NUM_SPECIAL_IDS
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    histories = np.split(ids[item], starts[1:])
    num_late = [int(part.sum()) for part in np.split(is_late, starts[1:])]
    return Case(
        histories,
        num_past=[len(history) - late for history, late in zip(histories, num_late)],
        num_learned=[len(history) - int(late * HELD_OUT_SHARE) for history, late in zip(histories, num_late)],
        first_new=NUM_SPECIAL_IDS + int((~is_new[occurring]).sum()),
        vocab_size=NUM_SPECIAL_IDS + len(in_order),
    )


def to_predict(case: Case, places: list[tuple[int, int]], args: argparse.Namespace) -> HeldOutItems:
    """At most `args.targets` targets of `places`, each with the history before it."""
    drawn = np.random.default_rng(0).permutation(len(places))[: args.targets]
    rows = []
    for row, place in (places[number] for number in sorted(drawn)):
        before = case.histories[row][:place]
        target = case.histories[row][place : place + 1]
        rows.append(
            {"user_id": row, "input_ids": before[-args.max_length :], "target_ids": target, "seen_ids": before}
        )
    return HeldOutItems.from_rows(rows)


def train_from_scratch(
    histories: list[np.ndarray], validation: HeldOutItems, vocab_size: int, args: argparse.Namespace, seed: int
) -> BlossomRecForSequentialRecommendation:
    """Train a model, and return it as it was after its best epoch on `validation`."""
    set_seed(seed)
    config = BlossomRecConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=2 * args.hidden_size,
        hidden_dropout_prob=args.dropout,
    )
    model = BlossomRecForSequentialRecommendation(config)
    with tempfile.TemporaryDirectory() as folder:
        settings = LoopArguments(
            output_dir=folder,
            seed=seed,
            max_length=args.max_length,
            windows="overlapping",
            tokens_per_step=args.tokens_per_step,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            eval_epochs=args.eval_epochs,
            patience=3,
            save_seconds=1e9,
        )
        train(model, [{"input_ids": history} for history in histories], validation, args=settings)
    return model


def fine_tune(
    model: BlossomRecForSequentialRecommendation, case: Case, variant: str, args: argparse.Namespace, seed: int
) -> None:
    """Fine-tune as `blossomrec finetune` does, with the settings of `variant`."""
    start, learning_rate, epochs, replay, batch_size, schedule = variant.split(":")
    learned = [history[:length] for history, length in zip(case.histories, case.num_learned)]
    new_items = range(case.first_new, case.vocab_size)
    model.resize_token_embeddings(case.vocab_size)
    if start == "events":
        initialize_from_events(model, new_items, HistoryStore.from_rows([{"input_ids": h} for h in learned if len(h)]))
    if float(epochs) == 0:
        return
    rows = windows_to_learn(
        case.histories,
        case.num_past,
        case.num_learned,
        max_length=args.max_length,
        replay_share=float(replay),
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **FINE_TUNING_DEFAULTS,
            "output_dir": folder,
            "learning_rate": float(learning_rate),
            "num_train_epochs": float(epochs),
            "per_device_train_batch_size": int(batch_size),
            "lr_scheduler_type": schedule,
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "disable_tqdm": True,
            "logging_strategy": "no",
            "seed": seed,
            "use_cpu": not torch.cuda.is_available(),
        }
        training_args = TrainingArguments(**settings)
        training_args.max_steps = count_steps(len(rows), training_args, args.min_steps)
        SequentialRecommendationTrainer(
            model, training_args, data_collator=PackingCollator(), train_dataset=rows
        ).train()


def measure(events: dict[str, np.ndarray], args: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Recall@10 of each model for each kind of targets."""
    began = perf_counter()
    case = divide(
        events, new_share=args.new_share, least_events=args.least_events, late_share=args.late_share, seed=seed
    )
    targets = {
        f"{'new' if new else 'old'}, {'learned' if learned else 'held out'}": to_predict(
            case, case.places(new=new, learned=learned), args
        )
        for new in (True, False)
        for learned in (True, False)
    }

    def recalls(model: BlossomRecForSequentialRecommendation, kinds=tuple(targets)) -> dict[str, float]:
        return {
            kind: rank_held_out_items(model, targets[kind], progress=False).metrics(ks=(10,))[METRIC] for kind in kinds
        }

    past = [history[:length] for history, length in zip(case.histories, case.num_past)]
    last = [(row, len(history) - 1) for row, history in enumerate(past) if len(history) > 2]
    old_model = train_from_scratch(
        [history[:-1] for history in past if len(history) > 2],
        to_predict(case, last, args),
        case.first_new,
        args,
        seed,
    )
    learned = [history[:length] for history, length in zip(case.histories, case.num_learned)]
    held_out = case.places(new=True, learned=False) + case.places(new=False, learned=False)
    retrained = train_from_scratch(learned, to_predict(case, held_out, args), case.vocab_size, args, seed)
    figures = {"retrained": recalls(retrained)}
    print(f"{perf_counter() - began:.0f} s, seed {seed}, retrained: {figures['retrained']}", flush=True)
    for variant in args.variants:
        model = deepcopy(old_model)
        fine_tune(model, case, variant, args, seed)
        figures[variant] = recalls(model)
        print(f"{perf_counter() - began:.0f} s, seed {seed}, {variant}: {figures[variant]}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True, help="a log with times, or a file of --save_events")
    parser.add_argument("--save_events", metavar="FILE.npz", help="write the events as arrays, and exit")
    parser.add_argument("--new_share", type=float, default=0.1, help="share of the items to withhold")
    parser.add_argument("--least_events", type=int, default=20, help="minimum number of events of a withheld item")
    parser.add_argument("--late_share", type=float, default=0.1, help="share of the events in the late part")
    parser.add_argument("--targets", type=int, default=10_000, help="maximum number of targets of each kind")
    parser.add_argument("--max_length", type=int, default=200)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=100, help="maximum number of epochs of training from scratch")
    parser.add_argument("--eval_epochs", type=int, default=5, help="epochs between validations")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="learning rate of training from scratch")
    parser.add_argument("--tokens_per_step", type=int, default=16384, help="items per step of training from scratch")
    parser.add_argument("--min_steps", type=int, default=MIN_STEPS, help="minimum number of steps of fine-tuning")
    parser.add_argument("--variants", nargs="+", default=[DEFAULT_VARIANT], help=VARIANT)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds; each withholds other items")
    parser.add_argument("--parallel", type=int, default=1, help="number of seeds that run in parallel")
    args = parser.parse_args()

    events = read_events(args.data)
    if args.save_events:
        np.savez_compressed(args.save_events, **events)
        return
    with ProcessPoolExecutor(args.parallel, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(measure, [events] * len(args.seeds), [args] * len(args.seeds), args.seeds))
    kinds = list(runs[0]["retrained"])
    print(f"{'Recall@10':<24}" + "".join(f"{kind:>30}" for kind in kinds))
    for name in runs[0]:
        cells = []
        for kind in kinds:
            value = fmean(run[name][kind] for run in runs)
            ratios = [run[name][kind] / max(run["retrained"][kind], 1e-9) for run in runs]
            spread = f" ({fmean(ratios):.3f}, {min(ratios):.2f}-{max(ratios):.2f})" if name != "retrained" else ""
            cells.append(f"{value:.4f}{spread}")
        print(f"{name:<24}" + "".join(f"{cell:>30}" for cell in cells))
    print(json.dumps(dict(zip(args.seeds, runs))))


if __name__ == "__main__":
    main()
