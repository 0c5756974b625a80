"""
Counted work against measured time, over the length of the histories: operations and bytes of the attention, and of training
and inference steps, with BlossomRec and with full attention.

    python examples/studies/operations.py                                          # measures, on one GPU
    python examples/studies/operations.py --what training --folder of_training       # a part of it
    python examples/studies/operations.py --from part/operations.json other/operations.json     # joins parts, draws again

Times are those of `examples/benchmarks/attention.py`, which is run with `--lengths`, `--what`, `--tokens` and the further
options. Work is counted by `examples/benchmarks/work.py` from configuration and lengths. Writes operations.json,
operations.md and operations.png into `--folder`.

The roofline time of a part is that of its operations at the peak rate of the GPU's matrix products in bf16 or that of its
bytes at the peak rate of the memory, whichever is longer; parts are added up. The peaks are those of the data sheets. For
other machines they are the rates that the benchmark measures with large products and copies.
"""

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import torch  # noqa: E402
from contestants import CONTESTANTS, make_config  # noqa: E402
from work import Work, attention_operations, core_work, count_pairs, step_work  # noqa: E402

from blossomrec_hf.training.studies import PACKAGE, code_entry  # noqa: E402
from blossomrec_hf.utils.command_line import HelpFormatter, exit_on_error  # noqa: E402
from blossomrec_hf.utils.files import atomic_write, read_json, write_json  # noqa: E402
from blossomrec_hf.utils.progress import set_up_logging  # noqa: E402


logger = logging.getLogger(__name__)

# Times depend on these files, too.
MEASURING = [BENCHMARKS / "work.py", BENCHMARKS / "attention.py", *sorted((PACKAGE / "model").glob("ops_*.py"))]
LENGTHS = "50,200,1024,4096,16384,65536"
# Operations per second of dense matrix products in bf16, and bytes per second of the memory (data sheets, SXM).
PEAKS = {"H100": (989.4e12, 3.35e12), "H200": (989.4e12, 4.8e12)}
SAME = ("machine", "torch", "dtype", "tokens", "layers, width, key/value heads", "compile", "graphs", "loss")


def measure(args: argparse.Namespace, further: list[str]) -> dict[str, Any]:
    """The results of the benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        command = [sys.executable, str(BENCHMARKS / "attention.py"), "--json", str(path)]
        for name in ("lengths", "what", "contestants", "seconds"):
            command += [f"--{name}", str(getattr(args, name))]
        started = time.perf_counter()
        if status := subprocess.run([*command, *further]).returncode:
            raise SystemExit(status)
        results = read_json(path)
    seconds = round(time.perf_counter() - started)
    return {"study": "operations", "code": [code_entry(MEASURING)], **results, "seconds": seconds}


def join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """
    The results of several parts of the study.

    Raises:
        ValueError: if they were measured with different settings or machines.
    """
    first = parts[0]
    for part in parts[1:]:
        if differing := [name for name in SAME if part[name] != first[name]]:
            raise ValueError(f"`from` has results with different {', '.join(differing)}; measure them on one machine.")
    code = {entry["hash"]: entry for part in parts for entry in part["code"]}
    figures = [figure for part in parts for figure in part["figures"]]
    seconds = sum(part["seconds"] for part in parts)
    return {**first, "code": list(code.values()), "figures": figures, "seconds": seconds}


def peaks_of(results: dict[str, Any]) -> tuple[float, float]:
    """Operations and bytes per second of the machine of some results, see the top of this file."""
    for name, peaks in PEAKS.items():
        if name in results["machine"] and results["dtype"] == "torch.bfloat16":
            return peaks
    return results["matrix_operations_per_s"], results["copy_bytes_per_s"]


def count(figure: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """
    The work behind one figure of the benchmark.

    Returns:
        "gflop" and "gb", "roofline_ms", "bound" (what bounds most of it, operations or bytes), "parts" (milliseconds of the
        roofline by part) and "attention_gflop" (of the forward pass of a layer, by stream and step).
    """
    layers, width, heads = results["layers, width, key/value heads"]
    sizes = argparse.Namespace(hidden_size=width, num_hidden_layers=layers, num_key_value_heads=heads)
    contestant = next(entry for entry in CONTESTANTS if entry.name == figure["contestant"])
    config, length = make_config(contestant, sizes), figure["length"]
    histories = results["tokens"] // length
    tokens = histories * length
    by_stream = {
        name: histories * operations
        for name, operations in attention_operations(config, count_pairs(config, length)).items()
    }
    operations, training = sum(by_stream.values()), figure["what"] != "inference"
    if figure["what"] == "core":
        parts = [core_work(config, tokens, operations, training=True)]
    else:
        scored = tokens if training and results["loss"] == "all" else histories
        parts = step_work(config, tokens, scored, operations, training=training)
    itemsize = getattr(torch, results["dtype"].removeprefix("torch.")).itemsize
    of_operations, of_bytes = peaks_of(results)

    def milliseconds(part: Work) -> tuple[float, float]:
        return 1e3 * part.operations / of_operations, 1e3 * part.elements * itemsize / of_bytes

    by_bound = {"operations": 0.0, "bytes": 0.0}
    for part in parts:
        compute, move = milliseconds(part)
        by_bound["operations" if compute > move else "bytes"] += max(compute, move)
    return {
        "gflop": sum(part.operations for part in parts) / 1e9,
        "gb": sum(part.elements for part in parts) * itemsize / 1e9,
        "roofline_ms": sum(by_bound.values()),
        "bound": max(by_bound, key=by_bound.get),
        "parts": {part.name: max(milliseconds(part)) for part in parts},
        "attention_gflop": {name: value / 1e9 for name, value in by_stream.items()},
    }


def report(results: dict[str, Any]) -> str:
    """The tables of the study in Markdown."""
    layers, width, heads = results["layers, width, key/value heads"]
    of_operations, of_bytes = peaks_of(results)
    lines = [
        "# operations",
        "",
        f"{results['tokens']:,} items per step, {layers} layers of width {width}, 8 heads over {heads} key/value heads (full "
        f"attention: 8); {results['machine']}, {results['dtype'].removeprefix('torch.')}, PyTorch {results['torch']}, "
        f"{'compiled' if results['compile'] else 'not compiled'}{', CUDA graphs' * results['graphs']}. Roofline: "
        f"{of_operations / 1e12:,.1f} TFLOP/s, {of_bytes / 1e12:,.2f} TB/s; large products and copies reach "
        f"{results['matrix_operations_per_s'] / 1e12:,.1f} and {results['copy_bytes_per_s'] / 1e12:,.2f}.",
    ]
    for what in dict.fromkeys(figure["what"] for figure in results["figures"]):
        title = {"core": "attention of one layer, forward and backward"}.get(what, f"{what} step")
        head = ["items", "", "GFLOP", "GB", "bound", "roofline, ms", "measured, ms", "measured / roofline"]
        lines += ["", f"## {title}", "", _row(head), _row(["---"] * len(head))]
        for figure in sorted((f for f in results["figures"] if f["what"] == what), key=lambda f: f["length"]):
            found = count(figure, results)
            measured = ["out of memory", ""]
            if figure["ms"]:
                measured = [f"{figure['ms']:.3f}", f"{figure['ms'] / found['roofline_ms']:.1f}"]
            counted = [f"{found['gflop']:.3g}", f"{found['gb']:.3g}", found["bound"], f"{found['roofline_ms']:.3f}"]
            lines.append(_row([f"{figure['length']:,}", figure["contestant"], *counted, *measured]))
    lines += ["", "## operations of the attention of one layer, forward, GFLOP", ""]
    names = ["compress", "score", "long-term", "short-term", "full"]
    lines += [_row(["items", *names]), _row(["---"] * (len(names) + 1))]
    for length in sorted({figure["length"] for figure in results["figures"]}):
        found: dict[str, float] = {}
        for figure in results["figures"]:
            if figure["length"] == length:
                found |= count(figure, results)["attention_gflop"]
        lines.append(_row([f"{length:,}", *(f"{found[name]:.3g}" if name in found else "" for name in names)]))
    hashes = ", ".join(entry["hash"] for entry in results["code"])
    lines += ["", f"`python examples/studies/operations.py`: {results['seconds']} s. Code {hashes}."]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(results: dict[str, Any], path: Path) -> None:
    """Work, time and their ratio over the length: a column for each thing measured."""
    from matplotlib.figure import Figure

    whats = list(dict.fromkeys(figure["what"] for figure in results["figures"]))
    contestants = list(dict.fromkeys(figure["contestant"] for figure in results["figures"]))
    figure = Figure(figsize=(4.6 * len(whats), 8.5), layout="constrained")
    panels = figure.subplots(3, len(whats), squeeze=False, sharex=True)
    for column, what in zip(panels.T, whats):
        work, times, ratio = column
        for number, contestant in enumerate(contestants):
            rows = [f for f in results["figures"] if (f["what"], f["contestant"]) == (what, contestant) and f["ms"]]
            rows.sort(key=lambda row: row["length"])
            lengths, found = [row["length"] for row in rows], [count(row, results) for row in rows]
            style = {"color": f"C{number}", "marker": "o", "markersize": 3}
            work.plot(lengths, [entry["gflop"] for entry in found], label=f"{contestant}, GFLOP", **style)
            work.plot(lengths, [1e3 * entry["gb"] for entry in found], ":", label=f"{contestant}, MB", **style)
            times.plot(lengths, [row["ms"] for row in rows], label=f"{contestant}, measured", **style)
            times.plot(lengths, [entry["roofline_ms"] for entry in found], ":", label="roofline", **style)
            ratio.plot(
                lengths,
                [row["ms"] / entry["roofline_ms"] for row, entry in zip(rows, found)],
                label=contestant,
                **style,
            )
        work.set(title={"core": "attention of one layer"}.get(what, f"{what} step"), yscale="log")
        times.set(yscale="log")
        ratio.set(xlabel="items of a history", ylim=(0, None))
        ratio.set_xscale("log", base=2)
        for panel in column:
            panel.grid(alpha=0.3)
            panel.legend(fontsize=6)
    for panel, label in zip(panels[:, 0], ("counted work", "ms", "measured / roofline")):
        panel.set_ylabel(label)
    figure.suptitle(f"{results['tokens']:,} items per step, {results['machine']}", fontsize=10)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=80, metadata={"Software": None})


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Write the tables and, if matplotlib is installed, the figure."""
    with atomic_write(folder / "operations.md") as partial:
        partial.write_text(report(results), encoding="utf-8")
    if find_spec("matplotlib") is None:
        logger.warning('There is no figure, because matplotlib is not installed: pip install "blossomrec-hf[report]".')
    else:
        draw(results, folder / "operations.png")


@exit_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--lengths", default=LENGTHS)
    parser.add_argument("--what", default="core,training,inference")
    parser.add_argument("--contestants", default="blossom,full (cuDNN)")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each figure")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the results are written")
    parser.add_argument(
        "--from", dest="sources", type=Path, nargs="+", help="results to join and draw, in place of new ones"
    )
    args, further = parser.parse_known_args()
    set_up_logging()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = join([read_json(path) for path in args.sources]) if args.sources else measure(args, further)
    write_json(args.folder / "operations.json", results)
    write_results(results, args.folder)
    print(report(results))


if __name__ == "__main__":
    main()
