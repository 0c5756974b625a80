"""
Times BlossomRec beside full attention, in one run on one machine: the attention alone, a whole training step and a
whole inference step, over lengths of history at a fixed number of tokens.

    python examples/benchmark.py                                  # on a GPU: bf16, 65,536 tokens
    python examples/benchmark.py --device cpu --tokens 16384 --lengths 1024,4096,16384

A step is the forward pass of embedding and layers on packed histories of one length, logits of each history's last
position over the catalogue, cross-entropy, and (training) the backward pass; no optimizer. The core is what lies
between q, k, v, gate values and the gated head outputs of one layer. Times are medians; memory is the peak above what
is allocated before the step. The slope is that of a line through (log L, log time): 0 grows with the tokens alone, 1
with tokens times length.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AttentionInterface

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.attention_blossomrec import BlossomAttention, rotate


@dataclass(frozen=True)
class Contestant:
    """One way of attending: `attention_types` and key/value heads of the model, and the function that computes it."""

    name: str
    attention_types: str
    num_key_value_heads: int
    implementation: str
    autocast: bool = True


def eager_full_attention(module, query, key, value, attention_mask=None, *, position_embeddings, max_seqlen, **kwargs):
    """Full attention with all probabilities laid out, as most recommenders compute it; histories of equal length."""
    query, key = (rotate(x, *position_embeddings) for x in (query, key))
    query, key, value = (x[0].unflatten(1, (-1, max_seqlen)).transpose(0, 1) for x in (query, key, value))
    mask = torch.ones(max_seqlen, max_seqlen, dtype=torch.bool, device=query.device).tril()
    logits = (query @ key.transpose(-1, -2) * module.scaling).masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register("eager_full", eager_full_attention)

CONTESTANTS = [
    Contestant("blossom", "blossom", 2, "blossom"),
    Contestant("blossom_torch", "blossom", 2, "blossom_torch"),
    Contestant("full (SDPA)", "full", 8, "blossom_torch"),
    Contestant("full (eager)", "full", 8, "eager_full"),
    Contestant("full (eager, fp32)", "full", 8, "eager_full", autocast=False),
]


def build(contestant: Contestant, device: str) -> BlossomRecForSequentialRecommendation:
    config = BlossomRecConfig(
        vocab_size=3418,
        attention_types=contestant.attention_types,
        num_key_value_heads=contestant.num_key_value_heads,
        attn_implementation=contestant.implementation,
        hidden_dropout_prob=0.0,
    )
    return BlossomRecForSequentialRecommendation(config).to(device)


def core_step(contestant: Contestant, args: argparse.Namespace, length: int) -> Callable[[], object]:
    """Forward and backward of one layer's attention function, on q, k, v and gates that require gradients."""
    model = build(contestant, args.device)
    layer: BlossomAttention = model.model.layers[0].self_attn
    num_tokens = args.tokens // length * length
    dtype = args.dtype if contestant.autocast else torch.float32
    heads, groups, width = model.config.num_attention_heads, contestant.num_key_value_heads, layer.head_dim
    q, k, v = (
        torch.randn(1, h, num_tokens, width, device=args.device, dtype=dtype, requires_grad=True)
        for h in (heads, groups, groups)
    )
    gates = None
    if contestant.attention_types == "blossom":
        gates = torch.rand(1, num_tokens, heads, 2, device=args.device, dtype=dtype, requires_grad=True)
    position = torch.arange(length, device=args.device).repeat(num_tokens // length)
    where = {
        "cu_seqlens": torch.arange(0, num_tokens + 1, length, device=args.device),
        "max_seqlen": length,
        "position_embeddings": model.model.rotary_embedding(position, dtype),
        "scaling": layer.scaling,
    }
    attend = AttentionInterface()[contestant.implementation]
    gradient = torch.randn(1, num_tokens, heads, width, device=args.device, dtype=dtype)
    inputs = [x for x in (q, k, v, gates, *layer.parameters()) if x is not None]

    def run():
        with torch.autocast(args.device, dtype=dtype, enabled=contestant.autocast and dtype != torch.float32):
            out, _ = attend(layer, q, k, v, None, gates=gates, **where)
        torch.autograd.grad(out, inputs, gradient.to(out.dtype), allow_unused=True)

    return run


def model_step(contestant: Contestant, args: argparse.Namespace, length: int, training: bool) -> Callable[[], object]:
    """A whole step of the model; see the top of this file."""
    model = build(contestant, args.device).train(training)
    forward = torch.compile(model) if args.compile else model
    num_tokens = args.tokens // length * length
    inputs = {
        "input_ids": torch.randint(2, 3418, (1, num_tokens), device=args.device),
        "cu_seq_lens_q": torch.arange(0, num_tokens + 1, length, device=args.device),
        "max_length_q": length,
        "logits_to_keep": 1,
    }
    target = torch.randint(2, 3418, (num_tokens // length,), device=args.device)
    autocast = contestant.autocast and args.dtype != torch.float32

    def run():
        with torch.set_grad_enabled(training), torch.autocast(args.device, dtype=args.dtype, enabled=autocast):
            logits = forward(**inputs).logits[:, -1]
            if training:
                loss = torch.nn.functional.cross_entropy(logits.float(), target)
        if training:
            loss.backward()
            model.zero_grad(set_to_none=True)

    return run


def measure(run: Callable[[], object], device: str, seconds: float) -> dict[str, float]:
    """Median milliseconds of `run`, and peak MiB above what was allocated before (GPU only)."""
    for _ in range(3):
        run()
    times, memory = [], None
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    deadline = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < deadline and len(times) < 100):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    if device == "cuda":
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"ms": statistics.median(times), "mib": memory}


def slope(lengths: list[int], times: list[float]) -> float:
    return float(np.polyfit(np.log(lengths), np.log(times), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="bfloat16 on a GPU, float32 on a CPU where not given")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a step")
    parser.add_argument("--lengths", default="200,1024,2048,4096,8192,16384,32768,65536")
    parser.add_argument("--what", default="core,training,inference")
    parser.add_argument("--contestants", default="blossom,full (SDPA)", help="; ".join(c.name for c in CONTESTANTS))
    parser.add_argument("--baseline", default="full (SDPA)", help="the contestant that ratios are taken to")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each figure")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    lengths = [int(x) for x in args.lengths.split(",")]
    if max(lengths) > args.tokens:
        parser.error(f"--lengths has {max(lengths)}, more than --tokens, {args.tokens}")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    names = args.contestants.split(",")
    unknown = set(names) - {c.name for c in CONTESTANTS}
    if unknown:
        parser.error(f"--contestants has {', '.join(unknown)}; it may name {', '.join(c.name for c in CONTESTANTS)}")
    contestants = [c for c in CONTESTANTS if c.name in names]

    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(f"{machine}; {versions}; {args.dtype}, {args.tokens} tokens a step, compile={args.compile}")
    figures = []
    tasks = [(what, length, c) for what in args.what.split(",") for length in lengths for c in contestants]
    for what, length, contestant in tqdm(tasks, disable=None):
        figure = {"what": what, "length": length, "contestant": contestant.name}
        try:
            run = (
                core_step(contestant, args, length)
                if what == "core"
                else model_step(contestant, args, length, what == "training")
            )
            figure |= measure(run, args.device, args.seconds)
        except torch.OutOfMemoryError:
            figure |= {"ms": None, "mib": None}
        run = None
        torch._dynamo.reset()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        figures.append(figure)

    by_key = {(f["what"], f["length"], f["contestant"]): f for f in figures}
    for what in args.what.split(","):
        print(f"\n{what}: median ms, peak MiB, ratio of the time to {args.baseline}")
        for length in lengths:
            cells = []
            for c in contestants:
                figure, base = by_key[what, length, c.name], by_key.get((what, length, args.baseline))
                text = "out of memory" if figure["ms"] is None else f"{figure['ms']:9.2f}"
                if figure["mib"] is not None:
                    text += f" {figure['mib']:8.0f}"
                if base and base["ms"] and figure["ms"]:
                    text += f" {figure['ms'] / base['ms']:6.2f}"
                cells.append(f"{c.name} {text}")
            print(f"  L={length:6d}  " + "  |  ".join(cells))
        for c in contestants:
            pairs = [
                (n, by_key[what, n, c.name]["ms"]) for n in lengths if by_key[what, n, c.name]["ms"] and n >= 1024
            ]
            if len(pairs) > 1:
                print(f"  slope of {c.name} from L={pairs[0][0]} to {pairs[-1][0]}: {slope(*zip(*pairs)):.2f}")
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine, **versions, "tokens": args.tokens, "figures": figures}, indent=1)
        )


if __name__ == "__main__":
    main()
