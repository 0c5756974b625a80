"""
Time the operations of a recommendation service, in one run on one machine.

    python examples/benchmarks/serving.py --sections cache                       # two cores: a history of 4,096 events
    python examples/benchmarks/serving.py --sections cache --device cuda --batch 256    # a GPU: 256 such histories
    python examples/benchmarks/serving.py --sections catalog                     # a million items
    python examples/benchmarks/serving.py --sections users --data ml-1m/interactions.txt

**cache**: the cost of a click. Times are per batch: p50 and p99 over `--seconds` of runs, at least 20. `times` is the speedup
over `recompute`. Weights are random, because the time does not depend on them.

- `append`: append one event to each history in a `BlossomRecCache` and compute the logits over the catalog. The cache is
  cropped between runs. One append in `selection_block_size` completes a block.
- `recompute`: compute the same logits from the whole histories, packed, without a cache.
- `prefill`: write the whole histories to a new cache.

**catalog** trains a model on a generated log, stores it in `--folder` for later runs, and recommends ten items of the whole
catalog to one user at a time in inference mode: exactly, and with an `ItemIndex`, whose recall@10 of the exact ten is listed.
In the log, items belong to clusters of 100. The popularity in a cluster is rank^-0.5. Each user has one cluster; four of
five events are items of it, the fifth is drawn from the whole catalog by popularity. The loss is the sampled softmax. The
output lists the loss of the first and the last steps, and the share of recommended items from the user's cluster, which is
close to 0 for recommendations by popularity.

**users** runs `recommend` with scores of the whole catalog over the users of a log, at most `--lengths` latest items each,
sorted by length, in batches of `--max_tokens`, under bfloat16 autocast on a GPU. If no history is that long, all histories
are concatenated and cut. Three models are compared: BlossomRec, full attention with a key/value head per query head, and
the same on rows padded to the length. They alternate after one warm-up run each; users per second are those of the median
run.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

from blossomrec_hf import BlossomRecCache, BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.batches import budget_batches
from blossomrec_hf.data import build_sequences, generate_log
from blossomrec_hf.model.ids_blossomrec import NUM_SPECIAL_IDS
from blossomrec_hf.serving.index import ItemIndex
from blossomrec_hf.utils.command_line import HelpFormatter


Figure = dict[str, object]

CACHE_ITEMS, CATALOG_ITEMS = 3416, 1_000_000


def timed(run: Callable[[int], object], device: str, seconds: float, at_least: int = 20) -> dict[str, float]:
    """Time `run(number of the run)`: p50 and p99 in milliseconds, and the number of runs."""
    for i in range(3):
        run(i)
    times, deadline = [], time.perf_counter() + seconds
    while len(times) < at_least or time.perf_counter() < deadline:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run(len(times))
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return {"p50_ms": float(np.median(times)), "p99_ms": float(np.percentile(times, 99)), "runs": len(times)}


@torch.inference_mode()
def cached_append(args: argparse.Namespace) -> list[Figure]:
    """Append to the cache, compared with computing the whole histories again."""
    figures, num_items = [], args.items or CACHE_ITEMS
    for attention_type in args.attention_types.split(","):
        torch.manual_seed(0)
        config = BlossomRecConfig(vocab_size=num_items + 2, attention_types=attention_type)
        model = BlossomRecForSequentialRecommendation(config).to(args.device, args.dtype).eval()
        shape = (args.batch, args.history + 1)
        ids = torch.randint(2, num_items + 2, shape, device=args.device)
        cache = BlossomRecCache(config)
        # In parts, so that the hidden states fit in memory.
        for part in ids[:, :-1].split(max(1, 2**20 // args.batch), 1):
            model(part, cache=cache, logits_to_keep=1)
        events = ids[:, -1:]
        packed = {
            "input_ids": ids.view(1, -1),
            "cu_seq_lens_q": torch.arange(0, ids.numel() + 1, shape[1], device=args.device),
            "max_length_q": shape[1],
            "logits_to_keep": 1,
        }

        # Lengths around `--history`: an append in `selection_block_size` completes a block.
        def append(i: int) -> torch.Tensor:
            cache.crop(args.history - i % config.selection_block_size)
            return model(events, cache=cache, logits_to_keep=1).logits

        cache.crop(args.history)
        appended = model(events, cache=cache, logits_to_keep=1).logits
        difference = float((appended - model(**packed).logits).abs().max())
        measured = {
            "append": timed(append, args.device, args.seconds),
            "recompute": timed(lambda i: model(**packed).logits, args.device, args.seconds, 10),
            "prefill": timed(lambda i: model(**packed, use_cache=True).logits, args.device, args.seconds, 5),
        }
        base = measured["recompute"]["p50_ms"]
        for what, times in measured.items():
            figure = {"what": f"{what}, {attention_type}", **times, "times": base / times["p50_ms"]}
            figures.append(figure | {"batch": args.batch, "history": args.history, "mib": cache.nbytes / 2**20})
        print(
            f"{attention_type}: largest difference of a logit between append and recompute {difference:.1e}",
            flush=True,
        )
    return figures


CLUSTER = 100


class TasteLog:
    """Batches of histories over `num_items` items; see the top of this file."""

    def __init__(self, num_items: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.num_clusters = max(1, num_items // CLUSTER)  # remaining items belong to no cluster
        self.cluster_share = np.cumsum(np.arange(1, min(CLUSTER, num_items) + 1) ** -0.5)
        # Item i has rank i // clusters in cluster i % clusters: the first ids are the most popular ones everywhere.
        self.share = np.cumsum((1 + np.arange(num_items) // self.num_clusters) ** -0.5)

    def draw(self, histories: int, length: int) -> np.ndarray:
        """int64 `[histories, length]` of vocabulary ids."""
        cluster = self.rng.integers(self.num_clusters, size=(histories, 1))
        rank = np.searchsorted(self.cluster_share, self.rng.random((histories, length)) * self.cluster_share[-1])
        own = rank * self.num_clusters + cluster
        other = np.searchsorted(self.share, self.rng.random((histories, length)) * self.share[-1])
        return np.where(self.rng.random((histories, length)) < 0.8, own, other) + NUM_SPECIAL_IDS

    def clusters(self, items: torch.Tensor) -> torch.Tensor:
        """The cluster of each of `items`, vocabulary ids."""
        return (items - NUM_SPECIAL_IDS) % self.num_clusters


def train_large(args: argparse.Namespace) -> BlossomRecForSequentialRecommendation:
    """The model of the catalog, loaded from `--folder` or trained (on a GPU if there is one)."""
    num_items = args.items or CATALOG_ITEMS
    folder = args.folder / f"catalog-{num_items}-{CLUSTER}-{args.steps}-{args.step_tokens}-{args.learning_rate:g}"
    if (folder / "config.json").exists():
        return BlossomRecForSequentialRecommendation.from_pretrained(folder).to(args.device).eval()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = BlossomRecConfig(
        vocab_size=num_items + 2,
        num_hidden_layers=1,
        hidden_dropout_prob=0.1,
        objective="sampled_softmax",
        num_negatives=min(1024, num_items),
    )
    model = BlossomRecForSequentialRecommendation(config).to(device).train()
    log, length = TasteLog(num_items), 64
    counts = torch.from_numpy(np.diff(log.share, prepend=0.0) / log.share[-1]).mul(1e9).long()
    model.item_counts[NUM_SPECIAL_IDS:] = counts
    table = model.item_vectors()
    others = [p for p in model.parameters() if p is not table]
    groups = [{"params": [table], "lr": args.learning_rate}, {"params": others, "lr": args.learning_rate / 3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 50, args.steps)
    offsets = torch.arange(0, args.step_tokens + 1, length, device=device)
    losses, started = [], time.perf_counter()
    for _ in tqdm(range(args.steps), desc="Training", disable=None):
        ids = torch.from_numpy(log.draw(args.step_tokens // length, length)).view(1, -1).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(ids, labels=ids, cu_seq_lens_q=offsets, max_length_q=length).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.detach())
    edge = max(1, args.steps // 20)
    first, last = (float(torch.stack(part).mean()) for part in (losses[:edge], losses[-edge:]))
    print(
        f"trained {args.steps} steps of {args.step_tokens} events in {time.perf_counter() - started:.0f} s; loss "
        f"{first:.3f} to {last:.3f}",
        flush=True,
    )
    model.save_pretrained(folder)
    return model.to(args.device).eval()


def catalog(args: argparse.Namespace) -> list[Figure]:
    """One user at a time: exactly, and with the index and its recall for several numbers of probes."""
    model = train_large(args)
    log, figures = TasteLog(model.config.num_items, seed=1), []
    users = [torch.from_numpy(row)[None].to(args.device) for row in log.draw(args.users, 64)]

    @torch.inference_mode()
    def ask(name: str, **settings) -> list[set[int]]:
        found, times = [], []
        for user in users[:3]:
            model.recommend(user, **settings)
        for user in tqdm(users, desc=name, disable=None):
            started = time.perf_counter()
            found.append(set(model.recommend(user, **settings).item_ids[0].tolist()))
            times.append((time.perf_counter() - started) * 1e3)
        p50, p99 = np.percentile(times, [50, 99]).tolist()
        figures.append({"what": name, "p50_ms": p50, "p99_ms": p99})
        return found

    exact = ask("exact")
    taste = [int(log.clusters(user[0]).mode().values) for user in users]
    own = [cluster == mine for best, mine in zip(exact, taste) for cluster in log.clusters(torch.tensor([*best]))]
    print(f"{np.mean(own):.0%} of the recommended items are from the user's cluster", flush=True)
    started = time.perf_counter()
    index = ItemIndex.build(model)
    print(f"index built in {time.perf_counter() - started:.0f} s, {index.index.nlist} lists", flush=True)
    for index.probes in args.probes:
        found = ask(f"index, {index.probes} probes", index=index)
        recall = np.mean([len(mine & best) / len(best) for mine, best in zip(found, exact)])
        figures[-1]["recall@10"] = float(recall)
    return figures


def users(args: argparse.Namespace) -> list[Figure]:
    """Users per second of `recommend` over the histories of a log."""
    dataset, tokenizer = build_sequences(args.data) if args.data else build_sequences(generate_log())
    own = [np.asarray(row, np.int64) for row in dataset["input_ids"][:]]
    items = np.concatenate(own)
    models = {}
    for attention_type, groups in (("blossom", 2), ("full", 8)):
        torch.manual_seed(0)
        kind = {"attention_types": attention_type, "num_key_value_heads": groups}
        config = BlossomRecConfig(vocab_size=len(tokenizer), **kind)
        models[attention_type] = BlossomRecForSequentialRecommendation(config).to(args.device).eval()

    figures = []
    for length in args.lengths:
        histories = [row[-length:] for row in own]
        if max(map(len, histories)) < length:  # no such history: concatenate and cut all histories
            histories = [items[i : i + length] for i in range(0, len(items) - length + 1, length)]
        if not histories:
            raise SystemExit(f"--lengths has {length}; the log has {len(items)} events in all.")
        histories = [torch.from_numpy(row) for row in sorted(histories, key=len, reverse=True)]
        # Padding costs as much as items, so rows repeat their items up to the length.
        filled = [row.repeat(-(-length // len(row)))[:length] for row in histories]
        contestants = {
            "blossom": (models["blossom"], histories),
            "full attention, packed": (models["full"], histories),
            "full attention, padded": (models["full"], filled),
        }
        seconds = {name: [] for name in contestants}
        turns = [name for _ in range(args.repeats + 1) for name in contestants]
        for name in tqdm(turns, desc=f"{length} items", disable=None):
            model, rows = contestants[name]
            batches = budget_batches(np.array([len(row) for row in rows]), args.max_tokens)
            started = time.perf_counter()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                for part in batches:
                    model.recommend(rows[part]).item_ids.cpu()
            seconds[name].append(time.perf_counter() - started)
        speed = {name: len(histories) / statistics.median(times[1:]) for name, times in seconds.items()}
        for name in contestants:
            figures.append({"what": name, "length": length, "users": len(histories), "users_per_s": speed[name]})
        blossom, packed, padded = speed.values()
        figures[-3] |= {"blossom/packed": blossom / packed, "blossom/padded": blossom / padded}
    return figures


# Names of `--sections`.
SECTIONS: dict[str, Callable[[argparse.Namespace], list[Figure]]] = {
    "cache": cached_append,
    "catalog": catalog,
    "users": users,
}


def print_table(name: str, figures: list[Figure]) -> None:
    """Print one line per figure. Columns that a figure lacks are empty."""
    columns = list(dict.fromkeys(key for figure in figures for key in figure if key != "what"))
    print(f"\n{name:26}" + "".join(f"{column:>16}" for column in columns))
    for figure in figures:
        cells = [figure.get(column, "") for column in columns]
        cells = [f"{cell:,.3f}" if isinstance(cell, float) else f"{cell}" for cell in cells]
        print(f"{figure['what']:26}" + "".join(f"{cell:>16}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--sections", default=",".join(SECTIONS), help="sections to run, separated by commas")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--json", type=Path, help="JSON file to write the figures to")
    add(
        "--items", type=int, help=f"cache, catalog: number of items; by default, {CACHE_ITEMS:,} and {CATALOG_ITEMS:,}"
    )
    add("--dtype", default="float32", help="cache: dtype of the weights")
    add("--batch", type=int, default=1, help="cache: number of histories that are appended to at once")
    add("--history", type=int, default=4096, help="cache: number of events in each history")
    add(
        "--attention_types",
        default="blossom",
        help="cache: blossom, long_term, short_term or full, separated by commas",
    )
    add("--seconds", type=float, default=5.0, help="cache: duration of each measurement")
    add("--folder", type=Path, default=Path("benchmark_data"), help="catalog: folder of the trained model")
    add("--steps", type=int, default=1500, help="catalog: number of training steps")
    add("--step_tokens", type=int, default=65536, help="catalog: events per training step, a multiple of 64")
    add(
        "--learning_rate",
        type=float,
        default=3e-3,
        help="catalog: learning rate of the item embedding; a third of it for other weights",
    )
    add("--users", type=int, default=200, help="catalog: number of users")
    add("--probes", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="catalog: numbers of probed lists")
    add("--data", help="users: a log, such as ml-1m/interactions.txt; by default, the built-in data set")
    add("--lengths", type=int, nargs="+", default=[1000, 8192], help="users: lengths of histories")
    add("--max_tokens", type=int, default=262_144, help="users: maximum number of items per batch")
    add("--repeats", type=int, default=3, help="users: number of runs, after one to warm up")
    args = parser.parse_args()
    names = args.sections.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--sections has {', '.join(unknown)}; it must be of {', '.join(SECTIONS)}")
    args.dtype = getattr(torch, args.dtype)

    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    versions = {x.__name__: x.__version__ for x in (torch, transformers)} | {"python": platform.python_version()}
    print(f"{machine}; {versions}", flush=True)
    figures = {name: SECTIONS[name](args) for name in names}
    for name in names:
        print_table(name, figures[name])
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        results = {"machine": machine, **versions, "settings": settings}
        results["figures"] = [{"section": name, **figure} for name in names for figure in figures[name]]
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
