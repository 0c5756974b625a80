"""
What does a grown catalogue cost the users who were there before? Trains a model, adds items with new events, fine-tunes
by `finetune.py`, and ranks the old users' test items again, among all items, the new ones included.

    python examples/benchmark_finetune.py --data ml-100k.inter --new_items 1000
    python examples/benchmark_finetune.py --data ml-100k.inter --new_items 1000 --finetune --replay none

The rarest `--new_items` items and a fifth of the users are the news: the old log holds the other users' events with the
other items, the new log all events of the new users, and of the old users those with new items, after what the old
log has of them. Old users' tests stay what they were. What follows `--finetune` goes to finetune.py, which
learns from the old log too if nothing else is said. Prints NDCG@10 of the old users before and after (the paired difference with its
standard error over users), and what was gained: that of the new log's tests.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import torch

from blossomrec_hf import BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.command_line import HelpFormatter
from blossomrec_hf.data import build_sequences, generate_log, split
from blossomrec_hf.training import HeldOutItems, add_items, paired_difference, rank_held_out_items


EXAMPLES = Path(__file__).parent


def read_events(data: str | None) -> pl.DataFrame:
    """user, item and place in the user's history, of every event in time order."""
    dataset, tokenizer = build_sequences(generate_log() if data is None else data)
    users = dataset["user_id"]
    histories = [tokenizer.decode_items(items) for items in dataset["input_ids"]]
    return pl.DataFrame(
        {
            "user": [user for user, items in zip(users, histories) for _ in items],
            "item": [item for items in histories for item in items],
            "timestamp": [place for items in histories for place in range(len(items))],
        }
    )


def divide(events: pl.DataFrame, new_items: int, seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The old log, and the log to fine-tune on."""
    counts = events["item"].value_counts().sort("count", "item", descending=[True, False])
    if not 0 < new_items < len(counts):
        raise ValueError(f"`new_items` is {new_items}; it must lie in 1 … {len(counts) - 1}, below the catalogue.")
    rare = counts["item"].tail(new_items).implode()
    users = events["user"].unique().sort()
    drawn = np.random.default_rng(seed).random(len(users)) < 0.2
    is_new_user = pl.col("user").is_in(users.filter(pl.Series(drawn)).implode())
    is_old = ~is_new_user & ~pl.col("item").is_in(rare)
    return events.filter(is_old), events.filter(~is_old)


def user_ndcg(folder: Path, log: Path, max_length: int) -> dict[str, np.ndarray]:
    """NDCG@10 of every test user of a log; items that the model does not know are added as finetune.py adds them."""
    model = BlossomRecForSequentialRecommendation.from_pretrained(folder)
    tokenizer = BlossomRecTokenizer.from_pretrained(folder)
    _, all_items = build_sequences(log)
    add_items(model, tokenizer, all_items.decode_items(range(2, len(all_items))))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    dataset, _ = build_sequences(log, tokenizer=tokenizer)
    held_out = HeldOutItems.from_rows(split(dataset, "test"), max_length=max_length)
    figures = rank_held_out_items(model, held_out, progress=False).per_user_metrics(ks=(10,), all_and_unseen=True)
    return {name: figures[name] for name in ("ndcg@10_all", "ndcg@10_unseen")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", help="a log; left out, the built-in data set")
    parser.add_argument("--new_items", type=int, default=1000)
    parser.add_argument("--max_length", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=30, help="of the first training")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/grown"))
    parser.add_argument("--finetune", nargs=argparse.REMAINDER, default=[], help="arguments of finetune.py")
    args = parser.parse_args()

    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    old, new = divide(read_events(args.data), args.new_items, args.seed)
    old_log, new_log = folder / "old.csv", folder / "new.csv"
    old.write_csv(old_log)
    new.write_csv(new_log)
    common = ["--max_length", str(args.max_length), "--seed", str(args.seed)]
    base = folder / "base"
    if not (base / "model.safetensors").exists():
        training = "--hidden_size 64 --num_attention_heads 4 --intermediate_size 128 --tokens_per_step 2048 "
        training += f"--learning_rate 3e-3 --warmup_steps 50 --eval_epochs 2 --num_train_epochs {args.epochs}"
        command = [sys.executable, str(EXAMPLES / "train.py"), "--data", str(old_log), "--output_dir", str(base)]
        subprocess.run([*command, *training.split(), *common], check=True)
    grown = folder / "grown"
    command = [sys.executable, str(EXAMPLES / "finetune.py"), "--model", str(base), "--data", str(new_log)]
    subprocess.run([*command, "--output_dir", str(grown), *common, *args.finetune], check=True)

    report: dict = {"old_events": len(old), "new_events": len(new)}
    for users, log in (("old", old_log), ("new", new_log)):
        before, after = (user_ndcg(model, log, args.max_length) for model in (base, grown))
        report[f"{users}_users"] = len(before["ndcg@10"])
        for name in before:
            change, error = paired_difference(after[name], before[name])
            mean = float(before[name].mean())
            figures = {"before": mean, "after": mean + change, "standard_error": error, "change": change / mean}
            report[f"{users}_{name}"] = {key: round(value, 5) for key, value in figures.items()}
    print(json.dumps({"seed": args.seed, "finetune": args.finetune, **report}))


if __name__ == "__main__":
    main()
