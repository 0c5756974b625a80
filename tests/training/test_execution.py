"""When steps are compiled and captured."""

import json
from types import SimpleNamespace

import pytest
import torch
from small_cases import make_model

from blossomrec_hf.data import split
from blossomrec_hf.model import ops_triton_cross_entropy
from blossomrec_hf.training import LoopArguments, TrainingLoop
from blossomrec_hf.training.execution import is_compiled, why_not_captured
from blossomrec_hf.utils.environment import COMPILE_PASSES


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def reason(model, *, cuda_graphs=True, sharded=False, max_tokens=65536, **accelerator):
    accelerator = {"device": GPU, "scaler": None, "mixed_precision": "bf16", "num_processes": 4, **accelerator}
    args = LoopArguments(cuda_graphs=cuda_graphs, gradient_accumulation_steps=2)
    return why_not_captured(args, SimpleNamespace(**accelerator), model, max_tokens=max_tokens, sharded=sharded)


def test_steps_are_captured_on_every_gpu_but_for_a_reason():
    model = make_model()
    assert reason(model) is None
    assert "cuda_graphs" in reason(model, cuda_graphs=False)
    assert "no GPU" in reason(model, device=CPU)
    assert "sharded" in reason(model, sharded=True)
    assert "fp16" in reason(model, scaler=object())


def test_steps_of_a_large_catalog_are_captured_where_no_logits_are_written():
    def large(implementation, hidden_size=32, **accelerator):
        model = make_model(cross_entropy_implementation=implementation, hidden_size=hidden_size)
        model.config.vocab_size = 1_000_000
        return reason(model, **accelerator)

    if ops_triton_cross_entropy.triton is not None:
        assert large("auto") is None and large("triton") is None
    for refused in (
        large("torch"),
        large("liger"),
        large("auto", hidden_size=48),
        large("auto", mixed_precision="no"),
    ):
        assert "65,536 positions and 1,000,000 items do not fit" in refused


def test_long_runs_on_a_gpu_are_compiled_by_default():
    args = LoopArguments()
    assert is_compiled(args, GPU, COMPILE_PASSES) and not is_compiled(args, GPU, COMPILE_PASSES - 1)
    assert not is_compiled(args, CPU, COMPILE_PASSES)
    assert is_compiled(LoopArguments(torch_compile=True), CPU, 1)
    assert not is_compiled(LoopArguments(torch_compile=False), GPU, COMPILE_PASSES)


@pytest.mark.slow
@pytest.mark.parametrize("precision, tolerance", [("no", 1e-5), ("bf16", 1e-2)])
def test_compiled_training_has_the_losses_of_the_training(log, tmp_path, precision, tolerance):
    """On the CPU; needs a C++ compiler."""
    losses = []
    for compiled in (False, True):
        torch.manual_seed(1)
        args = LoopArguments(
            output_dir=str(tmp_path / str(compiled)),
            max_length=20,
            max_steps=6,
            tokens_per_step=200,
            logging_steps=1,
            mixed_precision=precision,
            torch_compile=compiled,
        )
        model = make_model(hidden_dropout_prob=0.0, num_hidden_layers=1)
        loop = TrainingLoop(model, split(log[0], "train"), args=args)
        loop.run()
        assert loop.update.execution == {"compiled": compiled, "CUDA graphs": False}
        lines = (tmp_path / str(compiled) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=tolerance, abs=tolerance) and len(losses[0]) == 6
