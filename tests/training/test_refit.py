"""The final fit: all events, the first run's schedule, stopped at its best epoch; and it survives `kill -9`."""

import json

import numpy as np
import pytest
import torch
from forked_commands import run_code
from small_cases import make_model
from test_loop import arguments
from transformers import AutoModelForCausalLM, get_scheduler

from blossomrec_hf.data import hold_out_nothing, split
from blossomrec_hf.training import TrainingLoop, check_refit_folder, refit, refit_folder, train


def fresh_model():
    torch.manual_seed(1)
    return make_model()


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_is_a_run_on_all_events_with_the_same_schedule_that_stops_at_the_best_epoch(log, tmp_path):
    args = arguments(tmp_path, num_train_epochs=9, lr_scheduler_type="linear", patience=2, eval_epochs=2)
    first = train(fresh_model(), split(log[0], "train"), split(log[0], "validation"), args=args)
    assert first.best_figures["ndcg@10"] == first.best_metric
    first.best_epoch = 4  # wherever this run had its best

    everything = split(hold_out_nothing(log[0]), "train")
    model = fresh_model()
    result = refit(model, everything, first, args=args, tokenizer=log[1])
    assert (result.epochs, result.best_metric, result.best_figures) == (4, None, {})
    folder = refit_folder(args)
    lines = logged(folder)
    assert not any(name.startswith("validation") for line in lines for name in line)

    # The events of all users, and the learning rates of nine epochs.
    whole = TrainingLoop(fresh_model(), everything, args=arguments(tmp_path / "whole", num_train_epochs=9))
    steps = sum(len(whole.plan.epoch_steps(epoch)) for epoch in range(4))
    assert whole.plan.histories.lengths.sum() == np.minimum(log[0]["test_end"], 20).sum()
    assert json.loads((folder / "run.json").read_text())["data"]["items"] == whole.plan.histories.lengths.sum()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    schedule = get_scheduler(
        "linear", optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=whole.plan.total_steps()
    )
    expected = []
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        expected.append(schedule.get_last_lr()[0])
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected)

    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(saved.lm_head.weight, AutoModelForCausalLM.from_pretrained(args.output_dir).lm_head.weight)


def test_without_a_validation_the_refit_takes_as_many_epochs(log, tmp_path):
    args = arguments(tmp_path, num_train_epochs=2)
    everything = split(hold_out_nothing(log[0]), "train")
    first = train(fresh_model(), everything, args=args)
    assert refit(fresh_model(), everything, first, args=args).epochs == 2
    weights = [
        AutoModelForCausalLM.from_pretrained(path).lm_head.weight for path in (tmp_path / "run", refit_folder(args))
    ]
    assert torch.equal(*weights)  # the same events, the same seed


def test_an_unfinished_refit_is_not_overwritten_unasked(log, tmp_path):
    args = arguments(tmp_path)
    check_refit_folder(args)
    checkpoint = refit_folder(args) / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text('{"finished": false, "processes": {"number": 1}}')
    with pytest.raises(ValueError, match=r"refit has an unfinished run \(checkpoint-3\): pass `resume`"):
        check_refit_folder(args)
    check_refit_folder(arguments(tmp_path, resume=True))


KILLED_SCRIPT = """
import os, signal, sys
import torch
from small_cases import make_model, small_log
from blossomrec_hf.data import build_sequences, hold_out_nothing, split
from blossomrec_hf.training import LoopArguments, LoopCallback, refit, train

class Kill(LoopCallback):
    def __init__(self, step):
        self.step = step
    def on_step(self, loop):
        if loop.state.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

def fresh_model():
    torch.manual_seed(1)
    return make_model()

def run(folder, first_step, refit_step):
    torch.set_num_threads(1)
    args = LoopArguments(
        output_dir=folder, max_length=20, num_train_epochs=3, tokens_per_step=150, learning_rate=1e-2, save_seconds=0,
        save_steps=3, resume=True, logging_steps=2
    )
    dataset, tokenizer = build_sequences(small_log())
    parts = split(dataset, "train"), split(dataset, "validation")
    first = train(fresh_model(), *parts, args=args, tokenizer=tokenizer, callbacks=[Kill(first_step)])
    everything = split(hold_out_nothing(dataset), "train")
    refit(fresh_model(), everything, first, args=args, tokenizer=tokenizer, callbacks=[Kill(refit_step)])

def forked(*run_arguments):
    child = os.fork()
    if child == 0:
        run(*run_arguments)
        os._exit(0)
    return os.waitpid(child, 0)[1]

first_step, refit_step = map(int, sys.argv[2:])
assert forked(sys.argv[1] + "/whole", 0, 0) == 0
assert forked(sys.argv[1] + "/killed", first_step, 0) == signal.SIGKILL
assert forked(sys.argv[1] + "/killed", 0, refit_step) == signal.SIGKILL
assert forked(sys.argv[1] + "/killed", 0, 0) == 0
"""


def test_killed_in_the_first_run_and_in_the_refit_it_reaches_the_same_weights(tmp_path):
    steps = np.random.default_rng().integers(1, 7, size=2)  # an epoch has more
    print("killed at steps", steps)
    done = run_code(KILLED_SCRIPT, tmp_path, *steps, folder=tmp_path / "script")
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "refit/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
