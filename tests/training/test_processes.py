import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file


SCRIPT = """
import json
import sys
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from training_cases import make_model, small_log
from blossomrec_hf.data import build_sequences, split
from blossomrec_hf.training import LoopArguments, TrainingLoop, evaluate

folder, accumulation, sharded = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "sharded"
torch.set_num_threads(1)
torch.manual_seed(1)
# Without dropout, and in float64: what is selected must not hang on a rounding.
model = make_model(hidden_dropout_prob=0.0).double()
# Some steps hold two or three histories, some of them too short for a window of the compressor.
args = LoopArguments(
    output_dir=folder, max_length=20, num_train_epochs=2, tokens_per_step=45, learning_rate=1e-2, warmup_steps=4,
    logging_steps=1, gradient_accumulation_steps=accumulation
)
dataset, tokenizer = build_sequences(small_log())
accelerator = None
if sharded:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Accelerate shards on accelerators only; torch does it anywhere.
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
views = split(dataset, "train"), split(dataset, "validation")
loop = TrainingLoop(model, *views, args=args, tokenizer=tokenizer, accelerator=accelerator)
assert sharded == any(isinstance(parameter, DTensor) for parameter in loop.model.parameters())
loop.run()
figures = evaluate(loop.model, split(dataset, "test"), max_length=20, max_tokens=100, accelerator=loop.accelerator)
if loop.accelerator.is_main_process:
    print(json.dumps(figures))
loop.accelerator.end_training()
"""


def launch(folder, num_processes, accumulation=1, kind="replicated"):
    """Trains on so many processes; returns the lines of metrics, the weights and the test figures."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = folder.parent / f"{folder.name}.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command = [*launcher, str(script), str(folder), str(accumulation), kind]
    done = subprocess.run(
        command, env={**environment, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(folder / "model.safetensors"), json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("alone") / "one", 1)


@pytest.mark.parametrize(("kind", "accumulation"), [("replicated", 1), ("replicated", 2), ("sharded", 1)])
def test_two_processes_train_as_one(alone, tmp_path, kind, accumulation):
    one, one_weights, one_figures = alone
    two, two_weights, two_figures = launch(tmp_path / "two", 2, accumulation, kind)
    assert len(one) == len(two) > 40
    for first, second in zip(one, two):
        for name in ("loss", "grad_norm", "learning_rate", "validation_ndcg@10", "validation_mrr@20_unseen"):
            assert first.get(name) == pytest.approx(second.get(name), abs=1e-5), (name, first["step"])
    assert one_figures == pytest.approx(two_figures, abs=1e-6)
    for name, weight in one_weights.items():
        assert torch.allclose(weight, two_weights[name], atol=1e-5), name
    assert np.mean([line["loss"] for line in two[-10:] if "loss" in line]) < two[0]["loss"]
