"""
Times recommending.

    python examples/benchmark_recommend.py --what catalogue       # a catalogue of a million items, exact and by an index
    python examples/benchmark_recommend.py --what users --data ml-1m/interactions.txt      # users/s of a data set

**catalogue** trains a model on a generated log, keeps it under `--folder` for the next time, and asks it for the ten best
of all items, one user at a time: exactly, and through an `ItemIndex` with its recall@10 of the exact ten. The log has
taste for the embeddings to learn: items lie in clusters of 500 with Zipf popularity in each, a user has three clusters
and takes four items of five from them, the fifth from the whole catalogue by its popularity. It is trained with the
sampled softmax against the batch's own targets; the loss of the first and the last steps is printed.

**users** runs `recommend` over the latest items of each user of a log, `--lengths` of them at most (where nobody has so
many, over all histories end to end, cut), in batches of `--max_tokens`: the model, the same with full attention on packed
(variable-length) histories, and with full attention (PyTorch's SDPA) on rows padded to the length.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.data import build_sequences, generate_log
from blossomrec_hf.index import ItemIndex
from blossomrec_hf.loss_blossomrec import NUM_SPECIAL_IDS, next_item_targets, sampled_loss
from blossomrec_hf.training.histories import budget_batches


CLUSTER = 500


class TasteLog:
    """Batches of histories over `num_items` items; see the top of this file."""

    def __init__(self, num_items: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.num_items, self.num_clusters = num_items, -(-num_items // CLUSTER)
        self.cluster_share = np.cumsum(1 / np.arange(1, CLUSTER + 1))
        # Item i has rank i // clusters in cluster i % clusters: the first ids are the most popular ones everywhere.
        self.share = np.cumsum(1 / (1 + np.arange(num_items) // self.num_clusters))

    def draw(self, histories: int, length: int) -> np.ndarray:
        """int64 `[histories, length]` of vocabulary ids."""
        taste = self.rng.integers(self.num_clusters, size=(histories, 3))
        cluster = np.take_along_axis(taste, self.rng.integers(3, size=(histories, length)), 1)
        rank = np.searchsorted(self.cluster_share, self.rng.random((histories, length)) * self.cluster_share[-1])
        items = np.minimum(rank * self.num_clusters + cluster, self.num_items - 1)
        other = np.searchsorted(self.share, self.rng.random((histories, length)) * self.share[-1])
        return np.where(self.rng.random((histories, length)) < 0.8, items, np.minimum(other, self.num_items - 1)) + 2


def train_large(args: argparse.Namespace) -> BlossomRecForSequentialRecommendation:
    """
    The model of the catalogue, trained now or taken from `--folder`. A step reads and moves the rows of the embedding
    that its histories hold and no others (Adam with moments that stand still meanwhile), so that its cost does not grow
    with the catalogue.
    """
    folder = args.folder / f"catalogue-{args.items}-{args.steps}"
    if (folder / "config.json").exists():
        return BlossomRecForSequentialRecommendation.from_pretrained(folder).to(args.device).eval()
    torch.manual_seed(0)
    config = BlossomRecConfig(vocab_size=args.items + 2, num_hidden_layers=1, hidden_dropout_prob=0.1)
    model = BlossomRecForSequentialRecommendation(config).to(args.device).train()
    log, length = TasteLog(args.items), 64
    counts = torch.from_numpy(np.diff(log.share, prepend=0.0) / log.share[-1]).mul(1e9).long()
    model.item_counts[NUM_SPECIAL_IDS:] = counts
    table = model.lm_head.weight.data
    first, second = torch.zeros_like(table), torch.zeros_like(table)
    others = [p for p in model.parameters() if p is not model.lm_head.weight]
    optimizer = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0)
    offsets = torch.arange(0, args.step_tokens + 1, length, device=args.device)
    losses, started = [], time.perf_counter()
    for _ in tqdm(range(args.steps), desc="Training", disable=None):
        ids = torch.from_numpy(log.draw(args.step_tokens // length, length)).to(args.device)
        items, place = ids.unique(return_inverse=True)
        rows = table[items].requires_grad_()
        hidden = model.model(inputs_embeds=rows[place]).last_hidden_state.flatten(0, 1)
        loss = sampled_loss(
            "sampled_softmax",
            hidden,
            torch.cat([rows.new_zeros(NUM_SPECIAL_IDS, rows.shape[1]), rows]),
            next_item_targets(place.flatten() + NUM_SPECIAL_IDS, offsets),
            item_counts=model.item_counts[torch.cat([items.new_zeros(NUM_SPECIAL_IDS), items])],
            num_negatives=1024,
            negative_sampling="in_batch",
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first[items] = first[items].mul(0.9).add(rows.grad, alpha=0.1)
        second[items] = second[items].mul(0.98).add(rows.grad**2, alpha=0.02)
        table[items] -= args.learning_rate * first[items] / (second[items].sqrt() + 1e-8)
        losses.append(loss.item())
    edge = max(1, args.steps // 20)
    moved = int((second.sum(1) > 0).sum())
    print(
        f"trained {args.steps} steps of {args.step_tokens} events in {time.perf_counter() - started:.0f} s, {moved} items "
        f"moved; loss {statistics.mean(losses[:edge]):.3f} to {statistics.mean(losses[-edge:]):.3f}",
        flush=True,
    )
    model.save_pretrained(folder)
    return model.eval()


def catalogue(args: argparse.Namespace) -> list[dict]:
    """One user at a time: exact, and by the index with its recall for several numbers of probes."""
    model = train_large(args)
    log, figures = TasteLog(args.items, seed=1), []
    users = [torch.from_numpy(row)[None].to(args.device) for row in log.draw(args.users, 64)]

    def ask(name: str, **settings) -> list[set[int]]:
        found, times = [], []
        for user in users[:3]:
            model.recommend(user, **settings)
        for user in tqdm(users, desc=name, disable=None):
            started = time.perf_counter()
            found.append(set(model.recommend(user, **settings).item_ids[0].tolist()))
            times.append((time.perf_counter() - started) * 1e3)
        figure = {"what": name, "p50_ms": np.median(times), "p99_ms": np.percentile(times, 99)}
        figures.append({key: round(float(x), 2) if key != "what" else x for key, x in figure.items()})
        return found

    exact = ask("exact")
    started = time.perf_counter()
    index = ItemIndex.build(model)
    print(f"index built in {time.perf_counter() - started:.0f} s, {index.index.nlist} lists", flush=True)
    for index.probes in args.probes:
        found = ask(f"index, {index.probes} probes", index=index)
        recall = np.mean([len(mine & best) / len(best) for mine, best in zip(found, exact)])
        figures[-1]["recall@10"] = round(float(recall), 4)
    return figures


def users(args: argparse.Namespace) -> list[dict]:
    """Users a second of `recommend` over histories of a log."""
    dataset, tokenizer = build_sequences(args.data) if args.data else build_sequences(generate_log())
    own = [np.asarray(row, np.int64) for row in dataset["input_ids"][:]]
    figures = []
    for length in args.lengths:
        histories = [row[-length:] for row in own]
        if max(map(len, histories)) < length:  # no such users: their histories end to end, cut
            items = np.concatenate(own)
            histories = [items[i : i + length] for i in range(0, len(items) - length + 1, length)]
        histories = [torch.from_numpy(row) for row in sorted(histories, key=len, reverse=True)]
        for name, attention_type, padded in (
            ("blossom", "blossom", False),
            ("full attention, packed", "full", False),
            ("full attention, padded", "full", True),
        ):
            # Padding costs what items cost, wherever it is computed: rows repeat their items up to the length.
            rows = [row.repeat(-(-length // len(row)))[:length] for row in histories] if padded else histories
            torch.manual_seed(0)
            config = BlossomRecConfig(
                vocab_size=len(tokenizer),
                attention_types=attention_type,
                num_key_value_heads=8 if attention_type == "full" else 2,
            )
            model = BlossomRecForSequentialRecommendation(config).to(args.device).eval()
            batches = budget_batches(np.array([len(row) for row in rows]), args.max_tokens)
            seconds = []
            for run in range(args.repeats + 1):
                started = time.perf_counter()
                with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                    for part in batches:
                        model.recommend(rows[part]).item_ids.cpu()
                seconds.append(time.perf_counter() - started)
            figure = {"what": name, "length": length, "users": len(rows)}
            figures.append(figure | {"users_per_s": round(len(rows) / statistics.median(seconds[1:]), 1)})
            print(json.dumps(figures[-1]), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="catalogue,users", help="of catalogue, users")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument(
        "--folder", type=Path, default=Path("benchmark_data"), help="catalogue: keeps the trained model"
    )
    parser.add_argument("--items", type=int, default=1_000_000, help="catalogue: how many")
    parser.add_argument("--steps", type=int, default=300, help="catalogue: of training")
    parser.add_argument("--step_tokens", type=int, default=16384, help="catalogue: events a step, a multiple of 64")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="catalogue: of the embedding")
    parser.add_argument("--users", type=int, default=200, help="catalogue: users asked for")
    parser.add_argument("--probes", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="catalogue: lists read")
    parser.add_argument("--data", help="users: a log, such as ml-1m/interactions.txt; the built-in one if left out")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 8192], help="users: of histories")
    parser.add_argument("--max_tokens", type=int, default=65536, help="users: items a batch")
    parser.add_argument("--repeats", type=int, default=3, help="users: runs over all, after one to warm up")
    args = parser.parse_args()
    sections = {"catalogue": catalogue, "users": users}
    if unknown := set(args.what.split(",")) - set(sections):
        parser.error(f"--what has {', '.join(unknown)}; it may name {', '.join(sections)}")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    figures = {name: sections[name](args) for name in args.what.split(",")}
    print(json.dumps({"machine": machine, "torch": torch.__version__, **figures}, indent=1))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "torch": torch.__version__, **figures}, indent=1))


if __name__ == "__main__":
    main()
