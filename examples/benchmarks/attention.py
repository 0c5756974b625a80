"""
Times BlossomRec and full attention in one run on one machine: the attention alone, a whole training step and a whole
inference step, over history lengths at a fixed number of tokens.

    python examples/benchmarks/attention.py                                  # on a GPU: bf16, 65,536 tokens, compiled, CUDA graphs
    python examples/benchmarks/attention.py --lengths_from ml-1m/interactions.txt --max_length 1000    # real history lengths
    python examples/benchmarks/attention.py --device cpu --tokens 16384 --lengths 1024,4096,16384
    python examples/benchmarks/attention.py --contestants "blossom,full (cuDNN),full (flex)" --png benchmark.png --json benchmark.json
    python examples/benchmarks/attention.py --baseline_module others.py:TheirAttention

A step is the forward pass of embedding and layers on packed histories, logits of each history's last position over the
catalog, cross-entropy, and (training) the backward pass; no optimizer. In inference, the last layer of BlossomRec and
of fused full attention computes those positions alone. With `--lengths_from`, the histories of a step are packed as the
training loop packs them, and the training loss is that of all positions (`--loss` selects either). The core is what
lies between q, k, v, gate values and the gated head outputs of one layer. On a GPU a step is compiled, then captured as
a CUDA graph once and replayed, for every contestant alike (`--no_compile`, `--no_graphs`). Times are medians; memory is
the peak above what is allocated before the step, without a graph. The slope is that of a line through (log L, log
time): 0 grows with the tokens alone, 1 with tokens times length.

Ratios are to the strongest peer (`--baseline strongest`): the fastest full attention of the row, in the same model with
as many key/value heads as query heads. "full (cuDNN)" is PyTorch's fused attention on rows of equal length, by cuDNN
where PyTorch has it, else by FlashAttention; "full (varlen)" is FlashAttention on packed histories. In the core, full
attention gets queries and keys that are already rotated, BlossomRec rotates them.

Beside each time stands its floor and what share of it is reached: the bytes that must move at the rate of large copies
on this machine, or the operations that must be done at the rate of large matrix products, whichever takes longer.
`work.py` counts both. Attention's products are those of the pairs that the mechanism attends to and scores.

`--baseline_module file.py:Class` takes an attention module from outside as one more contestant, in the same model:
`Class(hidden_size, num_attention_heads)`, called with hidden states `[histories, L, hidden_size]` and a mask
`[histories, L]` of bool, true at items, returns `[histories, L, hidden_size]`. Its core is the whole module.
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
from contestants import CONTESTANTS, FUSED_ATTENTION, Contestant, build, load_contestant, make_config
from torch import nn
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm
from transformers import AttentionInterface
from work import attention_operations, core_work, count_pairs, step_work

from blossomrec_hf import BlossomRecConfig
from blossomrec_hf.batches import TokenBudgetSampler
from blossomrec_hf.model.attention_blossomrec import BlossomAttention
from blossomrec_hf.utils.command_line import HelpFormatter, exit_on_error


STRONGEST = "strongest"  # the fastest full attention of a row


@dataclass(frozen=True)
class Histories:
    """
    The packed histories of a row of the tables.

    Attributes:
        name: of the row.
        lengths: those of the histories of each step; all steps have one number of tokens and of histories.
        longest: the longest history that a step may have.
        equal: whether all histories have one length.
    """

    name: str
    lengths: list[np.ndarray]
    longest: int
    equal: bool

    @property
    def tokens(self) -> int:
        return int(self.lengths[0].sum())


def equal_histories(length: int, tokens: int) -> Histories:
    return Histories(f"L={length}", [np.full(tokens // length, length)], length, equal=True)


def real_histories(source: str, max_length: int, tokens: int, steps: int) -> Histories:
    """
    The first steps of an epoch as the training loop packs them, each filled up with histories of [PAD] to one shape.

    Args:
        source: a log, or a `.npy` file of history lengths.
    """
    if source.endswith(".npy"):
        lengths = np.load(source)
    else:
        from blossomrec_hf.data import build_sequences  # imports polars, which GPU machines may lack

        lengths = np.array([len(row) for row in build_sequences(source)[0]["input_ids"]])
    lengths = np.minimum(lengths[lengths > 1], max_length)
    rows = list(TokenBudgetSampler(lengths, tokens, seed=0))[:steps]
    packed = [lengths[of_step] for of_step in rows]
    room = max(int(of_step.sum()) for of_step in packed)
    count = max(len(of_step) for of_step in packed) + 1
    filled = []
    for of_step in packed:
        rest = room - int(of_step.sum())
        fillers = [min(max_length, max(0, rest - i * max_length)) for i in range(count - len(of_step))]
        filled.append(np.append(of_step, fillers))
    return Histories(f"{source}, latest {max_length}", filled, max_length, equal=False)


def core_step(contestant: Contestant, args: argparse.Namespace, histories: Histories) -> Callable[[], object]:
    """Forward and backward of one layer's attention function, on q, k, v and gates that require gradients."""
    model = build(contestant, args)
    layer: BlossomAttention = model.model.layers[0].self_attn
    length, num_tokens = histories.longest, histories.tokens
    dtype = args.dtype if contestant.autocast else torch.float32
    autocast = contestant.autocast and dtype != torch.float32
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    width = model.config.head_dim
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
            "position_embeddings": None if contestant.is_peer else model.model.rotary_embedding(position, dtype),
        }
        function = AttentionInterface()[contestant.implementation]
        inputs = [x for x in (q, k, v, gates, *layer.parameters()) if x is not None]

        def attend():
            return function(layer, q, k, v, None, gates=gates, **where)[0]

    def run():
        with (
            sdpa_kernel(FUSED_ATTENTION, set_priority=True),
            torch.autocast(args.device, dtype=args.dtype, enabled=autocast),
        ):
            out = attend()
        torch.autograd.grad(out, inputs, gradient.to(out.dtype), allow_unused=True)

    return run


def model_step(
    contestant: Contestant, args: argparse.Namespace, histories: Histories, training: bool
) -> Callable[[], object]:
    """The steps of `histories`, one after the other; see the top of this file."""
    model = build(contestant, args, training).train(training)
    forward = torch.compile(model, dynamic=False) if args.compile and contestant.compiled else model
    all_positions = training and args.loss == "all"
    steps = []
    for lengths in histories.lengths:
        ids = torch.randint(2, 3418, (1, int(lengths.sum())), device=args.device)
        offsets = torch.tensor([0, *np.cumsum(lengths)], device=args.device, dtype=torch.int32)
        inputs = {"input_ids": ids, "cu_seq_lens_q": offsets, "max_length_q": histories.longest}
        if all_positions:
            inputs |= {"labels": ids, "num_items_in_batch": torch.tensor(ids.shape[1], device=args.device)}
        else:
            inputs |= {"logits_to_keep": 1}
        steps.append((inputs, torch.randint(2, 3418, (len(lengths),), device=args.device)))
    autocast = contestant.autocast and args.dtype != torch.float32

    def run():
        for inputs, target in steps:
            with (
                torch.set_grad_enabled(training),
                torch.autocast(args.device, dtype=args.dtype, enabled=autocast),
                sdpa_kernel(FUSED_ATTENTION, set_priority=True),
            ):
                outputs = forward(**inputs)
                if training and not all_positions:
                    loss = nn.functional.cross_entropy(outputs.logits[:, -1].float(), target)
            if training:
                (outputs.loss if all_positions else loss).backward()
                model.zero_grad(set_to_none=True)

    return run


def least_work(
    config: BlossomRecConfig, args: argparse.Namespace, packed: Histories, what: str
) -> tuple[float, float]:
    """
    Bytes that a core or a step on histories of equal length must move, and operations that it must do; see `work.py`.
    """
    training = what != "inference"
    (lengths,) = packed.lengths
    operations = len(lengths) * sum(attention_operations(config, count_pairs(config, packed.longest)).values())
    if what == "core":
        parts = [core_work(config, packed.tokens, operations, training=True)]
    else:
        scored = packed.tokens if training and args.loss == "all" else len(lengths)
        parts = step_work(config, packed.tokens, scored, operations, training=training)
    return args.dtype.itemsize * sum(part.elements for part in parts), sum(part.operations for part in parts)


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


def measure(run: Callable[[], object], args: argparse.Namespace, steps: int = 1) -> dict[str, float | None]:
    """Median milliseconds of each of the `steps` of `run`, and peak MiB above what was allocated before (GPU only)."""
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
    return {"ms": statistics.median(times) / steps, "mib": memory}


def slope(lengths: list[int], times: list[float]) -> float:
    return float(np.polyfit(np.log(lengths), np.log(times), 1)[0])


def strongest(figures: list[dict]) -> dict | None:
    """The fastest full attention of the figures of one row."""
    return min((f for f in figures if f["is_peer"] and f["ms"]), key=lambda f: f["ms"], default=None)


def print_tables(figures: list[dict], baseline: str) -> None:
    for what in dict.fromkeys(f["what"] for f in figures):
        print(f"\n{what}: median ms, peak MiB, ratios of both to {baseline}, the least ms and the share reached")
        for row in dict.fromkeys(f["row"] for f in figures if f["what"] == what):
            of_row = [f for f in figures if (f["what"], f["row"]) == (what, row)]
            named = [f for f in of_row if f["contestant"] == baseline]
            base = strongest(of_row) if baseline == STRONGEST else next(iter(named), None)
            cells = []
            for figure in of_row:
                text = "out of memory" if figure["ms"] is None else f"{figure['ms']:9.3f}"
                if figure["mib"] is not None:
                    text += f" {figure['mib']:8.0f}"
                for unit in ("ms", "mib"):
                    if figure is not base and base and base[unit] and figure[unit]:
                        text += f" {figure[unit] / base[unit]:6.3f}"
                if figure.get("floor_ms") and figure["ms"]:
                    text += f" (floor {figure['floor_ms']:.3f}, {figure['floor_ms'] / figure['ms']:.0%})"
                cells.append(f"{figure['contestant']} {text}")
            print(f"  {row:>9s}  " + "  |  ".join(cells))
        for contestant in dict.fromkeys(f["contestant"] for f in figures):
            times = [
                (f["length"], f["ms"])
                for f in figures
                if (f["what"], f["contestant"]) == (what, contestant) and f["ms"] and (f["length"] or 0) >= 1024
            ]
            if len(times) > 1:
                print(f"  slope of {contestant} from L={times[0][0]} to {times[-1][0]}: {slope(*zip(*times)):.2f}")


def plot(path: Path, figures: list[dict], contestants: list[Contestant], title: str) -> None:
    """Time and memory over the length of histories of equal length, a column for each thing measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = [f for f in figures if f["length"]]
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


@exit_on_error()
def main() -> None:
    names = [c.name for c in CONTESTANTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="bfloat16 on a GPU, float32 on a CPU where not given")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a step")
    parser.add_argument("--lengths", default="200,1024,2048,4096,8192,16384,32768,65536")
    parser.add_argument("--lengths_from", help="a log, or a .npy file of lengths: histories of these lengths instead")
    parser.add_argument("--max_length", type=int, default=1000, help="with --lengths_from: the longest history")
    parser.add_argument("--steps", type=int, default=4, help="with --lengths_from: how many steps are timed")
    parser.add_argument("--what", default="core,training,inference")
    parser.add_argument("--loss", choices=("last", "all"), help="training: positions with a loss")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=2)
    parser.add_argument("--num_key_value_heads", type=int, default=2, help="of BlossomRec; full attention has 8")
    parser.add_argument("--contestants", default="blossom,full (cuDNN),full (varlen)", help=", ".join(names))
    parser.add_argument(
        "--baseline", default=STRONGEST, help="the contestant of the ratios' denominator, or strongest"
    )
    parser.add_argument("--baseline_module", help="file.py:Class, one more contestant; see above")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each figure")
    parser.add_argument("--compile", action="store_true", default=None, help="torch.compile (on a GPU: by default)")
    parser.add_argument("--no_compile", dest="compile", action="store_false", default=None, help="no torch.compile")
    parser.add_argument("--no_graphs", dest="graphs", action="store_false", help="no CUDA graphs")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--png", type=Path, help="file for a drawing of them")
    args = parser.parse_args()
    lengths = [int(x) for x in args.lengths.split(",")]
    if args.lengths_from is None and max(lengths) > args.tokens:
        parser.error(f"--lengths has {max(lengths)}, more than --tokens, {args.tokens}")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    args.graphs = args.graphs and args.device == "cuda"
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    args.loss = args.loss or ("last" if args.lengths_from is None else "all")
    asked = args.contestants.split(",")
    unknown = set(asked) - set(names)
    if unknown:
        parser.error(f"--contestants has {', '.join(unknown)}; it may name {', '.join(names)}")
    contestants = [c for c in CONTESTANTS if c.name in asked]
    if args.baseline_module:
        contestants.append(load_contestant(args.baseline_module))

    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    sizes = (args.num_hidden_layers, args.hidden_size, args.num_key_value_heads)
    settings = {"dtype": str(args.dtype), "tokens": args.tokens, "layers, width, key/value heads": sizes}
    settings |= {"compile": args.compile, "graphs": args.graphs, "loss": args.loss}
    title = "; ".join([machine, *(f"{name} {value}" for name, value in (versions | settings).items())])
    print(title)
    copied, multiplied = machine_rates(args)
    print(f"a large copy {copied / 1e9:,.0f} GB/s, a large matrix product {multiplied / 1e12:,.1f} TFLOP/s")
    figures = []
    if args.lengths_from is None:
        rows = [equal_histories(length, args.tokens) for length in lengths]
    else:
        rows = [real_histories(args.lengths_from, args.max_length, args.tokens, args.steps)]
    tasks = [(what, row, c) for what in args.what.split(",") for row in rows for c in contestants]
    for what, row, contestant in tqdm(tasks, disable=None):
        if not row.equal and (what == "core" or (contestant.is_peer and not contestant.any_lengths)):
            continue
        figure = {"what": what, "row": row.name, "length": row.longest if row.equal else None}
        figure |= {"contestant": contestant.name, "is_peer": contestant.is_peer}
        try:
            run = (
                core_step(contestant, args, row)
                if what == "core"
                else model_step(contestant, args, row, what == "training")
            )
            figure |= measure(run, args, 1 if what == "core" else len(row.lengths))
        except torch.OutOfMemoryError:
            figure |= {"ms": None, "mib": None}
        if row.equal and contestant.module is None and contestant.autocast:
            moved, done = least_work(make_config(contestant, args), args, row, what)
            figure["floor_ms"] = 1e3 * max(moved / copied, done / multiplied)
        run = None
        torch._dynamo.reset()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        figures.append(figure)

    print_tables(figures, args.baseline)
    if args.json:
        rates = {"copy_bytes_per_s": copied, "matrix_operations_per_s": multiplied}
        results = {"machine": machine, **versions, **settings, **rates, "figures": figures}
        args.json.write_text(json.dumps(results, indent=1))
    if args.png:
        plot(args.png, figures, contestants, title)


if __name__ == "__main__":
    main()
