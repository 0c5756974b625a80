"""
Times BlossomRec beside full attention, in one run on one machine: the attention alone, a whole training step and a
whole inference step, over lengths of history at a fixed number of tokens.

    python examples/benchmark.py                                  # on a GPU: bf16, 65,536 tokens
    python examples/benchmark.py --device cpu --tokens 16384 --lengths 1024,4096,16384
    python examples/benchmark.py --contestants "blossom,full (SDPA),full (flex)" --png benchmark.png --json benchmark.json
    python examples/benchmark.py --baseline_module others.py:TheirAttention

A step is the forward pass of embedding and layers on packed histories of one length, logits of each history's last
position over the catalogue, cross-entropy, and (training) the backward pass; no optimizer. The core is what lies
between q, k, v, gate values and the gated head outputs of one layer. On a GPU a step is captured as a CUDA graph once
and replayed, for every contestant alike (`--no_graphs`: launched operation by operation, where the CPU bounds short
steps). Times are medians; memory is the peak above what is allocated before the step, without a graph. The slope is
that of a line through (log L, log time): 0 grows with the tokens alone, 1 with tokens times length.

Beside each time stands its floor and what share of it is reached: the bytes that must move at the rate of large copies
on this machine, or the operations that must be done at the rate of large matrix products, whichever takes longer. Every
matrix product and every attention reads what it takes and writes what it gives once (its backward pass: reads what it
took and the gradient, writes gradients); what lies between them is free, and so are weights. Attention's products are
those of the pairs that the mechanism attends to and scores: two forward, and backward two for each of them.

`--baseline_module file.py:Class` takes an attention module from outside as one more contestant, in the same model:
`Class(hidden_size, num_attention_heads)`, called with hidden states `[histories, L, hidden_size]` and a mask
`[histories, L]` of bool, true at items, returns `[histories, L, hidden_size]`. Its core is the whole module.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm
from transformers import AttentionInterface

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.attention_blossomrec import BlossomAttention
from blossomrec_hf.command_line import HelpFormatter, ends_with_a_sentence
from blossomrec_hf.ops_reference import power_law_distances, rotate


@dataclass(frozen=True)
class Contestant:
    """One way of attending: `attention_types` and key/value heads of the model, and the function that computes it."""

    name: str
    attention_types: str
    num_key_value_heads: int
    implementation: str
    autocast: bool = True
    module: type[nn.Module] | None = None


def _rows(max_seqlen: int, *packed: torch.Tensor) -> list[torch.Tensor]:
    """`[1, heads, T, d]` → `[histories, heads, L, d]`, for packed histories of one length."""
    return [x[0].unflatten(1, (-1, max_seqlen)).transpose(0, 1) for x in packed]


def eager_full_attention(module, query, key, value, attention_mask=None, *, position_embeddings, max_seqlen, **kwargs):
    """Full attention with all probabilities laid out, as most recommenders compute it; histories of equal length."""
    query, key = (rotate(x, *position_embeddings) for x in (query, key))
    query, key, value = _rows(max_seqlen, query, key, value)
    mask = torch.ones(max_seqlen, max_seqlen, dtype=torch.bool, device=query.device).tril()
    logits = (query @ key.transpose(-1, -2) * module.scaling).masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2).flatten(0, 1)[None], None


@cache
def _causal_blocks(length: int, device: torch.device):
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


_flex_attention = torch.compile(flex_attention, dynamic=False)


def flex_full_attention(module, query, key, value, attention_mask=None, *, position_embeddings, max_seqlen, **kwargs):
    """Full attention through FlexAttention; histories of equal length."""
    query, key = (rotate(x, *position_embeddings).to(value.dtype) for x in (query, key))
    query, key, value = _rows(max_seqlen, query, key, value)
    blocks = _causal_blocks(max_seqlen, query.device)
    out = _flex_attention(query, key, value, block_mask=blocks, scale=module.scaling)
    return out.transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register("eager_full", eager_full_attention)
AttentionInterface.register("flex_full", flex_full_attention)

CONTESTANTS = [
    Contestant("blossom", "blossom", 2, "blossom"),
    Contestant("blossom_torch", "blossom", 2, "blossom_torch"),
    Contestant("full (SDPA)", "full", 8, "blossom_torch"),
    Contestant("full (flex)", "full", 8, "flex_full"),
    Contestant("full (eager)", "full", 8, "eager_full"),
    Contestant("full (eager fp32)", "full", 8, "eager_full", autocast=False),
]


class OutsideAttention(nn.Module):
    """An attention module that knows rows and a padding mask, in the place of a layer's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden_states: torch.Tensor, *, max_seqlen: int, **kwargs):
        rows = hidden_states[0].unflatten(0, (-1, max_seqlen))
        out = self.module(rows, torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device))
        return out.flatten(0, 1)[None], None, None, None


def load_contestant(spec: str) -> Contestant:
    """The contestant of `--baseline_module`."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"`baseline_module` is {spec!r}; it must be file.py:Class, and {path!r} is no file.")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return Contestant(name, "full", 8, "blossom_torch", module=getattr(module, name))


def make_config(contestant: Contestant) -> BlossomRecConfig:
    return BlossomRecConfig(
        vocab_size=3418,
        attention_types=contestant.attention_types,
        num_key_value_heads=contestant.num_key_value_heads,
        attn_implementation=contestant.implementation,
        hidden_dropout_prob=0.0,
    )


def build(contestant: Contestant, device: str) -> BlossomRecForSequentialRecommendation:
    config = make_config(contestant)
    model = BlossomRecForSequentialRecommendation(config)
    if contestant.module is not None:
        for layer in model.model.layers:
            layer.self_attn = OutsideAttention(contestant.module(config.hidden_size, config.num_attention_heads))
    return model.to(device)


def core_step(contestant: Contestant, args: argparse.Namespace, length: int) -> Callable[[], object]:
    """Forward and backward of one layer's attention function, on q, k, v and gates that require gradients."""
    model = build(contestant, args.device)
    layer: BlossomAttention = model.model.layers[0].self_attn
    num_tokens = args.tokens // length * length
    dtype = args.dtype if contestant.autocast else torch.float32
    autocast = contestant.autocast and dtype != torch.float32
    heads, groups, width = model.config.num_attention_heads, contestant.num_key_value_heads, model.config.head_dim
    gradient = torch.randn(1, num_tokens, heads, width, device=args.device, dtype=dtype)
    if contestant.module is not None:
        states = torch.randn(1, num_tokens, heads * width, device=args.device, requires_grad=True)
        inputs = [states, *layer.parameters()]

        def attend():
            return layer(states, max_seqlen=length)[0].unflatten(-1, (heads, width))
    else:
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
        function = AttentionInterface()[contestant.implementation]
        inputs = [x for x in (q, k, v, gates, *layer.parameters()) if x is not None]

        def attend():
            return function(layer, q, k, v, None, gates=gates, **where)[0]

    def run():
        with torch.autocast(args.device, dtype=args.dtype, enabled=autocast):
            out = attend()
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


def attended(config: BlossomRecConfig, length: int) -> tuple[int, int]:
    """(query, key) pairs of a history that a head attends to, and (query, block) pairs that a group scores."""
    t = np.arange(length)
    if config.attention_types[0] == "full":
        return int((t + 1).sum()), 0
    candidates, in_block = np.divmod(t, config.selection_block_size)
    long = config.selection_block_size * np.minimum(candidates, config.num_selected_blocks) + in_block + 1
    block, in_block = np.divmod(t, config.short_term_block_size)
    distances = power_law_distances(int(block[-1]) + 1, config.short_term_window, config.power_law_base)
    short = sum(np.where(block >= x, config.short_term_block_size if x else in_block + 1, 0) for x in distances)
    return int((long + short).sum()), int(candidates.sum())


def least_work(config: BlossomRecConfig, args: argparse.Namespace, length: int, what: str) -> tuple[float, float]:
    """Bytes that a core or a step must move and operations that it must do; see the top of this file."""
    histories, size = args.tokens // length, args.dtype.itemsize
    tokens, training = histories * length, what != "inference"
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    gates = 2 * config.num_attention_heads if config.attention_types[0] != "full" else 0
    pairs, scored = attended(config, length)

    moved = tokens * (2 * queries + 2 * keys + gates)
    done = histories * 4 * queries * pairs
    if gates:
        done += histories * 2 * keys * scored
        window = config.compress_block_size * config.head_dim
        mlp = 2 * window * (window + config.head_dim)
        done += (
            histories * (length // config.compress_stride) * config.num_key_value_heads * mlp * (3 if training else 1)
        )
    if training:
        moved += tokens * (3 * queries + 4 * keys + 2 * gates)
        done += histories * (8 * queries * pairs + 4 * keys * scored * bool(gates))
    if what == "core":
        return moved * size, done
    width, inner = config.hidden_size, config.intermediate_size
    products = [(width, queries + 2 * keys + gates), (queries, width), (width, inner), (inner, width)]
    for taken, given in products:
        moved += tokens * (taken + given + (2 * taken + given if training else 0))
        done += tokens * 2 * taken * given * (3 if training else 1)
    return config.num_hidden_layers * moved * size, config.num_hidden_layers * done


def machine_rates(args: argparse.Namespace) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), operations a second of a large matrix product."""
    side = 8192 if args.device == "cuda" else 2048
    left, right = (torch.randn(side, side, device=args.device, dtype=args.dtype) for _ in range(2))
    source = torch.zeros(2**28, dtype=torch.uint8, device=args.device)
    target = torch.zeros_like(source)

    def seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            for _ in range(10):
                run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / 10)
        return statistics.median(times[1:])

    return 2 * 2**28 / seconds(lambda: target.copy_(source)), 2 * side**3 / seconds(lambda: left @ right)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(run: Callable[[], object], args: argparse.Namespace) -> dict[str, float | None]:
    """Median milliseconds of `run`, and peak MiB above what was allocated before (GPU only)."""
    on_gpu, memory = args.device == "cuda", None
    for _ in range(3):
        run()
    if on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        if args.graphs:
            run = captured(run)
            run()
        torch.cuda.synchronize()
    times, deadline = [], time.perf_counter() + args.seconds
    while len(times) < 5 or (time.perf_counter() < deadline and len(times) < 100):
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return {"ms": statistics.median(times), "mib": memory}


def slope(lengths: list[int], times: list[float]) -> float:
    return float(np.polyfit(np.log(lengths), np.log(times), 1)[0])


def print_tables(figures: list[dict], contestants: list[Contestant], lengths: list[int], baseline: str) -> None:
    by_key = {(f["what"], f["length"], f["contestant"]): f for f in figures}
    for what in dict.fromkeys(f["what"] for f in figures):
        print(f"\n{what}: median ms, peak MiB, ratios of both to {baseline}, the least ms and the share reached")
        for length in lengths:
            base = by_key.get((what, length, baseline))
            cells = []
            for c in contestants:
                figure = by_key[what, length, c.name]
                text = "out of memory" if figure["ms"] is None else f"{figure['ms']:9.2f}"
                if figure["mib"] is not None:
                    text += f" {figure['mib']:8.0f}"
                for unit in ("ms", "mib"):
                    if c.name != baseline and base and base[unit] and figure[unit]:
                        text += f" {figure[unit] / base[unit]:6.3f}"
                if figure.get("floor_ms") and figure["ms"]:
                    text += f" (floor {figure['floor_ms']:.3f}, {figure['floor_ms'] / figure['ms']:.0%})"
                cells.append(f"{c.name} {text}")
            print(f"  L={length:6d}  " + "  |  ".join(cells))
        for c in contestants:
            times = [(n, by_key[what, n, c.name]["ms"]) for n in lengths if n >= 1024]
            times = [(n, ms) for n, ms in times if ms]
            if len(times) > 1:
                print(f"  slope of {c.name} from L={times[0][0]} to {times[-1][0]}: {slope(*zip(*times)):.2f}")


def plot(path: Path, figures: list[dict], contestants: list[Contestant], title: str) -> None:
    """Time and memory over the length, a column for each thing measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whats = list(dict.fromkeys(f["what"] for f in figures))
    units = [("ms", "ms a step")] + [("mib", "peak MiB")] * any(f["mib"] for f in figures)
    figure, axes = pyplot.subplots(
        len(units), len(whats), figsize=(4.2 * len(whats), 3.2 * len(units)), squeeze=False, sharex=True
    )
    for row, (unit, label) in zip(axes, units):
        for axis, what in zip(row, whats):
            for c in contestants:
                points = [(f["length"], f[unit]) for f in figures if (f["what"], f["contestant"]) == (what, c.name)]
                axis.plot(*zip(*((n, y if y else float("nan")) for n, y in points)), marker="o", label=c.name)
            axis.set_xscale("log", base=2)
            shown = [y for line in axis.lines for y in line.get_ydata()]
            if np.nanmax(shown) > 3 * np.nanmin(shown):
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 1.15 * np.nanmax(shown))
            axis.set_title(what)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(label)
    for axis in axes[-1]:
        axis.set_xlabel("items of a history")
    axes[0][0].legend()
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="bfloat16 on a GPU, float32 on a CPU where not given")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a step")
    parser.add_argument("--lengths", default="200,1024,2048,4096,8192,16384,32768,65536")
    parser.add_argument("--what", default="core,training,inference")
    parser.add_argument("--contestants", default="blossom,full (SDPA)", help="; ".join(c.name for c in CONTESTANTS))
    parser.add_argument("--baseline", default="full (SDPA)", help="the contestant that ratios are taken to")
    parser.add_argument("--baseline_module", help="file.py:Class, one more contestant; see above")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each figure")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    parser.add_argument("--no_graphs", dest="graphs", action="store_false", help="no CUDA graphs")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--png", type=Path, help="file for a drawing of them")
    args = parser.parse_args()
    lengths = [int(x) for x in args.lengths.split(",")]
    if max(lengths) > args.tokens:
        parser.error(f"--lengths has {max(lengths)}, more than --tokens, {args.tokens}")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    args.graphs = args.graphs and args.device == "cuda"
    names = args.contestants.split(",")
    unknown = set(names) - {c.name for c in CONTESTANTS}
    if unknown:
        parser.error(f"--contestants has {', '.join(unknown)}; it may name {', '.join(c.name for c in CONTESTANTS)}")
    contestants = [c for c in CONTESTANTS if c.name in names]
    if args.baseline_module:
        with ends_with_a_sentence(ValueError):
            contestants.append(load_contestant(args.baseline_module))

    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    settings = {"dtype": str(args.dtype), "tokens": args.tokens, "compile": args.compile, "graphs": args.graphs}
    title = "; ".join([machine, *(f"{name} {value}" for name, value in (versions | settings).items())])
    print(title)
    copied, multiplied = machine_rates(args)
    print(f"a large copy {copied / 1e9:,.0f} GB/s, a large matrix product {multiplied / 1e12:,.1f} TFLOP/s")
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
            figure |= measure(run, args)
        except torch.OutOfMemoryError:
            figure |= {"ms": None, "mib": None}
        if contestant.module is None and contestant.autocast:
            moved, done = least_work(make_config(contestant), args, length, what)
            figure["floor_ms"] = 1e3 * max(moved / copied, done / multiplied)
        run = None
        torch._dynamo.reset()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        figures.append(figure)

    print_tables(figures, contestants, lengths, args.baseline)
    if args.json:
        rates = {"copy_bytes_per_s": copied, "matrix_operations_per_s": multiplied}
        results = {"machine": machine, **versions, **settings, **rates, "figures": figures}
        args.json.write_text(json.dumps(results, indent=1))
    if args.png:
        plot(args.png, figures, contestants, title)


if __name__ == "__main__":
    main()
