"""
Times what a service does at every click, in one run on one machine.

    python examples/benchmark_serving.py                                   # two cores: one history of 4,096 events
    python examples/benchmark_serving.py --device cuda --batch 256         # a GPU: a batch of 256 such histories

- `append`: one new event of each history, known from a `BlossomRecCache`, to the logits of the next item over the
  catalogue; the cache is cropped back between two measurements, so that the history stays `--history` events long.
- `recompute`: the same logits from the whole histories, packed, as without a cache.
- `prefill`: the whole histories into a new cache, once a user comes in.

Weights are random: they decide nothing about the time. Times are of one batch; p50 and p99 over `--seconds` of runs, 20
at least. Of the appends one in `selection_block_size` completes a block.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from blossomrec_hf import BlossomRecCache, BlossomRecConfig, BlossomRecForSequentialRecommendation


Figure = dict[str, object]


def timed(run: Callable[[int], object], device: str, seconds: float, at_least: int = 20) -> dict[str, float]:
    """p50, p99 and the number of runs, in milliseconds; `run` gets the number of the run."""
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


def cached_append(args: argparse.Namespace) -> list[Figure]:
    """Appending to the cache, beside computing the whole histories again."""
    figures = []
    for attention_type in args.attention_types.split(","):
        torch.manual_seed(0)
        config = BlossomRecConfig(vocab_size=args.items + 2, attention_types=attention_type)
        model = BlossomRecForSequentialRecommendation(config).to(args.device, args.dtype).eval()
        shape = (args.batch, args.history + 1)
        ids = torch.randint(2, args.items + 2, shape, device=args.device)
        cache = BlossomRecCache(config)
        # In parts, so that the states of the first layers need not all be there at once.
        for part in ids[:, :-1].split(max(1, 2**20 // args.batch), 1):
            model(part, past_key_values=cache, logits_to_keep=1)
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
            return model(events, past_key_values=cache, logits_to_keep=1).logits

        cache.crop(args.history)
        appended = model(events, past_key_values=cache, logits_to_keep=1).logits
        difference = float((appended - model(**packed).logits).abs().max())
        measured = {
            "append": timed(append, args.device, args.seconds),
            "recompute": timed(lambda i: model(**packed).logits, args.device, args.seconds, 10),
            "prefill": timed(lambda i: model(**packed, use_cache=True).logits, args.device, args.seconds, 5),
        }
        base = measured["recompute"]["p50_ms"]
        for what, times in measured.items():
            figure = {
                "section": "cache",
                "what": f"{what}, {attention_type}",
                **times,
                "times": base / times["p50_ms"],
            }
            figures.append(figure | {"batch": args.batch, "history": args.history, "mib": cache.nbytes / 2**20})
        print(
            f"{attention_type}: largest difference of a logit between append and recompute {difference:.1e}",
            flush=True,
        )
    return figures


# Name on the command line → function of the arguments; a figure has "section", "what", "p50_ms", "p99_ms", "runs", and
# "times", how many times faster than what it is compared to.
SECTIONS: dict[str, Callable[[argparse.Namespace], list[Figure]]] = {"cache": cached_append}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1, help="histories that get an event together")
    parser.add_argument("--history", type=int, default=4096, help="events of each before that")
    parser.add_argument("--items", type=int, default=3416)
    parser.add_argument("--attention_types", default="blossom", help="blossom, long_term, short_term, full")
    parser.add_argument("--seconds", type=float, default=5.0, help="time spent on each figure")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    unknown = set(args.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections has {', '.join(unknown)}; it may name {', '.join(SECTIONS)}")
    args.dtype = getattr(torch, args.dtype)

    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(f"{machine}; {versions}; {args.dtype}, {args.items} items, {args.batch} histories of {args.history} events")
    with torch.inference_mode():
        figures = [figure for name in args.sections.split(",") for figure in SECTIONS[name](args)]
    print(f"\n{'':36} {'p50 ms':>10} {'p99 ms':>10} {'runs':>6} {'faster':>9}")
    for f in figures:
        print(f"{f['what']:36} {f['p50_ms']:10.2f} {f['p99_ms']:10.2f} {f['runs']:6d} {f['times']:8.1f}×")
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(
            json.dumps({"machine": machine, **versions, "settings": settings, "figures": figures}, indent=1)
        )


if __name__ == "__main__":
    main()
