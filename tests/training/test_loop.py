import json
import logging
import os
import re
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import same_weights
from forked_commands import run_code
from small_cases import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from blossomrec_hf import BlossomRecForSequentialRecommendation
from blossomrec_hf.data import split
from blossomrec_hf.evaluation import HeldOutItems, evaluate, sample_users
from blossomrec_hf.training import LoopArguments, TrainingLoop, train
from blossomrec_hf.training import loop as loop_module
from blossomrec_hf.utils import progress


def arguments(tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path / "run"),
        "max_length": 20,
        "num_train_epochs": 3,
        "tokens_per_step": 200,
        "learning_rate": 1e-2,
        "warmup_steps": 4,
        "logging_steps": 1,
        "save_seconds": 0,
    }
    return LoopArguments(**{**settings, **changes})


def make_exact_model():
    """Without dropout, and in float64: what is selected must not hang on a rounding."""
    torch.manual_seed(1)
    return make_model(hidden_dropout_prob=0.0).double()


def make_loop(log, tmp_path, loop_class=TrainingLoop, model=None, **changes):
    torch.manual_seed(1)
    model = model or make_model()
    return loop_class(model, split(log[0], "train"), split(log[0], "validation"), args=arguments(tmp_path, **changes))


def lines(loop):
    return [json.loads(line) for line in (loop.output_dir / "metrics.jsonl").read_text().splitlines()]


def losses(loop):
    return [line["loss"] for line in lines(loop) if "loss" in line]


def test_learns_and_leaves_the_best_model(log, tmp_path):
    torch.manual_seed(1)
    model = make_model(hidden_dropout_prob=0.0)
    view = split(log[0], "validation")
    before = evaluate(model, view, progress=False)
    args = arguments(tmp_path, num_train_epochs=30, patience=5)
    result = train(model, split(log[0], "train"), view, args=args, tokenizer=log[1])

    assert result.best_metric > before["ndcg@10"] + 0.2
    assert result.epochs == 30 or result.epochs == result.best_epoch + 5
    folder = Path(args.output_dir)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == log[1].get_vocab()
    for figures in (evaluate(m, view, max_length=20, progress=False) for m in (model, loaded)):
        assert figures["ndcg@10"] == pytest.approx(result.best_metric, abs=1e-6)

    left = {path.name for path in folder.iterdir() if path.is_dir()}
    assert left == {f"best-{result.best_step}", f"checkpoint-{result.steps}"}
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validated = [line["validation_ndcg@10"] for line in written if "validation_ndcg@10" in line]
    assert len(validated) == result.epochs and max(validated) == result.best_metric
    assert written[0]["loss"] == pytest.approx(np.log(60), rel=0.2) and written[-2]["loss"] < written[0]["loss"]


def test_the_loss_is_the_mean_over_the_targets_of_the_step(log, tmp_path):
    loop = make_loop(log, tmp_path, num_train_epochs=1, max_steps=1, model=make_exact_model())
    rows = loop.plan.epoch_steps(0)[0]
    view = split(log[0], "train", max_length=20)
    total, targets = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([view[int(row)]["input_ids"]])
            logits = loop.bare_model.eval()(ids).logits[0, :-1, 2:]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:] - 2, reduction="sum").item()
            targets += ids.shape[1] - 1
    loop.run()
    assert losses(loop)[0] == pytest.approx(total / targets, rel=1e-5)


def test_accumulation_does_not_change_the_run(log, tmp_path):
    runs = []
    for steps in (1, 3):
        model = make_exact_model()
        loop = make_loop(log, tmp_path / str(steps), model=model, gradient_accumulation_steps=steps)
        loop.run()
        runs.append(losses(loop))
    assert len(runs[0]) == 3 * len(loop.plan.epoch_steps(0))
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-5)


def test_a_part_without_histories_moves_nothing(log, tmp_path):
    # One history a step, and two forward passes: the second has nothing.
    small_steps = {"tokens_per_step": 20, "max_steps": 4}
    loop = make_loop(log, tmp_path, model=make_exact_model(), gradient_accumulation_steps=2, **small_steps)
    loop.run()
    plain = make_loop(log, tmp_path / "plain", model=make_exact_model(), **small_steps)
    plain.run()
    assert any(len(rows) == 1 for rows in plain.plan.epoch_steps(0)[:4])
    np.testing.assert_allclose(losses(loop), losses(plain), atol=1e-5)


class InterruptedLoop(TrainingLoop):
    """Gets SIGTERM while it works on a step."""

    def training_step(self, rows):
        super().training_step(rows)
        if self.state.step == self.interrupted_at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema_decay": 0.9, "optim": "adafactor", "lr_scheduler_type": "cosine"},
        {"windows": "random_crop", "max_length": 8},
        {"windows": "overlapping", "max_length": 8},
    ],
)
def test_sigterm_saves_and_the_run_goes_on_bit_by_bit(log, tmp_path, changes):
    whole = make_loop(log, tmp_path / "whole", **changes)
    result = whole.run()
    InterruptedLoop.interrupted_at = int(np.random.default_rng().integers(1, result.steps))
    interrupted = make_loop(log, tmp_path, InterruptedLoop, **changes)
    with pytest.raises(SystemExit) as exit_info:
        interrupted.run()
    assert exit_info.value.code == 143
    assert (interrupted.output_dir / f"checkpoint-{InterruptedLoop.interrupted_at}").is_dir()
    with pytest.raises(ValueError, match="unfinished run"):
        make_loop(log, tmp_path, **changes).run()

    torch.manual_seed(5)  # whatever state the generators are in, the checkpoint's is what counts
    resumed = make_loop(log, tmp_path, resume=True, **changes)
    assert resumed.run().steps == result.steps
    for (name, ours), expected in zip(
        resumed.bare_model.state_dict().items(), whole.bare_model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, expected), name
    assert losses(resumed) == losses(whole)
    assert resumed.state.best_metric == whole.state.best_metric
    # A finished run may be started over.
    assert make_loop(log, tmp_path, num_train_epochs=1).run().epochs == 1


class AveragingLoop(TrainingLoop):
    """Keeps the weights after every step, and what each validation saw."""

    def training_step(self, rows):
        super().training_step(rows)
        self.history = [*getattr(self, "history", []), self.bare_model.lm_head.weight.detach().clone()]

    def _validate(self):
        self.seen = self.bare_model.lm_head.weight.detach().clone()
        return super()._validate()


def test_validates_and_keeps_the_moving_average(log, tmp_path):
    torch.manual_seed(1)
    model = make_model()
    average = model.lm_head.weight.detach().clone()
    loop = make_loop(log, tmp_path, AveragingLoop, model=model, num_train_epochs=1, ema_decay=0.5)
    loop.run()
    for step, weight in enumerate(loop.history):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(loop.seen, average)
    torch.testing.assert_close(model.lm_head.weight, average)
    assert not torch.allclose(loop.history[-1], average, atol=1e-4)


@pytest.mark.parametrize("share", [None, 0.0])
def test_early_stopping_follows_the_share_of_repeats(log, tmp_path, share):
    """The log's users repeat items. A model that does not know its log learns it from the validation items."""
    model = make_model(repeat_share=share)
    view = split(log[0], "validation")
    result = train(model, split(log[0], "train"), view, args=arguments(tmp_path, num_train_epochs=1))
    assert model.config.repeat_share == (HeldOutItems.from_rows(view).repeat_share if share is None else share)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.repeat_share == model.config.repeat_share
    figures = evaluate(model, view, max_length=20, all_and_unseen=True, progress=False)
    assert figures["ndcg@10_unseen"] > figures["ndcg@10_all"]
    name = "ndcg@10_all" if share is None else "ndcg@10_unseen"
    assert result.best_metric == pytest.approx(figures[name], abs=1e-6)


@pytest.mark.parametrize("name", ["ndcg@10_all", "ndcg@10_unseen"])
def test_a_metric_may_be_asked_for_whatever_the_log(log, tmp_path, name):
    model = make_model()
    args = arguments(tmp_path, num_train_epochs=1, metric_for_best_model=name)
    result = train(model, split(log[0], "train"), split(log[0], "validation"), args=args)
    figures = evaluate(model, split(log[0], "validation"), max_length=20, all_and_unseen=True, progress=False)
    assert result.best_metric == pytest.approx(figures[name], abs=1e-6)


def test_without_a_terminal_there_is_a_line_for_each_evaluation_and_each_minute(log, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="blossomrec_hf")
    loop = make_loop(log, tmp_path, num_train_epochs=3, logging_steps=1000)
    loop.run()
    told = [record.message for record in caplog.records]
    evaluations = [line for line in told if line.startswith("Epoch ")]
    assert [line.split(",")[0] for line in evaluations] == ["Epoch 1", "Epoch 2", "Epoch 3"]
    written = [line for line in lines(loop) if "validation_ndcg@10" in line]
    for line, values in zip(evaluations, written, strict=True):
        assert f"step {values['step']}, " in line and f"validation ndcg@10 {values['validation_ndcg@10']:.4f}" in line
        assert 3 < float(re.search(r"loss ([\d.]+)", line)[1]) < 5
    assert not any(line.startswith("Training: ") for line in told)  # all of it took less than a minute

    caplog.clear()
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)  # each step and batch takes longer
    make_loop(log, tmp_path / "slow", num_train_epochs=1, eval_tokens=200).run()
    told = [record.message for record in caplog.records]
    steps = len(loop.plan.epoch_steps(0))
    assert [line.split(" (")[0] for line in told if line.startswith("Training")] == [
        f"Training: {step} of {steps}" for step in range(1, steps + 1)
    ]
    assert sum(line.startswith("Evaluating: ") for line in told) > 1


def test_validates_on_a_fixed_sample_of_users(log, tmp_path):
    view = split(log[0], "validation")
    loops = [make_loop(log, tmp_path / str(seed), eval_users=7, seed=seed, num_train_epochs=1) for seed in (1, 2)]
    assert loops[0].held_out.user_ids == loops[1].held_out.user_ids == sample_users(view, 7)["user_id"]
    assert sorted(loops[0].held_out.user_ids) == loops[0].held_out.user_ids  # in the order of the log
    result = loops[0].run()
    expected = evaluate(loops[0].bare_model, sample_users(list(view), 7), max_length=20, progress=False)
    assert result.best_metric == pytest.approx(expected["ndcg@10"], abs=1e-6)
    assert len(make_loop(log, tmp_path / "all", eval_users=1000).held_out) == len(view)
    with pytest.raises(ValueError, match="`eval_users` must be 0 or more, got -1"):
        arguments(tmp_path, eval_users=-1)


def test_without_validation_the_last_weights_are_kept(log, tmp_path):
    torch.manual_seed(1)
    args = arguments(tmp_path, num_train_epochs=1)
    loop = AveragingLoop(make_model(), split(log[0], "train"), args=args)
    result = loop.run()
    assert result.best_step == 0
    assert torch.equal(AutoModelForCausalLM.from_pretrained(args.output_dir).lm_head.weight, loop.history[-1])


def test_uploads_at_the_end_if_asked(log, tmp_path, monkeypatch):
    asked, uploaded = [], []
    monkeypatch.setattr(loop_module, "ensure_repo", lambda name, **options: asked.append(name) or name)
    monkeypatch.setattr(loop_module, "push", lambda folder, name, **options: uploaded.append((folder, name)))
    args = arguments(tmp_path, num_train_epochs=1, push_to_hub=True, hub_model_id="me/mine")
    train(make_model(), split(log[0], "train"), args=args, tokenizer=log[1])
    assert asked == ["me/mine"]
    ((folder, name),) = uploaded
    assert (Path(folder), name) == (Path(args.output_dir), "me/mine")
    assert (Path(folder) / "model.safetensors").exists()


KILLED_SCRIPT = """
import os, random, shutil, signal, sys, threading, time
import torch
from small_cases import make_model, small_log
from blossomrec_hf.data import build_sequences, split
from blossomrec_hf.training import LoopArguments, train

def run(folder, kill_after=None):
    torch.set_num_threads(1)
    if kill_after is not None:
        def kill():
            time.sleep(kill_after)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=kill, daemon=True).start()
    torch.manual_seed(1)
    args = LoopArguments(
        output_dir=folder, max_length=20, num_train_epochs=6, tokens_per_step=150, learning_rate=1e-2, save_seconds=0,
        save_steps=3, resume=True, logging_steps=2
    )
    dataset, tokenizer = build_sequences(small_log())
    train(make_model(), split(dataset, "train"), split(dataset, "validation"), args=args, tokenizer=tokenizer)

def forked(*run_arguments):
    child = os.fork()
    if child == 0:
        run(*run_arguments)
        os._exit(0)
    return os.waitpid(child, 0)[1]

start = time.perf_counter()
assert forked(sys.argv[1] + "/whole") == 0
duration = time.perf_counter() - start
for trial in range(40):  # a run that ends before it is killed, since the machine became faster, says nothing
    shutil.rmtree(sys.argv[1] + "/killed", ignore_errors=True)
    kills = 0
    while (status := forked(sys.argv[1] + "/killed", random.uniform(0.2, 0.9) * duration)) != 0:
        assert status == signal.SIGKILL
        kills += 1
        assert kills < 40
    if kills:
        break
print(kills)
"""


def test_killed_at_any_moment_it_reaches_the_same_weights(tmp_path):
    done = run_code(KILLED_SCRIPT, tmp_path, folder=tmp_path / "script")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    checkpoint = next(whole.glob("checkpoint-*")).name
    names = [f"{checkpoint}/model.safetensors"]
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert [path.name for path in killed.glob("*.partial")] == []


def test_another_run_is_not_resumed(log, tmp_path):
    make_loop(log, tmp_path, num_train_epochs=1).run()
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 there, 0.5 now\); give the arguments"):
        make_loop(log, tmp_path, num_train_epochs=1, resume=True, learning_rate=0.5).run()
    with pytest.raises(ValueError, match=r"hidden_dropout_prob: 0.3 there, 0.1 now"):
        make_loop(log, tmp_path, num_train_epochs=1, resume=True, model=make_model(hidden_dropout_prob=0.1)).run()
    with pytest.raises(ValueError, match="data items"):
        shorter = list(split(log[0], "train"))[1:]
        args = arguments(tmp_path, num_train_epochs=1, resume=True)
        TrainingLoop(make_model(), shorter, split(log[0], "validation"), args=args).run()


class DivergingLoop(TrainingLoop):
    """At its sixth step something breaks on the way back through the second layer."""

    def training_step(self, rows):
        projection = self.bare_model.model.layers[1].up_proj
        hook = projection.register_full_backward_hook(lambda module, into, out: (into[0] * torch.nan,))
        if self.state.step != 5:
            hook.remove()
        super().training_step(rows)


def test_a_loss_that_is_no_number_stops_the_run(log, tmp_path):
    loop = make_loop(log, tmp_path, DivergingLoop, save_steps=2, logging_steps=100, cuda_graphs=False)
    with pytest.raises(FloatingPointError, match=r"at step 6: it began at model\.layers\.1\.attention_norm\.bias"):
        loop.run()
    kept = torch.load(loop.output_dir / "checkpoint-5" / "optimizer.bin")
    assert all(torch.isfinite(state["exp_avg"]).all() for state in kept["state"].values())


class FullDiskLoop(TrainingLoop):
    """After the first checkpoint no file may grow beyond a few bytes."""

    def save_checkpoint(self):
        full = self.state.step > 5
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            if full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            super().save_checkpoint()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_checkpoint_before(log, tmp_path, monkeypatch):
    # Python would keep the first bytes of a module that is imported meanwhile for every later process.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loop = make_loop(log, tmp_path, FullDiskLoop, save_steps=4)
    with pytest.raises(OSError, match="could not write .*checkpoint-8"):
        loop.run()
    assert [path.name for path in loop.output_dir.glob("checkpoint-*")] == ["checkpoint-5"]
    assert make_loop(log, tmp_path, save_steps=4, resume=True).run().epochs == 3


def test_a_kill_while_the_model_gets_its_place_mixes_no_two_models(log, tmp_path, monkeypatch):
    make_loop(log, tmp_path, num_train_epochs=1).run()
    replace = os.replace

    def replace_until_the_weights(source, target):
        if Path(target) == tmp_path / "run" / "model.safetensors":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace_until_the_weights)
        make_loop(log, tmp_path, num_train_epochs=2).run()
    load = BlossomRecForSequentialRecommendation.from_pretrained
    with pytest.raises(ValueError, match="is not the file that was saved"):
        load(tmp_path / "run")
    loop = make_loop(log, tmp_path, num_train_epochs=2, resume=True)
    loop.run()
    assert same_weights(load(tmp_path / "run"), loop.bare_model)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_a_run_that_is_resumed_under_another_setting_says_that_it_is_not_equal_to_the_last_bit(
    log, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    make_loop(log, tmp_path, max_steps=2).run()
    make_loop(log, tmp_path, max_steps=2, resume=True).run()
    assert "last bit" not in caplog.text
    make_loop(log, tmp_path, max_steps=2, resume=True, torch_compile=True).run()
    assert "(compiled: False there, True now)" in caplog.text and "not equal to the last bit" in caplog.text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokens_per_step": 0}, "`tokens_per_step` must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "`learning_rate`"),
        ({"mixed_precision": "fp8"}, "`mixed_precision`"),
        ({"windows": "none"}, "`windows` must be latest, overlapping, random_crop, got 'none'"),
        ({"optim": "sgdd"}, "sgdd is not a valid OptimizerNames"),
        ({"metric_for_best_model": "ndcg"}, "`metric_for_best_model` must be one of recall@1"),
    ],
)
def test_bad_arguments_are_named(log, tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        make_loop(log, tmp_path, **changes)
