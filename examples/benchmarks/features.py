"""
Time what times, event types and item features cost: a training step and an append of one event, with each set of features and
without, alternated in one process on the same histories.

    python examples/benchmarks/features.py                                      # a GPU: compiled and captured, bf16
    python examples/benchmarks/features.py --device cpu --tokens 4096 --rounds 20

Histories, times and features are random; their values do not change the work. The lengths of histories are about those of
MovieLens-1M: log-normal with a median of 96 items, at most `--max_length`. Item features are a category with 1 to 3 of 18 values per
item and a vector of 256 numbers. A step is the forward and backward pass over `--tokens` items, clipping and AdamW. Ratios are
medians over the rounds.
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

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.model.features_blossomrec import ItemFeatures
from blossomrec_hf.training.graphs import GraphedPass
from blossomrec_hf.utils.command_line import HelpFormatter


TIMES = ["previous_gap", "next_gap", "next_gap_input", "hour", "weekday"]
TYPES = ["view", "buy"]
FEATURES = {
    "none": {},
    "next gap, last hidden state": {"time_features": ["next_gap"]},
    "next gap, input": {"time_features": ["next_gap_input"]},
    "five time features": {"time_features": TIMES},
    "item features": {"item_features": True},
    "all, and event types": {"time_features": TIMES, "event_types": TYPES, "item_features": True},
}


def make_items(items: int, generator: np.random.Generator) -> ItemFeatures:
    """The features of all items; see the top of this file."""
    genres = [[f"g{g}" for g in generator.choice(18, generator.integers(1, 4), replace=False)] for _ in range(items)]
    return ItemFeatures.from_columns({"genres": genres, "title": generator.standard_normal((items, 256))})


def make_histories(args: argparse.Namespace, generator: np.random.Generator) -> dict[str, torch.Tensor | int]:
    """Packed histories of `args.tokens` items in all, with every column."""
    lengths: list[int] = []
    while sum(lengths) < args.tokens:
        length = int(np.clip(np.exp(generator.normal(np.log(96), 1)), 2, args.max_length))
        lengths.append(min(length, args.tokens - sum(lengths)))
    offsets = np.append(0, np.cumsum(lengths))
    ids = generator.integers(2, args.items + 2, args.tokens)
    times = 1_000_000_000 + np.cumsum(generator.integers(1, 10_000, args.tokens))
    types = generator.integers(0, len(TYPES), args.tokens)
    columns = {"input_ids": ids, "labels": ids, "timestamps": times, "event_type_ids": types}
    batch = {name: torch.as_tensor(column, device=args.device)[None] for name, column in columns.items()}
    cu_seqlens = torch.as_tensor(offsets, dtype=torch.int32, device=args.device)
    packing = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    return batch | packing | {"max_length_q": max(lengths), "max_length_k": max(lengths)}


def make_model(name: str, args: argparse.Namespace, features: ItemFeatures) -> BlossomRecForSequentialRecommendation:
    """A model that reads the set of features of that name in `FEATURES`."""
    torch.manual_seed(0)
    settings = dict(FEATURES[name])
    if "item_features" in settings:
        settings["item_features"] = features.config()
    config = BlossomRecConfig(
        vocab_size=args.items + 2, num_key_value_heads=args.num_key_value_heads, hidden_dropout_prob=0.1, **settings
    )
    model = BlossomRecForSequentialRecommendation(config)
    if "item_features" in settings:
        model.set_item_features(features)
    return model.to(args.device)


def only_read(batch: dict, model: BlossomRecForSequentialRecommendation) -> dict:
    """The batch without the columns that the model does not read."""
    unread = {"timestamps", "event_type_ids"} - set(model.config.event_columns)
    return {name: value for name, value in batch.items() if name not in unread}


def training_step(model: BlossomRecForSequentialRecommendation, batch: dict, args: argparse.Namespace) -> Callable:
    """A step of training on the batch: on a GPU compiled, in bf16 and captured as a CUDA graph."""
    model.train()
    on_gpu = args.device == "cuda"
    compiled = torch.compile(model, dynamic=False) if on_gpu else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=on_gpu)

    def forward_backward(arguments: dict) -> torch.Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=on_gpu):
            loss = compiled(**arguments).loss
        loss.backward()
        return loss.detach()

    run, targets = forward_backward, args.tokens - (batch["cu_seq_lens_q"].shape[0] - 1)
    if on_gpu:
        graphed = GraphedPass(forward_backward, parameters, max_tokens=args.tokens, max_length=args.max_length)

        def run(arguments: dict) -> torch.Tensor:
            return graphed(arguments, targets)

    def step() -> None:
        run(batch)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not on_gpu)

    return step


def append_step(model: BlossomRecForSequentialRecommendation, length: int) -> Callable:
    """Appends one event to a cached history of `length` events, which stays as it was."""
    model.eval()
    place = torch.arange(length, device=model.device)[None]
    ids = 2 + place % (model.config.vocab_size - 2)
    columns = {"input_ids": ids, "timestamps": 1_000_000_000 + 100 * place, "event_type_ids": place % 2}
    columns = only_read(columns, model)
    with torch.inference_mode():
        cache = model(**{name: x[:, :-1] for name, x in columns.items()}, use_cache=True).cache
    last = {name: x[:, -1:] for name, x in columns.items()}

    def append() -> None:
        with torch.inference_mode():
            model(**last, cache=cache, use_cache=False, logits_to_keep=1)

    return append


def alternate(runs: dict[str, Callable], rounds: int, repeats: int, on_gpu: bool) -> list[dict]:
    """Seconds of each run, and ratios to the first, as medians over rounds in which the runs take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):  # the first two are not counted
        for name, run in runs.items() if number % 2 else reversed(runs.items()):
            if on_gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(repeats):
                run()
            if on_gpu:
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - started) / repeats)
    first = seconds[next(iter(runs))][2:]
    return [
        {
            "features": name,
            "seconds": statistics.median(times[2:]),
            "ratio": statistics.median(a / b for a, b in zip(times[2:], first)),
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--items", type=int, default=3416)
    parser.add_argument("--tokens", type=int, default=65536, help="items of a training step")
    parser.add_argument("--max_length", type=int, default=1000)
    parser.add_argument("--num_key_value_heads", type=int, default=2)
    parser.add_argument("--append_to", type=int, default=200, help="length of the cached history")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=1, help="steps per round")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    features, batch = make_items(args.items, generator), make_histories(args, generator)
    models = {name: make_model(name, args, features) for name in FEATURES}
    on_gpu = args.device == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a CPU"
    print(f"{machine}; PyTorch {torch.__version__}, Python {platform.python_version()}")
    figures = {}
    for what, make in (
        ("append", lambda model: append_step(model, args.append_to)),
        ("training step", lambda model: training_step(model, only_read(batch, model), args)),
    ):
        runs = {name: make(model) for name, model in models.items()}
        figures[what] = alternate(runs, args.rounds, args.repeats, on_gpu)
        for figure in figures[what]:
            print(f"{what:13}  {figure['features']:27} {1e3 * figure['seconds']:9.2f} ms  {figure['ratio']:.3f}")
    if args.json is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        args.json.write_text(json.dumps({"machine": machine, **versions, **settings, **figures}, indent=1))


if __name__ == "__main__":
    main()
