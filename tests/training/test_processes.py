import json
import os
import re
import shutil
import signal

import forked_commands
import numpy as np
import pytest
import torch
from forked_commands import run_in_fork
from safetensors.torch import load_file

from blossomrec_hf.training.checkpoints import numbered_folders


SCRIPT = """
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from small_cases import make_model, small_log
from blossomrec_hf.data import build_sequences, split, split_by_leave_one_out
from blossomrec_hf.training import LoopArguments, TrainingLoop
from blossomrec_hf.evaluation import evaluate

folder, accumulation, sharded = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "sharded"
stop_at, stop_by = int(sys.argv[4]), sys.argv[5]
(Path(folder).parent / f"process-{os.environ['RANK']}").write_text(str(os.getpid()))
torch.set_num_threads(1)
torch.manual_seed(1)
# Without dropout, and in float64: what is selected must not hang on a rounding.
model = make_model(hidden_dropout_prob=0.0).double()
# Some steps hold two or three histories, some of them too short for a window of the compressor.
args = LoopArguments(
    output_dir=folder, max_length=20, num_train_epochs=2, tokens_per_step=45, learning_rate=1e-2, warmup_steps=4,
    logging_steps=1, save_steps=3, gradient_accumulation_steps=accumulation, resume=True
)
dataset, tokenizer = build_sequences(small_log())
places = [range(len(items)) for items in dataset["input_ids"]]
dataset = dataset.add_column("weights", [[0.5 + place % 2 for place in row] for row in places])
dataset = dataset.add_column("basket_starts", [[place % 4 != 3 for place in row] for row in places])
dataset = split_by_leave_one_out(dataset)
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

def kill_all():
    every = [int(path.read_text()) for path in Path(folder).parent.glob("process-*")]
    for process in sorted(every, key=os.getpid().__eq__):
        os.kill(process, signal.SIGKILL)

# One process gets SIGTERM while it works on a step, or kills all of them soon after; each notes which histories it reads.
class Loop(TrainingLoop):
    def training_step(self, rows):
        with open(f"{folder}-rows-{self.accelerator.process_index}.txt", "a") as file:
            print(self.state.epoch, *(row for part in self.plan.own_parts(rows) for row in part), file=file)
        super().training_step(rows)
        if self.state.step == stop_at and self.accelerator.process_index == self.accelerator.num_processes - 1:
            if stop_by == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                threading.Timer(random.uniform(0, 0.05), kill_all).start()

loop = Loop(model, *views, args=args, tokenizer=tokenizer, accelerator=accelerator)
assert sharded == any(isinstance(parameter, DTensor) for parameter in loop.bare_model.parameters())
loop.run()
figures = evaluate(loop.bare_model, split(dataset, "test"), max_length=20, max_tokens=100, accelerator=loop.accelerator)
if loop.accelerator.is_main_process:
    print(json.dumps(figures))
loop.accelerator.end_training()
"""


def start(folder, num_processes, accumulation=1, kind="replicated", stop_at=0, stop_by="SIGTERM", **options):
    """Trains on so many processes, or goes on with what is in `folder`."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    script = folder.parent / f"{folder.name}.py"
    script.write_text(SCRIPT)
    arguments = [str(folder), str(accumulation), kind, str(stop_at), stop_by]
    return run_in_fork(script, arguments, environment, folder.parent, num_processes=num_processes, **options)


def launch(folder, num_processes, accumulation=1, kind="replicated"):
    """Trains to the end; returns the lines of metrics, the weights and the test figures."""
    done = start(folder, num_processes, accumulation, kind)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(folder / "model.safetensors"), json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("alone") / "one", 1)


@pytest.mark.parametrize(("kind", "accumulation"), [("replicated", 1), ("replicated", 2), ("sharded", 1)])
def test_two_processes_train_as_one(alone, tmp_path, kind, accumulation):
    """Also on events with weights and in baskets, as in all tests here."""
    two = launch(tmp_path / "two", 2, accumulation, kind)
    check_same(alone, two)
    saved = json.loads((tmp_path / "two" / "config.json").read_text())  # where a sharded model has a class of its own
    assert saved["auto_map"]["AutoModelForCausalLM"] == "modeling_blossomrec.BlossomRecForSequentialRecommendation"
    assert (tmp_path / "two" / "modeling_blossomrec.py").exists()
    assert np.mean([line["loss"] for line in two[0][-10:] if "loss" in line]) < two[0][0]["loss"]

    read = [line.split() for index in (0, 1) for line in (tmp_path / f"two-rows-{index}.txt").read_text().splitlines()]
    for epoch in ("0", "1"):
        rows = [int(row) for first, *rows in read if first == epoch for row in rows]
        assert sorted(rows) == list(range(60))  # each history once an epoch, on one of the processes


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [(2, 1, "replicated"), (1, 2, "replicated"), (2, 2, "sharded")],
)
def test_what_sigterm_stopped_goes_on_with_any_number_of_processes(alone, tmp_path, before, after, kind):
    stop_at = int(np.random.default_rng().integers(3, 25))
    stopped = start(tmp_path / "run", before, kind=kind, stop_at=stop_at)
    assert stopped.returncode == 143, stopped.stderr
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{stop_at}"]
    resumed = launch(tmp_path / "run", after, kind=kind)
    check_same(alone, resumed)


@pytest.mark.parametrize(("kind", "numbers"), [("replicated", (2, 1)), ("sharded", (1,))])
def test_killed_on_two_processes_it_goes_on_with_two_or_one(alone, tmp_path, kind, numbers):
    stop_at = int(np.random.default_rng().integers(4, 25))
    killed = start(tmp_path / "killed", 2, kind=kind, stop_at=stop_at, stop_by="SIGKILL")
    assert killed.returncode == -signal.SIGKILL, (stop_at, killed.stderr)
    step, checkpoint = numbered_folders(tmp_path / "killed", "checkpoint")[-1]
    assert not json.loads((checkpoint / "run.json").read_text())["finished"], (stop_at, step)
    for after in numbers:
        shutil.copytree(tmp_path / "killed", tmp_path / f"on_{after}")
        check_same(alone, launch(tmp_path / f"on_{after}", after, kind=kind))


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_a_full_disk_ends_all_processes(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(forked_commands, "TIMEOUT", 60)
    full = start(tmp_path / "full", 2, kind=kind, max_file_bytes=16384)  # the first checkpoint is larger
    assert full.returncode == 1
    assert re.search(r"OSError: could not write \S+/checkpoint-3: .*\. What was there before is whole\.", full.stderr)
    assert not list((tmp_path / "full").glob("*checkpoint*"))


def test_whole_weights_do_not_resume_as_sharded_ones(tmp_path):
    assert start(tmp_path / "run", 2, stop_at=3).returncode == 143
    refused = start(tmp_path / "run", 2, kind="sharded")
    assert refused.returncode == 1
    message = r"ValueError: `resume`: \S+checkpoint-3 is of another run \(weights sharded: False there, True now\); give the "
    assert len(re.findall(message, refused.stderr)) == 2


def check_same(first_run, second_run):
    one, one_weights, one_figures = first_run
    two, two_weights, two_figures = second_run
    assert len(one) == len(two) > 40
    for first, second in zip(one, two):
        for name in ("loss", "grad_norm", "learning_rate", "validation_ndcg@10", "validation_mrr@20_unseen"):
            assert first.get(name) == pytest.approx(second.get(name), abs=1e-5), (name, first["step"])
    assert one_figures == pytest.approx(two_figures, abs=1e-6)
    for name, weight in one_weights.items():
        assert torch.allclose(weight, two_weights[name], atol=1e-5), name
