"""What arrives in `forward` is what was packed: in Trainer, under Accelerate, on two processes."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from test_batches import built, segments
from transformers import Trainer, TrainingArguments

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.batches import HistoryWindows, PackedDataLoader, PackedTrainerMixin


class PackedTrainer(PackedTrainerMixin, Trainer):
    pass


def tiny_model(vocab_size: int) -> BlossomRecForSequentialRecommendation:
    torch.manual_seed(0)
    config = BlossomRecConfig(
        vocab_size=vocab_size, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16
    )
    return BlossomRecForSequentialRecommendation(config)


def test_trainer_trains_on_exactly_the_packed_batches(tmp_path):
    dataset = built(np.random.default_rng(0).integers(4, 50, 60).tolist())
    windows = HistoryWindows(dataset, 30)
    model = tiny_model(max(item for row in dataset["input_ids"] for item in row) + 1)
    arrived = []
    forward = model.forward

    def recording(*args, **kwargs):
        arrived.append({name: value.clone() if torch.is_tensor(value) else value for name, value in kwargs.items()})
        return forward(*args, **kwargs)

    model.forward = recording
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=2, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, seed=5
    )
    trainer = PackedTrainer(model, arguments, train_dataset=windows, max_tokens=256)
    trainer.train()
    loader = PackedDataLoader(windows, 256, seed=5)
    expected = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        expected += list(loader)
    assert len(arrived) == len(expected) == 2 * len(loader)
    for there, here in zip(arrived, expected):
        assert same({name: there[name] for name in here}, here)
    wanted = sorted(row["input_ids"][: row["train_end"]][-30:] for row in dataset if row["train_end"] >= 2)
    for epoch in range(2):
        batches = arrived[epoch * len(loader) : (epoch + 1) * len(loader)]
        assert sorted(history for batch in batches for history in segments(batch)) == wanted
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(arrived) and all(np.isfinite(losses)) and losses[-1] < losses[0]


def same(there: dict, here: dict) -> bool:
    return there.keys() == here.keys() and all(
        torch.equal(there[name], value) if torch.is_tensor(value) else there[name] == value
        for name, value in here.items()
    )


def test_workers_that_run_ahead_give_the_epoch_that_is_asked_for():
    windows = HistoryWindows(built(np.random.default_rng().integers(4, 50, 60).tolist()), 20, window="random_crop")
    plain, ahead = PackedDataLoader(windows, 128), PackedDataLoader(windows, 128, num_workers=2)
    # In order, as the workers expect; the same again; back; one left early; on from there.
    for epoch, taken in ((0, None), (1, None), (2, None), (2, None), (0, None), (1, 3), (2, None), (3, 0), (3, None)):
        for loader in (plain, ahead):
            loader.set_epoch(epoch)
        wanted, got = (list(islice(loader, taken)) for loader in (plain, ahead))
        assert len(wanted) == (len(plain) if taken is None else taken)
        assert all(map(same, got, wanted)) and len(got) == len(wanted), (epoch, taken)


def test_workers_go_on_where_no_more_than_an_epoch_is_taken():
    windows = HistoryWindows(built(np.random.default_rng().integers(4, 50, 60).tolist()), 20)
    loader = PackedDataLoader(windows, 128, num_workers=1)
    sampler, begun = loader._all_epochs.batch_sampler, []
    sampler.set_epoch = lambda epoch: begun.append(epoch) or setattr(sampler, "epoch", epoch)
    for epoch in range(3):
        loader.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(len(loader)):  # as `Trainer` does it
            next(batches)
    assert begun == [0]


@pytest.mark.parametrize("workers", [0, 1])
def test_trainer_resumes_inside_an_epoch(tmp_path, workers):
    dataset = built(np.random.default_rng(1).integers(4, 50, 60).tolist())
    windows = HistoryWindows(dataset, 20, window="random_crop")
    steps = len(PackedDataLoader(windows, 128))
    assert steps > 3

    def train(stop: int, resume: bool) -> list[torch.Tensor]:
        model = tiny_model(max(item for row in dataset["input_ids"] for item in row) + 1)
        arguments = TrainingArguments(
            tmp_path,
            max_steps=3 * steps,
            use_cpu=True,
            report_to=[],
            save_steps=stop,
            dataloader_num_workers=workers,
            lr_scheduler_type="constant",
        )
        trainer = PackedTrainer(model, arguments, train_dataset=windows, max_tokens=128)
        trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{stop}" if resume else None)
        return list(model.parameters())

    whole, resumed = (train(steps + 2, resume) for resume in (False, True))
    assert all(map(torch.equal, whole, resumed))


def test_the_mixin_needs_windows(tmp_path):
    with pytest.raises(ValueError, match="train_dataset is a Dataset; packing needs HistoryWindows"):
        arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
        PackedTrainer(tiny_model(20), arguments, train_dataset=built([9, 9]), max_tokens=64)


def test_a_batch_of_nothing_but_fill_runs_every_parameter():
    model = tiny_model(50).train()
    windows = HistoryWindows(built([9]), 30)
    batches = [batch for rank in range(2) for batch in PackedDataLoader(windows, 64, num_replicas=2, rank=rank)]
    empty = next(batch for batch in batches if not segments(batch))
    loss = model(**empty, num_items_in_batch=7).loss
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


WORKER = """
import json, sys
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
sys.path.insert(0, sys.argv[2])
from test_batches import built, segments
from test_packed_loader import tiny_model
from blossomrec_hf.batches import HistoryWindows, PackedDataLoader, PackingCollator, TokenBudgetSampler

accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
ranks, rank = accelerator.num_processes, accelerator.process_index
found = {"ranks": ranks}
for name, lengths in (("many", np.random.default_rng(0).integers(4, 40, 50).tolist()), ("one", [30])):
    windows = HistoryWindows(built(lengths), 32)
    own = PackedDataLoader(windows, 128, num_replicas=ranks, rank=rank, num_workers=1)
    sampler = TokenBudgetSampler(windows.lengths, 128, num_replicas=ranks)
    collate = PackingCollator(int(windows.lengths.max()), max_tokens=128)
    prepared = accelerator.prepare(DataLoader(windows, batch_sampler=sampler, collate_fn=collate))
    found[name] = [[segments(batch) for batch in loader] for loader in (own, prepared)]
    model = accelerator.prepare(tiny_model(2000))
    for batch in own:
        accelerator.backward(model(**batch, num_items_in_batch=100).loss)
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None for grad in grads)
    found[name].append(float(sum(grad.double().abs().sum() for grad in grads)))
print(json.dumps(found), file=open(f"{sys.argv[1]}/{rank}.json", "w"))
"""


@pytest.mark.slow
def test_two_processes_share_an_epoch_evenly(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29571", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["ranks"] for rank in ranks] == [2, 2]
    for name, lengths in (("many", np.random.default_rng(0).integers(4, 40, 50).tolist()), ("one", [30])):
        wanted = sorted(row["input_ids"][: row["train_end"]][-32:] for row in built(lengths) if row["train_end"] >= 2)
        own, prepared, gradients = zip(*(rank[name] for rank in ranks))
        assert own == prepared
        assert len(own[0]) == len(own[1]) > 0
        assert sorted(history for batches in own for batch in batches for history in batch) == wanted
        assert gradients[0] == gradients[1] > 0
