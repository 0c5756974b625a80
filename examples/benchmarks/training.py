"""
Times what a training run spends its time on, beside the obvious way to do it, in one run on one machine.

    python examples/benchmarks/training.py                                      # a GPU: 1,000,000 items
    python examples/benchmarks/training.py --items 100_000 --device cpu
    python examples/benchmarks/training.py --what padding --data ml-1m/interactions.txt --max_length 1000
    python examples/benchmarks/training.py --what epoch --data ml-1m/interactions.txt --tokens 65536 --bf16

`cross_entropy`: forward and backward of the full softmax, `plain` (all logits at once), `torch` (in chunks), `triton` (our
fused kernels, which never write the logits) and `liger` (fused chunks, on a GPU with liger-kernel). Prints median seconds, peak MiB above what lies in memory before (the
gradients included), and the largest differences from the same in float64, made in chunks: of the loss, and of the
gradients relative to the largest gradient.

`padding`: a share of an epoch, once with histories packed end to end and once with every history filled up to
`max_length`, positions that are computed like any other and only left out of the loss, as most recommenders do it. Both
take the same histories in the same steps, of about `--tokens` items.

`epoch`: whole epochs of forward, backward and AdamW over packed batches of `--tokens` tokens, by BlossomRec and by full
attention (with as many key/value heads as heads), once with the batches ready in memory and once as a `HistoryDataLoader`
with `--workers` gives them. Of the epochs of each kind, the first two are not counted. On a GPU, forward and
backward are compiled and replayed as a CUDA graph, as in a long run of the training loop (`--no_compile`; `--no_graphs`:
neither, launched operation by operation).
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.batches import HistoryDataLoader, HistoryStore, HistoryWindows, PaddingCollator, TokenBudgetSampler
from blossomrec_hf.data import build_sequences, generate_log, split
from blossomrec_hf.model import loss_blossomrec
from blossomrec_hf.model.ids_blossomrec import IGNORE_INDEX
from blossomrec_hf.model.loss_blossomrec import cross_entropy
from blossomrec_hf.training.graphs import GraphedPass
from blossomrec_hf.utils.command_line import HelpFormatter


class PeakMemory:
    """The peak of the memory in use inside `with`, above what is in use before: of the GPU, or of this process."""

    def __init__(self, device: str):
        self.device = device

    def __enter__(self) -> "PeakMemory":
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel starts a new peak (Linux)
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else self._resident("VmHWM")
        self.mib = (peak - self.before) / 2**20

    @staticmethod
    def _resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def timed(run: Callable[[], object], device: str, seconds: float) -> float:
    """Median seconds of `run`, over at least three runs after a first one."""
    times: list[float] = []
    run()
    deadline = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < deadline:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def compare_cross_entropy(args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    hidden = torch.randn(args.positions, args.width, device=args.device)
    weight = torch.randn(args.items + 2, args.width, device=args.device) * args.width**-0.5
    targets = torch.randint(2, args.items + 2, (args.positions,), device=args.device)
    targets[:: args.positions // 100 or 1] = -100
    limits = dict(loss_blossomrec.MAX_LOGITS)

    def step(implementation: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        loss_blossomrec.MAX_LOGITS[args.device] = 2**62 if implementation == "plain" else limits[args.device]
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
        autocast = (
            torch.autocast(args.device, torch.bfloat16) if args.bf16 and dtype == torch.float32 else nullcontext()
        )
        with autocast:
            loss = cross_entropy(
                *inputs, targets, implementation="torch" if implementation == "plain" else implementation
            )
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    exact = step("torch", torch.float64)
    figures = []
    for implementation in args.implementations:
        figure: dict = {"what": "cross_entropy", "implementation": implementation}
        try:
            with PeakMemory(args.device) as memory:
                result = step(implementation)
            differences = [float((ours - theirs).abs().max()) for ours, theirs in zip(result, exact)]
            largest = max(float(gradient.abs().max()) for gradient in exact[1:])
            del result
            figure |= {"seconds": timed(lambda: step(implementation), args.device, args.seconds)}
            figure |= {"peak_MiB": round(memory.mib), "loss_difference": differences[0]}
            figure |= {
                "gradient_difference": max(differences[1:]),
                "relative_gradient_difference": max(differences[1:]) / largest,
            }
        except torch.OutOfMemoryError:
            figure |= {"seconds": None, "peak_MiB": None, "error": "out of memory"}
        except ValueError as error:
            figure |= {"seconds": None, "peak_MiB": None, "error": str(error)}
        if args.device == "cuda":
            torch.cuda.empty_cache()
        figures.append(figure)
    return figures


def compare_padding(args: argparse.Namespace) -> list[dict]:
    dataset, tokenizer = build_sequences(generate_log() if args.data is None else args.data)
    view = split(dataset, "train", max_length=args.max_length)
    store = HistoryStore.from_rows(view).to(args.device)
    steps = list(TokenBudgetSampler(store.lengths, args.tokens, seed=0))[: args.steps]
    config = BlossomRecConfig(vocab_size=len(tokenizer), attention_types=args.attention_types)
    model = BlossomRecForSequentialRecommendation(config).to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    collate = PaddingCollator(args.max_length)

    def padded_batch(rows: list[int]) -> dict[str, torch.Tensor]:
        batch = collate([*(view[row] for row in rows), {"input_ids": np.zeros(args.max_length, np.int64)}])
        # The added row made the batch as wide as `max_length`; a mask of ones has the padding computed as well.
        batch = {name: tensor[:-1].to(args.device) for name, tensor in batch.items()}
        return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}

    figures = []
    for kind in ("packed", "padded"):
        pack = (lambda rows: store.pack(rows, labels=True)) if kind == "packed" else padded_batch
        batches = [pack(rows) for rows in steps]

        def epoch() -> None:
            for batch, rows in zip(batches, steps):
                autocast = torch.autocast(args.device, torch.bfloat16) if args.bf16 else nullcontext()
                with autocast:
                    loss = model(**batch, num_items_in_batch=int(store.num_targets[rows].sum())).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        with PeakMemory(args.device) as memory:
            seconds = timed(epoch, args.device, args.seconds)
        items = sum(int(store.lengths[rows].sum()) for rows in steps)
        figures.append(
            {
                "what": "padding",
                "kind": kind,
                "seconds": seconds,
                "peak_MiB": round(memory.mib),
                "steps": len(steps),
                "positions": sum(batch["input_ids"].numel() for batch in batches),
                "share_of_epoch": round(items / int(store.lengths.sum()), 4),
                "seconds_an_epoch": seconds * int(store.lengths.sum()) / items,
            }
        )
    figures[1]["times_slower"] = figures[1]["seconds"] / figures[0]["seconds"]
    return figures


def compare_epochs(args: argparse.Namespace) -> list[dict]:
    dataset, tokenizer = build_sequences(generate_log() if args.data is None else args.data)
    on_gpu = args.device == "cuda"
    windows = HistoryWindows(dataset, args.max_length)
    loader = HistoryDataLoader(windows, max_tokens=args.tokens, num_workers=args.workers, pin_memory=on_gpu)
    ready, figures = list(loader), []
    for attention_types, num_key_value_heads in (("blossom", 2), ("full", 8)):
        config = BlossomRecConfig(
            vocab_size=len(tokenizer), attention_types=attention_types, num_key_value_heads=num_key_value_heads
        )
        model = BlossomRecForSequentialRecommendation(config).to(args.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        # Batches that are captured have one shape.
        compiled = torch.compile(model, dynamic=False) if on_gpu and args.graphs and args.compile else model

        def forward_backward(batch: dict) -> torch.Tensor:
            with torch.autocast(args.device, torch.bfloat16) if args.bf16 else nullcontext():
                loss = compiled(**batch).loss
            loss.backward()
            return loss.detach()

        sizes = {"max_tokens": args.tokens, "max_length": int(windows.lengths.max())}
        graphed = GraphedPass(forward_backward, list(model.parameters()), **sizes) if on_gpu and args.graphs else None

        def epoch(batches: Iterable[dict]) -> float:
            started = time.perf_counter()
            for batch in batches:
                num_targets = int((batch["labels"] != IGNORE_INDEX).sum())
                batch = {
                    k: v.to(args.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()
                }
                if graphed is None:
                    forward_backward(batch | {"num_items_in_batch": num_targets})
                else:
                    graphed(batch, num_targets)
                optimizer.step()
                optimizer.zero_grad()
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - started

        seconds: dict[str, list[float]] = {"ready": [], "loader": []}
        # One kind after the other: between two of its epochs a loader would work ahead in the other kind's time.
        for kind, batches in (("ready", ready), ("loader", loader)):
            for number in range(args.epochs + 2):
                loader.set_epoch(number)
                seconds[kind].append(epoch(batches))
        medians = {kind: statistics.median(times[2:]) for kind, times in seconds.items()}
        figure = {
            "what": "epoch",
            "attention_types": attention_types,
            "steps": len(ready),
            "graphs": graphed is not None and graphed.works,
            "compiled": compiled is not model,
            "seconds": medians["ready"],
        }
        figures.append(
            figure | {"with_loader": medians["loader"], "loader_costs": medians["loader"] / medians["ready"] - 1}
        )
    figures[0]["to_full"] = figures[0]["seconds"] / figures[1]["seconds"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--what", choices=("cross_entropy", "padding", "epoch"), default="cross_entropy")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="under bf16 autocast")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each figure, at least")
    parser.add_argument("--items", type=int, default=1_000_000, help="cross_entropy: the catalog")
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--implementations", nargs="+", default=["plain", "torch", "triton", "liger"])
    parser.add_argument("--data", help="padding, epoch: a log; by default, the built-in data set")
    parser.add_argument("--workers", type=int, default=2, help="epoch: processes that make batches")
    parser.add_argument("--no_compile", dest="compile", action="store_false", help="epoch: no torch.compile")
    parser.add_argument("--no_graphs", dest="graphs", action="store_false", help="epoch: no CUDA graphs")
    parser.add_argument("--epochs", type=int, default=8, help="epoch: how many of each kind are timed")
    parser.add_argument("--max_length", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=4096, help="items a step")
    parser.add_argument("--steps", type=int, default=4, help="at most so many steps of an epoch")
    parser.add_argument("--attention_types", default="blossom")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if unknown := set(args.implementations) - {"plain", "torch", "triton", "liger"}:
        parser.error(f"--implementations has {', '.join(unknown)}; it may name plain, torch, triton, liger")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    print(f"{machine}; {versions}; {'bf16 autocast' if args.bf16 else 'float32'}")
    compare = {"cross_entropy": compare_cross_entropy, "padding": compare_padding, "epoch": compare_epochs}
    figures = compare[args.what](args)
    for figure in figures:
        print(json.dumps(figure))
    if args.json is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"machine": machine, **versions, **settings, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
