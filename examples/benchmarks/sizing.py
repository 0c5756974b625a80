"""
A sizing formula: memory per GPU and items per second of training, from the numbers of items, layers and GPUs, the
width and the length of histories.

    python examples/benchmarks/sizing.py --items 100_000_000 --num_negatives 1024 --gpus 8 --sharded --memory 139
    python examples/benchmarks/sizing.py --results scaling.jsonl        # next to what scaling.py has measured
    python examples/benchmarks/sizing.py --results scaling.jsonl --fit  # the rates of another machine

The memory is counted: weights, gradients and states of AdamW by dtype, the table that FSDP2 gathers, the gradients of
lookups, what the layers keep for the backward pass, and the workspaces of cuBLAS. The time is counted work (bytes,
floating-point operations) divided by the rates in `RATES`, which are measured. It is that of bf16 training, compiled
and with graphs (replicated) or without either (FSDP2), of at least about 16,384 items per step and GPU, on one
machine, with `blossom` in every layer and a feed-forward width of twice the hidden size.
"""

import argparse
import json
from dataclasses import astuple, dataclass, fields, replace
from math import log2
from pathlib import Path

import numpy as np

from blossomrec_hf.utils.command_line import HelpFormatter, exit_on_error


MIB = 2**20
FLOAT, HALF = 4, 2  # bytes of float32 and bf16
ADAM = 2 * FLOAT  # two moments per weight
COMPRESS_BLOCK, COMPRESS_STRIDE = 32, 16  # defaults of `BlossomRecConfig`

# What every line of scaling.py has, among others.
REPORTED = set(
    "processes kind execution objective num_negatives items max_length items_per_second step_ms persistent_MiB peak_MiB".split()
)

# cuBLAS keeps 32 MiB for each stream and thread that multiplies matrices (Hopper). Without graphs, one stream of two
# threads does; with graphs five workspaces were measured: the warm-up and the capture have streams of their own.
WORKSPACE, GRAPH_WORKSPACES, EAGER_WORKSPACES = 32 * MIB, 5, 2


@dataclass(frozen=True)
class Rates:
    """
    Measured with scaling.py; all other numbers of this file are counted. The defaults were fitted to seven lines of
    one machine with H200s (PyTorch 2.11, 2026-11-27). Replicated: 3,416 and 100,000 items of length 1,024 and 5 M items
    on one GPU, 3,416 items of both lengths on two. Sharded: 5 M and 20 M items on four.
    """

    bandwidth: float = 3.54e12  # bytes per second that kernels read and write in GPU memory
    matmul: float = 2.42e14  # floating-point operations per second of matrix products
    exchange: float = 2.74e11  # bytes per second that a GPU sends
    exchange_start: float = 1.77e-4  # seconds per exchange of gradients, of any size
    layer: float = 1.93e-8  # seconds per item, layer and 128 of width, of all but products; length 1,024
    octave: float = 0.0416  # share that `layer` grows by with each doubling of the length
    launch: float = 1.69e-2  # seconds per layer for the CPU to launch a step without graphs; measured with two layers


RATES = Rates()


@dataclass(frozen=True)
class Training:
    """
    What is trained.

    Args:
        items: number of items of the catalog.
        gpus: number of GPUs.
        tokens: items per step and GPU.
        max_length: length of the histories.
        hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads: of the model.
        sharded: whether weights are sharded over the GPUs (FSDP2) instead of replicated.
        num_negatives: number of items of the sampled softmax; 0 for the full softmax.

    Raises:
        ValueError: if a number is too small, or the width cannot be divided among the heads.
    """

    items: int
    gpus: int = 1
    tokens: int = 65536
    max_length: int = 1024
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    sharded: bool = False
    num_negatives: int = 0

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name in ("sharded", "num_negatives") else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` is {value!r}; it must be {least} or more.")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}; it must be an even multiple of `num_attention_heads`, "
                f"{self.num_attention_heads}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` is {self.num_key_value_heads}; it must divide `num_attention_heads`, "
                f"{self.num_attention_heads}."
            )

    @property
    def table(self) -> int:
        """Number of weights of the item table."""
        return (self.items + 2) * self.hidden_size

    @property
    def layer_weights(self) -> int:
        """Number of weights of all layers."""
        width, heads = self.hidden_size, self.num_attention_heads
        head = width // heads
        attention = width * (2 * width + 2 * head * self.num_key_value_heads) + 2 * heads * (width + 1)
        joined = COMPRESS_BLOCK * head
        compressor = joined * (joined + 1) + joined * head + joined * self.num_key_value_heads
        feed_forward = 2 * width * 2 * width + 3 * width
        return self.num_hidden_layers * (attention + compressor + feed_forward + 4 * width) + 2 * width

    @property
    def weights(self) -> int:
        """Number of weights of the model."""
        return self.table + self.layer_weights

    def persistent_bytes(self) -> int:
        """Memory between two steps: float32 weights, AdamW, kept gradients, int64 counts of items, workspaces."""
        counts = 8 * self.items
        if self.sharded:  # gradients are freed
            return (FLOAT + ADAM) * self.weights // self.gpus + counts + EAGER_WORKSPACES * WORKSPACE
        return (2 * FLOAT + ADAM) * self.weights + counts + GRAPH_WORKSPACES * WORKSPACE

    def activation_bytes(self) -> int:
        """What the layers keep for the backward pass."""
        width = self.hidden_size
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        kv_width = width // heads * kv_heads
        # Two norms: inputs and outputs in float32, outputs in bf16 as inputs of products; two masks of dropout.
        residual = 2 * width * (2 * FLOAT + HALF + 1)
        # q, k and v; q and k rotated; the outputs of both streams and their sum; sums of exponentials; gates.
        attention = HALF * (width + 2 * kv_width + width + kv_width + 3 * width) + FLOAT * 4 * heads
        # Windows of keys and the layer between, per key/value head.
        joined = COMPRESS_BLOCK * width // heads
        compressor = HALF * kv_heads * 2 * joined // COMPRESS_STRIDE
        feed_forward = HALF * 2 * 2 * width  # before and after GELU
        return self.tokens * self.num_hidden_layers * (residual + attention + compressor + feed_forward)

    def loss_bytes(self) -> int:
        """What a sampled softmax needs: logits in bf16, corrected, joined and as a gradient. The full one: none."""
        if not self.num_negatives:
            return 0
        rows = 3 * FLOAT * self.tokens * self.hidden_size  # states, rows of the targets and their gradients
        return rows + self.tokens * self.num_negatives * (HALF + 3 * FLOAT)

    def pass_bytes(self) -> int:
        """What forward and backward passes need next to what stays between two steps."""
        layers = self.activation_bytes() + self.loss_bytes()
        if self.sharded:
            # The gathered table, and in this order: the loss; the gradient of its lookup and the layers; the gradients
            # of both lookups. In the exchange: the gradient, this GPU's share of the sum, and that in float32; with
            # several GPUs one more table was measured then.
            gathered = HALF * self.table
            exchanged = (2 if self.gpus > 1 else 1) * gathered + (HALF + FLOAT) * self.table // self.gpus
            return max(gathered + layers, 2 * gathered + self.activation_bytes(), 3 * gathered, exchanged)
        # Gradients of several GPUs are computed before they are added to the flat ones.
        added = FLOAT * self.weights if self.gpus > 1 else 0
        if self.num_negatives:  # gradients of both lookups, one of which becomes the kept one
            return max(layers + FLOAT * self.table, 2 * FLOAT * self.table) + added
        return layers + (2 * HALF + FLOAT) * self.table + added  # rounded table; its gradient, rounded and in float32

    def peak_bytes(self) -> int:
        """The most memory that a step needs, the pool of its graph included."""
        return self.persistent_bytes() + self.pass_bytes()

    def peak_allocated_bytes(self) -> int:
        """
        The most memory that PyTorch counts as allocated. The passes of a graph are counted only while it is captured:
        before AdamW has its states, and with several GPUs next to a copy of the gradients. Later they run inside the
        graph's pool.
        """
        if self.sharded:
            return self.peak_bytes()
        copied = FLOAT * self.weights if self.gpus > 1 else 0
        return max(self.persistent_bytes(), self.peak_bytes() - ADAM * self.weights + copied)

    def layer_operations(self) -> int:
        """Floating-point operations of the layers' products per item, forward and backward."""
        joined = COMPRESS_BLOCK * self.hidden_size // self.num_attention_heads
        head = self.hidden_size // self.num_attention_heads
        compressor = joined * (joined + head)  # weights; used per window and key/value head, others per item
        layer = self.layer_weights // self.num_hidden_layers - compressor
        used = layer + compressor * self.num_key_value_heads / COMPRESS_STRIDE
        return int(6 * self.num_hidden_layers * used)

    def step_seconds(self, rates: Rates = RATES) -> float:
        """Time of a step."""
        length = 1 + rates.octave * log2(self.max_length / 1024)
        layers = self.tokens * self.num_hidden_layers * self.hidden_size / 128 * rates.layer * length
        layers += self.tokens * self.layer_operations() / rates.matmul
        if self.num_negatives:  # written and read, forward and backward
            loss = 4 * self.loss_bytes() / rates.bandwidth
        else:  # four products: logits, logits again, and two gradients
            loss = 8 * self.tokens * self.table / rates.matmul
        local = self.weights / self.gpus if self.sharded else self.weights
        moved = (1 + 2 + 7) * FLOAT * local  # norm, clipping, AdamW
        share = (self.gpus - 1) / self.gpus
        if self.sharded:
            # The table is gathered once, and its gradient is summed once. One GPU exchanges all of it with itself, as slowly.
            exchange = HALF * self.table * (share or 1) / rates.exchange
            # Rounded and copied for the gather; copied after it.
            gathered = (FLOAT + HALF + 2 * HALF) * local + 2 * HALF * self.table
            # The CPU launches the passes while the GPU gathers and computes; what follows has been launched by then.
            passes = max(rates.launch * self.num_hidden_layers, exchange + gathered / rates.bandwidth + layers + loss)
            # Two gradients filled and added, copied for the exchange; the sum in float32.
            moved += (2 + 3 + 2) * HALF * self.table + (HALF + FLOAT) * local
            return passes + exchange + moved / rates.bandwidth
        moved += (2 + 3) * FLOAT * self.table  # two gradients filled and added
        if self.gpus == 1:
            return layers + loss + moved / rates.bandwidth
        moved += 4 * FLOAT * self.weights  # flat gradients set to 0 and added to
        exchange = rates.exchange_start + 2 * FLOAT * self.weights * share / rates.exchange
        return layers + loss + moved / rates.bandwidth + exchange

    def items_per_second(self, rates: Rates = RATES) -> float:
        """Events that all GPUs together read per second."""
        return self.gpus * self.tokens / self.step_seconds(rates)


def largest_catalog(training: Training, memory: float) -> int:
    """The largest number of items whose peak memory is at most `memory` bytes per GPU; 0 if not even one fits."""
    low, high = 0, 2**40
    while low < high:
        middle = (low + high + 1) // 2
        fits = replace(training, items=middle).peak_bytes() <= memory
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def read_reports(path: Path) -> list[dict]:
    """
    The lines of a file that scaling.py wrote.

    Raises:
        ValueError: if a line is damaged.
        OSError: if the file cannot be read.
    """
    reports = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            report = json.loads(line)
        except ValueError:
            report = None
        if not isinstance(report, dict) or not REPORTED <= report.keys():
            raise ValueError(f"`results` is {path}, damaged in line {number}; remove that line, or give another file.")
        reports.append(report)
    return reports


def of_report(report: dict) -> Training:
    """What a line of scaling.py has trained."""
    names = {field.name for field in fields(Training)}
    known = {name: value for name, value in report.items() if name in names}
    negatives = report["num_negatives"] if report["objective"] == "sampled_softmax" else 0
    sharded = report["kind"] == "sharded"
    return Training(**known | {"gpus": report["processes"], "sharded": sharded, "num_negatives": negatives})


def fit_rates(reports: list[dict]) -> Rates:
    """
    The rates under which the formula is nearest to the measured times (least squares of the relative errors). A rate
    that no line depends on keeps its default.
    """
    trainings, measured = [of_report(line) for line in reports], [line["step_ms"] / 1e3 for line in reports]
    logs = np.log(astuple(RATES))

    def errors(logs: np.ndarray) -> np.ndarray:
        rates = Rates(*np.exp(logs).tolist())
        return np.log([training.step_seconds(rates) for training in trainings]) - np.log(measured)

    for _ in range(50):  # Gauss-Newton steps of at most a factor of e^0.3
        now = errors(logs)
        slopes = np.stack([(errors(logs + shift) - now) / 1e-4 for shift in 1e-4 * np.eye(len(logs))], axis=1)
        logs = logs - np.clip(np.linalg.lstsq(slopes, now, rcond=1e-6)[0], -0.3, 0.3)
    return Rates(*np.exp(logs).tolist())


def print_comparison(reports: list[dict]) -> None:
    """
    Measured memory and time of each line of scaling.py, in brackets by how much the formula differs, and the time of
    one GPU in the same way and in its fastest way, relative to the line's.
    """
    columns = "GPUs|weights|items|length|model|between steps, GiB|peak, GiB|ms per step|one GPU|fastest".split("|")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    lines = sorted(((of_report(line), line) for line in reports), key=lambda pair: astuple(pair[0])[::-1])
    for training, report in lines:
        compiled = ", compiled" if report["execution"]["compiled"] else ""
        cells = [training.gpus, report["kind"] + compiled, f"{training.items:,}", f"{training.max_length:,}"]
        cells.append(f"{training.num_hidden_layers} x {training.hidden_size}")
        for name, computed in (
            ("persistent_MiB", training.persistent_bytes()),
            ("peak_MiB", training.peak_allocated_bytes()),
        ):
            cells.append(f"{report[name] / 1024:.2f} ({computed / MIB / report[name] - 1:+.0%})")
        cells.append(f"{report['step_ms']:.2f} ({training.step_seconds() * 1e3 / report['step_ms'] - 1:+.0%})")
        for kinds in ([training.sharded], [False, True]):
            alone = [replace(training, gpus=1, sharded=kind) for kind in kinds]
            times = [other["step_ms"] for of_other, other in lines if of_other in alone]
            cells.append(f"{min(times) / report['step_ms']:.2f}" if times else "–")
        print("| " + " | ".join(map(str, cells)) + " |")


def print_estimate(training: Training, memory_gib: float, events: int) -> None:
    """What one configuration needs."""
    seconds = training.step_seconds()
    print(f"weights: {training.weights:,}, {FLOAT * training.weights / 2**30:.1f} GiB in float32")
    print(f"memory per GPU between steps: {training.persistent_bytes() / 2**30:.1f} GiB")
    print(f"peak memory per GPU: {training.peak_bytes() / 2**30:.1f} GiB of {memory_gib:.0f}")
    print(f"largest catalog: {largest_catalog(training, memory_gib * 2**30):,} items")
    print(f"time per step of {training.gpus * training.tokens:,} events: {seconds * 1e3:.1f} ms")
    print(f"events per second: {training.items_per_second():,.0f}")
    print(f"an epoch of {events:,} events: {events / training.items_per_second() / 3600:.2f} hours")


@exit_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    for field in fields(Training):
        if field.name == "sharded":
            parser.add_argument("--sharded", action="store_true", help="FSDP2 instead of a replicated model")
        else:
            default = 1_000_000 if field.name == "items" else field.default
            parser.add_argument(f"--{field.name}", type=int, default=default)
    parser.add_argument("--events", type=int, default=10_000_000_000, help="events of an epoch")
    parser.add_argument("--memory", type=float, default=78.0, help="GiB of a GPU")
    parser.add_argument("--results", type=Path, help="compare with the lines of a file that scaling.py wrote")
    parser.add_argument("--fit", action="store_true", help="print the rates that fit these lines best")
    args = parser.parse_args()
    if args.fit and args.results is None:
        parser.error("--fit needs --results, a file that scaling.py wrote")
    if args.results is not None:
        reports = read_reports(args.results)
        if not reports:
            raise ValueError(f"`results` is {args.results}, which has no line; measure with scaling.py first.")
        if args.fit:
            print(fit_rates(reports))
        else:
            print_comparison(reports)
        return
    if args.memory <= 0 or args.events < 1:
        parser.error(f"--memory is {args.memory} and --events is {args.events}; they must be above 0")
    training = Training(**{field.name: getattr(args, field.name) for field in fields(Training)})
    print_estimate(training, args.memory, args.events)


if __name__ == "__main__":
    main()
