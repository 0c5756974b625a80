"""What to watch while a model trains."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from ..batches import HistoryStore, budget_batches
from ..evaluation.ranking import evaluating
from ..utils.progress import LogLines
from .state import LoopState


logger = logging.getLogger(__name__)


class RunningLoop(Protocol):
    """
    The attributes of [`~blossomrec_hf.training.TrainingLoop`] for callbacks.

    Attributes:
        bare_model: the model without wrappers.
        state: epoch, step and best figures.
        output_dir: folder of the run.
        accelerator: of the run.
    """

    bare_model: nn.Module
    state: LoopState
    output_dir: Path
    accelerator: Accelerator


class LoopCallback:
    """Methods that [`~blossomrec_hf.training.TrainingLoop`] calls; override those you need."""

    def on_step(self, loop: RunningLoop) -> None:
        """Called after each update of the weights. Must not wait for the device."""

    def on_validate(self, loop: RunningLoop, metrics: dict[str, float]) -> Mapping[str, float]:
        """Called after each validation, on every process. The values that it returns are logged with the figures."""
        return {}

    def on_end(self, loop: RunningLoop) -> None:
        """Called after the last step, when the model has the best weights."""


class LogLinesCallback(TrainerCallback):
    """
    Log lines in place of the bars of `Trainer`, for output that is no terminal: one per evaluation, and one a minute in
    between.
    """

    def __init__(self) -> None:
        self.training = self.evaluation = None
        self.loss = float("nan")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sizes = {"total": state.max_steps, "initial": state.global_step}
        self.training = LogLines(description="Training", enabled=state.is_world_process_zero, **sizes)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training.update()

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Mapping[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.loss = float(logs["loss"])
            self.training.set_postfix({"loss": f"{self.loss:.4f}"})

    def on_prediction_step(self, args: Any, state: Any, control: Any, *, eval_dataloader: Any, **kwargs: Any) -> None:
        if self.evaluation is None:
            total = len(eval_dataloader) if has_length(eval_dataloader) else 0
            self.evaluation = LogLines(total=total, description="Evaluating", enabled=state.is_world_process_zero)
        self.evaluation.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: Mapping[str, float], **kwargs: Any) -> None:
        self.evaluation = None
        if state.is_world_process_zero:
            wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
            found = {name: value for name, value in metrics.items() if name.endswith(f"_{wanted}")}
            figures = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            logger.info("Epoch %.4g, step %d: loss %.4f, %s", state.epoch or 0, state.global_step, self.loss, figures)


class SelectionWatch(LoopCallback, TrainerCallback):
    """
    Follows gates and selection over a run, with the loop or with `transformers.Trainer`: after each validation, the
    [`selection_statistics`] of a few fixed histories, as lines of `selection.jsonl` in the run's folder and, at the
    end, one picture, `selection.png` (if `matplotlib` is installed).

    Args:
        view: rows with `input_ids`, of which the longest up to `max_tokens` items are watched.
        max_length: how many of its latest items each gives.
        columns: other columns that the model reads, see `BlossomRecConfig.event_columns`.
    """

    def __init__(
        self,
        view: Dataset | Sequence[Mapping] | HistoryStore,
        *,
        max_length: int | None = None,
        max_tokens: int = 16384,
        columns: Sequence[str] = (),
    ):
        store = HistoryStore.from_rows(view, columns=columns, max_length=max_length).with_columns(columns)
        longest_first = np.argsort(-store.lengths, kind="stable")
        longest_first = longest_first[store.lengths[longest_first] > 0]
        self.store = store
        self.rows = longest_first[budget_batches(store.lengths[longest_first], max_tokens)[0]]

    def measure(self, model: nn.Module, file: Path | None, step: int) -> dict[str, float]:
        """The statistics of a model as it is; also appended to `file`, if there is one."""
        device = next(model.parameters()).device
        statistics = selection_statistics(model, self.store.to(device).pack(self.rows))
        if file is not None:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": step, **statistics}) + "\n")
        return statistics

    def on_validate(self, loop: RunningLoop, metrics: dict[str, float]) -> Mapping[str, float]:
        file = loop.output_dir / "selection.jsonl" if loop.accelerator.is_main_process else None
        return self.measure(loop.bare_model, file, loop.state.step)

    def on_end(self, loop: RunningLoop) -> None:
        if loop.accelerator.is_main_process:
            draw_selection(loop.output_dir)

    def on_evaluate(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        file = Path(args.output_dir) / "selection.jsonl" if state.is_world_process_zero else None
        self.measure(model, file, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            draw_selection(Path(args.output_dir))


def selection_statistics(model: nn.Module, batch: dict[str, torch.Tensor | int]) -> dict[str, float]:
    """
    What the layers of a model attend to in one packed batch.

    Returns, for each layer i that has the part in question:
        - `layer_i/gate_long_h`, `layer_i/gate_short_h`: the mean gate of each head h (`gate_NAME_h` of another stream);
        - `layer_i/distance_n`: the share of the selected blocks that lie n to 2n − 1 blocks back, n a power of 2;
        - `layer_i/entropy`: the mean entropy (nats) of the importance, all blocks not selected taken as one;
        - `layer_i/nothing_selected`: the share of (query, key/value head) pairs with a candidate that selected none.
    """
    with torch.no_grad(), evaluating(model):
        selections = model.base_model(**batch, output_selection=True).selections
    offsets = batch["cu_seq_lens_q"].long()
    lengths = offsets.diff()
    positions = torch.arange(int(offsets[-1]), device=offsets.device) - offsets[:-1].repeat_interleave(lengths)
    own_blocks = positions // model.config.selection_block_size

    statistics: dict[str, float] = {}
    for layer, selection in enumerate(selections):
        prefix = f"layer_{layer}/"
        if selection.gates is not None:
            names = model.base_model.layers[layer].self_attn.stream_names
            for name, gates in zip(names, selection.gates[0].float().mean(0).unbind(-1), strict=True):
                for head, mean in enumerate(gates.tolist()):
                    statistics[f"{prefix}gate_{name.removesuffix('_term')}_{head}"] = mean
        if selection.block_indices is None:
            continue
        has_candidates = own_blocks > 0
        blocks, importance = (
            selection.block_indices[0][has_candidates],
            selection.importance[0][has_candidates].float(),
        )
        selected = blocks >= 0
        distances = (own_blocks[has_candidates][:, None, None] - blocks)[selected]
        counts = torch.bincount(distances.float().log2().floor().long()) if len(distances) else distances
        for power, count in enumerate(counts.tolist()):
            statistics[f"{prefix}distance_{2**power}"] = count / len(distances)
        kept = torch.where(selected, importance, 0.0)
        parts = torch.cat([kept, (1 - kept.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)
        if len(parts):
            statistics[f"{prefix}entropy"] = torch.special.entr(parts).sum(-1).mean().item()
            statistics[f"{prefix}nothing_selected"] = 1 - selected.any(-1).float().mean().item()
    return statistics


def draw_selection(folder: Path) -> Path | None:
    """
    Draws `selection.png` from the `selection.jsonl` (and the gradient norms of the `metrics.jsonl`) in a run's folder;
    `None` where there is nothing to draw or no `matplotlib`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = _read_lines(folder / "selection.jsonl")
    norms = [line for line in _read_lines(folder / "metrics.jsonl") if "grad_norm" in line]
    if not lines:
        return None
    steps = [line["step"] for line in lines]
    names = sorted({name for line in lines for name in line if name != "step"})
    layers = sorted({name.split("/")[0] for name in names})
    gates = {name.split("/")[1].rpartition("_")[0] for name in names if "/gate_" in name}
    kinds = (*sorted(gates | {"gate_long", "gate_short"}), "distance", "entropy")
    figure = Figure(figsize=(4 * len(kinds), 3 * len(layers) + 3), layout="constrained")
    panels = figure.subplots(len(layers) + 1, len(kinds), squeeze=False)
    for row, layer in enumerate(layers):
        for panel, kind in zip(panels[row], kinds):
            panel.set_title(f"{layer.replace('_', ' ')}: {kind.replace('_', ' ')}", fontsize=10)
            drawn = [name for name in names if name.startswith(f"{layer}/{kind}")]
            drawn.sort(key=lambda name: (len(name), name))
            for name in drawn:
                label = name.removeprefix(f"{layer}/{kind}").strip("_")
                panel.plot(steps, [line.get(name, 0.0) for line in lines], label=label)
            if 1 < len(drawn) <= 16:
                panel.legend(
                    fontsize=6, ncols=2, title="blocks back" if kind == "distance" else "head", title_fontsize=6
                )
    for layer in layers:
        name = f"{layer}/nothing_selected"
        if name in names:
            panels[-1][0].plot(steps, [line.get(name, 0.0) for line in lines], label=layer.replace("_", " "))
    panels[-1][0].set_title("share of queries with nothing selected", fontsize=10)
    panels[-1][0].legend(fontsize=6)
    panels[-1][1].plot([line["step"] for line in norms], [line["grad_norm"] for line in norms])
    panels[-1][1].set_title("gradient norm", fontsize=10)
    for panel in panels[-1][2:]:
        panel.axis("off")
    for panel in panels.flat:
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
    figure.savefig(folder / "selection.png", dpi=100)
    return folder / "selection.png"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
