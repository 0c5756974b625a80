"""
How training scales over processes: items per second, memory per process, and efficiency compared with one process that
does its share alone (weak scaling: every process gets `--tokens` items per step).

    for n in 1 2 4 8; do accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes $n \\
        examples/benchmarks/scaling.py --items 3416 100_000 --max_length 1024 4096 --results scaling.jsonl; done
    for n in 1 2 4 8; do accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes $n \\
        examples/benchmarks/scaling.py --items 5_000_000 20_000_000 --objective sampled_softmax --no_compile \\
        --results scaling.jsonl; done
    python examples/benchmarks/sizing.py --results scaling.jsonl

The loop of `blossomrec train` trains on histories of `--max_length` random items, without saving. On a GPU its steps
are compiled, as in a long run, and captured as CUDA graphs where the loop does so. Each combination of `--items` and
`--max_length` adds a line to `--results`; its efficiency is relative to the latest line of one process with the same
settings. `persistent_MiB` is the memory that PyTorch has allocated between two steps (weights, gradients that are
kept, optimizer state, item counts, histories, workspaces of cuBLAS), `peak_MiB` the most during a step, the one that
is captured included. Replayed graphs use memory that is reserved for them, which counts only while they are captured.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from sizing import read_reports

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.batches import HistoryStore
from blossomrec_hf.training import LoopArguments, TrainingLoop
from blossomrec_hf.training.loop import make_accelerator
from blossomrec_hf.utils.command_line import HelpFormatter, exit_on_error
from blossomrec_hf.utils.environment import check_processes, describe_environment


MODEL_SETTINGS = (
    "attention_types hidden_size num_hidden_layers num_attention_heads num_key_value_heads objective".split()
)
SETTINGS = ["items", "max_length", "tokens", *MODEL_SETTINGS, "num_negatives", "compile"]
BLOCKS = 5  # the median of which is reported


def make_histories(number: int, length: int, items: int, seed: int) -> HistoryStore:
    """Histories of one length; popular items are the first ones, as in a built vocabulary."""
    rng = np.random.default_rng(seed)
    drawn = np.exp(rng.random(number * length) * np.log(items)).astype(np.int32) + 1
    return HistoryStore(np.clip(drawn, 2, items + 1), np.arange(number + 1, dtype=np.int64) * length)


def memory(device: torch.device, *, peak: bool) -> float:
    """MiB in use by tensors on a GPU; by the process on a CPU (Linux)."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    field = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def free_memory(device: torch.device) -> None:
    """Frees what an earlier measurement has used, compiled code included."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # kept otherwise, for each stream and thread
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(args: argparse.Namespace, items: int, max_length: int, folder: str) -> dict:
    """The report of one combination. All processes return the same."""
    set_seed(0)
    accelerator = make_accelerator(LoopArguments(output_dir=folder))
    processes, device = accelerator.num_processes, accelerator.device
    check_processes(processes)
    free_memory(device)
    config = BlossomRecConfig(
        vocab_size=items + 2,
        intermediate_size=2 * args.hidden_size,
        **{name: getattr(args, name) for name in MODEL_SETTINGS},
        num_negatives=min(args.num_negatives, items),
    )
    with device:
        model = BlossomRecForSequentialRecommendation(config)
    histories = args.tokens // max_length * processes
    loop = TrainingLoop(
        model,
        make_histories(histories, max_length, items, seed=0),
        args=LoopArguments(
            output_dir=folder,
            max_length=max_length,
            tokens_per_step=args.tokens * processes,
            warmup_steps=0,
            torch_compile=args.compile and device.type == "cuda",
        ),
        accelerator=accelerator,
    )
    (rows,) = loop.plan.epoch_steps(0)

    def time_steps(number: int) -> float:
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        for _ in range(number):
            loop.training_step(rows)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / number

    warmup_seconds = time_steps(args.warmup) * args.warmup
    seconds = [time_steps(args.steps) for _ in range(BLOCKS)]
    here = torch.tensor(
        [statistics.median(seconds), memory(device, peak=False), memory(device, peak=True)],
        dtype=torch.float64,
        device=device if device.type == "cuda" else "cpu",
    )
    step_seconds, persistent, peak = accelerator.gather(here[None]).max(0).values.tolist()
    if args.profile:
        profile(time_steps, device, accelerator.is_main_process)
    return {
        "processes": processes,
        "kind": "sharded" if loop.update.sharded else "replicated",
        "execution": loop.update.execution,
        **{name: getattr(args, name) for name in SETTINGS},
        "items": items,
        "max_length": max_length,
        "weights": sum(parameter.numel() for parameter in loop.update.parameters),
        "items_per_second": round(histories * max_length / step_seconds),
        "step_ms": round(step_seconds * 1e3, 2),
        "persistent_MiB": round(persistent, 1),
        "peak_MiB": round(peak, 1),
        "warmup_seconds": round(warmup_seconds, 1),
        "mixed_precision": accelerator.mixed_precision,
        **describe_environment(),
    }


def profile(time_steps, device: torch.device, is_main_process: bool) -> None:
    """Prints the operations of three steps that take longest, on stderr."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as record:
        time_steps(3)
    if is_main_process:
        order = f"self_{device.type}_time_total"
        print(record.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60), file=sys.stderr)


@exit_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[100_000])
    parser.add_argument("--max_length", type=int, nargs="+", default=[4096])
    parser.add_argument("--tokens", type=int, default=65536, help="items per step and process")
    parser.add_argument("--objective", default="cross_entropy")
    parser.add_argument("--num_negatives", type=int, default=1024, help="of sampled objectives")
    parser.add_argument("--attention_types", default="blossom")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=2)
    parser.add_argument("--num_attention_heads", type=int, default=8)
    parser.add_argument("--num_key_value_heads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=20, help="steps of each of the five blocks that are timed")
    parser.add_argument("--no_compile", dest="compile", action="store_false", help="no torch.compile")
    parser.add_argument("--profile", action="store_true", help="also print which operations take longest")
    parser.add_argument("--results", type=Path, help="a file of JSON lines")
    args = parser.parse_args()
    for name in ("items", "max_length", "tokens", "warmup", "steps"):
        if np.min(getattr(args, name)) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be 1 or more")
    if args.tokens < max(args.max_length):
        parser.error(f"--tokens is {args.tokens}, less than one history of --max_length, {max(args.max_length)}")

    if args.results is not None:  # fails before the measurements if they cannot be added
        if not args.results.parent.is_dir():
            parser.error(f"--results is {args.results}, in a folder that does not exist")
        if args.results.exists():
            read_reports(args.results)

    with tempfile.TemporaryDirectory() as folder:
        for items, max_length in itertools.product(args.items, args.max_length):
            report = measure(args, items, max_length, folder)
            if PartialState().is_main_process:
                print(json.dumps(report | compare(report, args.results)), flush=True)
                if args.results is not None:
                    with args.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(report) + "\n")
    PartialState().destroy_process_group()


def compare(report: dict, results: Path | None) -> dict:
    """Efficiency and share of the memory against the latest run of one process with the same settings."""
    if results is None or not results.exists():
        return {}
    same = [*SETTINGS, "mixed_precision", "device"]
    alone = [line for line in read_reports(results) if line["processes"] == 1]
    alone = [line for line in alone if all(line.get(name) == report[name] for name in same)]
    if not alone:
        return {}
    return {
        "efficiency": round(report["items_per_second"] / alone[-1]["items_per_second"] / report["processes"], 4),
        "persistent_share": round(report["persistent_MiB"] / alone[-1]["persistent_MiB"], 4),
        "peak_share": round(report["peak_MiB"] / alone[-1]["peak_MiB"], 4),
    }


if __name__ == "__main__":
    main()
