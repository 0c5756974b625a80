"""Training and evaluation with `transformers.Trainer`."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo, HfApi
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..batches import HistoryDataLoader, HistoryStore, PackingCollator, PaddingCollator
from ..evaluation.held_out import HeldOutItems, first_held_out
from ..evaluation.metrics import DEFAULT_KS
from ..evaluation.model_scores import scores_by_now
from ..evaluation.ranking import NEW_SUFFIX, NOW_SUFFIX, REPEATED_SUFFIX, Ranks, double_ranks, evaluating
from ..model.configuration_blossomrec import MAX_REPEAT_SHARE
from ..model.ids_blossomrec import IGNORE_INDEX
from ..model.manifest_blossomrec import require_loadable
from ..sharing.cards import write_card
from ..sharing.summary import write_summary
from ..sharing.upload import ensure_repo, push
from ..utils.environment import describe_environment
from ..utils.files import remove_folder
from .initialize import keep_latest_time


logger = logging.getLogger(__name__)

_MODEL_SETTINGS = (
    "attention_types hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
    "hidden_dropout_prob objective time_features event_types".split()
)


class SequentialRecommendationTrainer(Trainer):
    """
    A `Trainer` that packs histories without padding, and whose evaluation ranks the whole catalog for every user and
    gathers ranks, never scores.

    `per_device_train_batch_size` is the number of histories of a batch. With a token budget,
    `data_collator=PackingCollator(max_length, max_tokens=16384)`, a batch has as many histories as fit, is filled to exactly
    that many positions, and `per_device_train_batch_size` has no effect. Each history occurs once per epoch, on any number
    of processes; a run that resumes in the middle of an epoch sees the same batches.

    `train_dataset` and `eval_dataset` are views of [`~blossomrec_hf.data.split`], rows like theirs, or, for training, a
    [`~blossomrec_hf.batches.HistoryStore`]. Only the latest `max_length` events of each row are learned; to learn all events
    of longer histories, pass `HistoryWindows(dataset, max_length, window="overlapping")` or `window="random_crop"`
    ([`~blossomrec_hf.batches.HistoryWindows`]). Rows may have `weights`, the factors of the events' losses (events of weight
    0 are read and are no targets), and `basket_starts` (the items of a basket are predicted together, from the events before
    it). By default, `data_collator` is [`~blossomrec_hf.batches.PackingCollator`] (pass one to set `max_length`), and `compute_metrics` is
    [`ranking_compute_metrics`], which computes the metrics of [`~blossomrec_hf.evaluation.evaluate`]: `eval_ndcg@10`, … and,
    of a model that uses the time of the event to be predicted, `eval_ndcg@10_now`, …. A model of times or event types needs
    them in the data sets, `split(dataset, part, columns=model.config.event_columns)`, and in a collator that you pass.
    Any other `data_collator`, an overridden sampler, `train_sampling_strategy` and streams (`IterableDataset`) get the
    batches of `Trainer`, in which several processes may share a history. Rows with `target_ids` are ranked whatever the
    collator.

    With `torch_compile=True`, pass a token budget: batches then have few shapes, each of which is compiled once.

    `label_smoothing_factor` is uniform over the whole vocabulary, `[PAD]` and `[UNK]` included. The noise of
    `neftune_noise_alpha` shrinks with the length of a row, which packing increases; use
    [`~blossomrec_hf.batches.PaddingCollator`] with it.

    Raises:
        ValueError: for label smoothing of another objective than `"cross_entropy"`, which it would replace, and for a
            model of a class that no checkpoint can name: one defined in a script, a notebook or a function.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        given = inspect.signature(Trainer).bind(*args, **kwargs).arguments
        columns = self._columns_of(given.get("model"))
        given["data_collator"] = given.get("data_collator") or PackingCollator(columns=columns)
        self._only_ranks = "compute_metrics" not in given
        given.setdefault("compute_metrics", ranking_compute_metrics())
        super().__init__(**given)
        self._require_columns()
        self.add_callback(_EpochCallback())
        packing = isinstance(self.data_collator, PackingCollator)
        if packing and self.args.n_gpu > 1:
            logger.warning(
                "Packed batches cannot be divided by `torch.nn.DataParallel`: trains on one of %d GPUs. Start with "
                "`accelerate launch` to use all of them.",
                self.args.n_gpu,
            )
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
        if packing:
            self.accelerator.dataloader_config.dispatch_batches = False  # which would slice the offsets of a stream
        if self.args.save_strategy != "no":
            require_loadable(type(self.model))
        objective = getattr(self.model.config, "objective", "cross_entropy")
        if self.args.label_smoothing_factor != 0 and objective != "cross_entropy":
            raise ValueError(
                f"`label_smoothing_factor` is {self.args.label_smoothing_factor}, which would replace the objective "
                f'"{objective}" by cross-entropy over all items; set it to 0.'
            )
        if self.args.push_to_hub and self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"`hub_strategy` is {self.args.hub_strategy.value!r}, which uploads the state of the optimizer and pickles; "
                "it must be 'end' or 'every_save'."
            )
        # A view makes its columns from stored ones, which must not be taken from it.
        self.args.remove_unused_columns = False

    @staticmethod
    def _columns_of(model: nn.Module | None) -> tuple[str, ...]:
        """The columns of the events that a model reads besides the items."""
        return tuple(getattr(getattr(model, "config", None), "event_columns", ()))

    def _require_columns(self) -> None:
        """Refuse a collator of this package without a column that the model reads."""
        columns = getattr(self.data_collator, "columns", None)
        missing = () if columns is None else [name for name in self._columns_of(self.model) if name not in columns]
        if missing:
            kind = type(self.data_collator).__name__
            raise ValueError(
                f"`data_collator` has no {' and no '.join(missing)}, which the model reads; pass "
                f"`{kind}(…, columns=model.config.event_columns)`."
            )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Create the repository of `push_to_hub` before the training. Errors are those of [`~blossomrec_hf.sharing.push`],
        and `ValueError` if there is no `processing_class`.
        """
        self._require_tokenizer()
        if self.is_world_process_zero():
            repo_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            ensure_repo(
                repo_id,
                private=self.args.hub_private_repo if private is None else private,
                token=token or self.args.hub_token,
            )
            super().init_hf_repo(token, private)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`; if it fails, as on a full disk, nothing of the checkpoint remains that a resumption could pick."""
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.is_world_process_zero():
                remove_folder(Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
            raise

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        With `hub_strategy="every_save"`, upload the checkpoint's model and tokenizer (`Trainer` would upload all of
        `output_dir`). If the Hub cannot be reached, log a warning and continue.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy != HubStrategy.EVERY_SAVE:
            return
        step = self.state.global_step
        try:
            push(
                checkpoint_folder,
                self.hub_model_id,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                commit_message=f"Training in progress, step {step}",
            )
        except ConnectionError as error:
            logger.warning("The model of step %d was not uploaded; training continues. %s", step, error)

    def training_summary(self) -> dict[str, Any]:
        """The settings and latest figures of this trainer, for [`~blossomrec_hf.sharing.summary.write_summary`]."""
        figures: dict[str, dict[str, float]] = {}
        for part, prefix in (("test", "test_"), ("validation", "eval_")):
            logged = [line for line in self.state.log_history if any(name.startswith(prefix) for name in line)]
            if logged:
                named = {name.removeprefix(prefix): value for name, value in logged[-1].items()}
                figures[part] = {name: value for name, value in named.items() if "@" in name}
        settings = (
            "learning_rate",
            "max_steps" if self.args.max_steps > 0 else "num_train_epochs",  # of which `Trainer` follows the first
            "per_device_train_batch_size",
            "weight_decay",
            "optim",
            "lr_scheduler_type",
        )
        return {
            "configuration": {
                **{name: getattr(self.model.config, name, None) for name in _MODEL_SETTINGS},
                "item_features": ",".join(getattr(self.model.config, "item_features", None) or {}) or None,
                **{name: getattr(self.args, name) for name in settings},
                "max_length": getattr(self.data_collator, "max_length", None),
                "max_tokens": getattr(self.data_collator, "max_tokens", None),
            },
            "seed": self.args.seed,
            **figures,
            # Where nothing is excluded, each target is of one of these kinds.
            "exclude_seen": not any(
                name.endswith((REPEATED_SUFFIX, NEW_SUFFIX)) for part in figures.values() for name in part
            ),
            "training": {"steps": self.state.global_step, "epochs": self.state.epoch},
            **describe_environment(),
        }

    def create_model_card(self, **kwargs: Any) -> None:
        """Write `training_summary.json` and its card. Without any evaluation, write the card of `Trainer`."""
        if not self.is_world_process_zero():
            return
        summary = self.training_summary()
        if not {"test", "validation"} & summary.keys():
            super().create_model_card(**kwargs)
            return
        write_summary(self.args.output_dir, summary)
        options = {"name": kwargs.get("model_name"), "dataset_name": kwargs.get("dataset")}
        write_card(self.args.output_dir, **options, license=kwargs.get("license"))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Save the model and upload the output folder with [`~blossomrec_hf.sharing.push`]: model, tokenizer, card, training
        summary, titles and item index in one commit. The arguments of `Trainer`, a pickle, are not uploaded.

        Args:
            blocking: whether to wait for the upload. `False` uploads in the background and returns a future.
            kwargs: arguments of `create_model_card`: `model_name`, `dataset`, `license`.

        Returns:
            The commit, or a future of it; `None` on all processes except the first.

        Raises:
            ValueError: if there is no `processing_class`, and the errors of [`~blossomrec_hf.sharing.push`].
        """
        self._require_tokenizer()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo_id = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        self.create_model_card(**{"model_name": repo_id.split("/")[-1], **kwargs})
        options = {
            "private": self.args.hub_private_repo if private is None else private,
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "create_pr": create_pr,
            "commit_message": commit_message or "End of training",
        }
        if not blocking:
            return HfApi().run_as_future(push, self.args.output_dir, repo_id, **options)
        return push(self.args.output_dir, repo_id, **options)

    def _require_tokenizer(self) -> None:
        """Refuse an upload without a tokenizer, or with one that does not fit the model."""
        if self.processing_class is None:
            raise ValueError(
                "`processing_class` is None; pass the tokenizer, because a model without one cannot be used."
            )
        num_ids, vocab_size = len(self.processing_class), self.model.config.vocab_size
        if num_ids != vocab_size:
            raise ValueError(
                f"`processing_class` has {num_ids} ids, the model's vocabulary {vocab_size}; pass the tokenizer of the model."
            )

    def get_train_dataloader(self) -> DataLoader:
        """
        Returns the batches of `train_dataset`, a [`~blossomrec_hf.batches.HistoryDataLoader`] or, in the cases that the
        class names, a `DataLoader` as `Trainer` makes it.
        """
        args, collate, rows = self.args, self.data_collator, self.train_dataset
        strategy = args.train_sampling_strategy
        if (
            rows is None
            or isinstance(rows, IterableDataset)
            or not isinstance(collate, (PackingCollator, PaddingCollator))
            or type(self)._get_train_sampler is not Trainer._get_train_sampler
            or strategy not in ("random", "sequential")
        ):
            return super().get_train_dataloader()
        max_tokens = getattr(collate, "max_tokens", None)
        histories = HistoryStore.from_rows(rows, columns=collate.columns, max_length=collate.max_length)
        keep_latest_time(self.model, histories)
        return HistoryDataLoader(
            histories,
            batch_size=None if max_tokens else self._train_batch_size,
            max_tokens=max_tokens,
            collate=collate,
            drop_last=args.dataloader_drop_last,
            shuffle=strategy == "random",
            seed=args.seed if args.data_seed is None else args.data_seed,
            num_replicas=args.world_size,
            rank=args.process_index,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As in `Trainer`; rows with `target_ids` become held-out items, unless only a loss is asked for."""
        if self.args.prediction_loss_only or self.compute_metrics is None:
            return super().get_eval_dataloader(eval_dataset)
        with self._collating_held_out_items():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As in `Trainer`; rows with `target_ids` become held-out items, unless only a loss is asked for."""
        if self.args.prediction_loss_only:
            return super().get_test_dataloader(test_dataset)
        with self._collating_held_out_items():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _collating_held_out_items(self) -> Iterator[None]:
        """`Trainer` makes its evaluation loaders with `data_collator`."""
        collate = self.data_collator
        self.data_collator = _EvaluationCollator(collate, self._columns_of(self.accelerator.unwrap_model(self.model)))
        try:
            yield
        finally:
            self.data_collator = collate

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor | Any]) -> dict[str, torch.Tensor | Any]:
        """As in `Trainer`. Compiled packed batches get empty histories up to a power of two, so that they have few shapes."""
        inputs = super()._prepare_inputs(inputs)
        offsets = inputs.get("cu_seq_lens_q")
        if offsets is None or not self.args.torch_compile:
            return inputs
        histories = len(offsets) - 1
        missing = (1 << max(histories - 1, 0).bit_length()) - histories
        offsets = nn.functional.pad(offsets, (0, missing), value=inputs["input_ids"].shape[1])
        return {**inputs, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`. A smoothed loss, which the model does not compute, has neither baskets nor weights: refused."""
        if self.label_smoother is not None and (unread := [n for n in ("basket_starts", "weights") if n in inputs]):
            raise ValueError(
                f"`label_smoothing_factor` is {self.args.label_smoothing_factor}, but a smoothed loss ignores the data's "
                f"{unread[0]}; set it to 0, or drop the column."
            )
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        For rows with items to predict, no loss; the ranks of these items over all and over unseen items, whether the
        user's history has them, whether the model excludes seen items by default (1, 0, or NaN if its `repeat_share` is
        `None`) and, of a model that uses "now", the two ranks with now, float64 [B, n, 4 or 6]; and the items, int64 [B, n].
        Both are padded with −100. For other rows, the loss and, with `compute_metrics` of your own, logits and labels as in
        `Trainer`.
        """
        if "held_out" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only or self._only_ranks, ignore_keys)
        held_out, target_ids = inputs["held_out"], inputs["target_ids"]
        bare_model = self.accelerator.unwrap_model(model)
        config = bare_model.config
        with evaluating(bare_model):
            doubled = [
                double_ranks(scores, held_out, vocab_size=config.vocab_size, device=self.args.device)
                for scores in scores_by_now(bare_model, held_out, self.compute_loss_context_manager).values()
            ]
        ranks = [torch.where(both > 0, both.double() / 2, torch.inf) for both in doubled]
        exclude_seen = float("nan") if config.repeat_share is None else float(config.exclude_seen)
        repeated = torch.from_numpy(held_out.repeated).to(ranks[0])
        kinds = torch.stack([repeated, torch.full_like(repeated, exclude_seen)], 1)
        columns = torch.cat([ranks[0], kinds, *ranks[1:]], 1)
        padded = columns.new_full((*target_ids.shape, columns.shape[1]), float(IGNORE_INDEX))
        padded[target_ids.to(columns.device) != IGNORE_INDEX] = columns
        return None, padded, target_ids.to(columns.device)


class _EpochCallback(TrainerCallback):
    """
    Sets the epoch of the training batches. In a resumed epoch, `Trainer` of `transformers` before 5.24 sets it on a loader
    without the batches already seen, which has no `set_epoch`.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **kwargs: Any) -> None:
        if isinstance(train_dataloader, HistoryDataLoader):
            train_dataloader.set_epoch(int(state.epoch))


class _EvaluationCollator:
    """
    Rows of a validation or test view -> [`~blossomrec_hf.evaluation.HeldOutItems`], and their `target_ids` int64 [B, n]
    padded with −100. Batches without any item to predict are collated by `collate`.

    Args:
        collate: the collator of other rows, whose `max_length` the histories get.
        columns: other columns of the events that the model reads.
    """

    def __init__(self, collate: Callable[[Any], Any], columns: Sequence[str] = ()):
        self.collate, self.max_length, self.columns = collate, getattr(collate, "max_length", None), columns

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        if not any(len(row.get("target_ids", ())) > 0 for row in rows):
            return self.collate(rows)
        targets = [np.unique(row["target_ids"]) for row in rows]
        inputs = HistoryStore.from_rows(rows, columns=self.columns, max_length=self.max_length)
        seen = [row.get("seen_ids", row["input_ids"]) for row in rows]
        names = [f"target_{name}" for name in self.columns]
        if missing := [name for name in names if name not in rows[0]]:
            raise ValueError(
                f"`eval_dataset` has no {' and no '.join(missing)}; make it with `split(dataset, part, "
                f"columns={list(self.columns)})`."
            )
        told = first_held_out({name: [row[name] for row in rows] for name in names}, self.columns)
        return {"target_ids": _pad(targets), "held_out": HeldOutItems(inputs, targets, seen, range(len(rows)), **told)}


def ranking_compute_metrics(
    ks: Sequence[int] = DEFAULT_KS, *, all_and_unseen: bool = False
) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    Makes a `compute_metrics` that reads the ranks of [`SequentialRecommendationTrainer`]; arguments and figures are those
    of [`~blossomrec_hf.evaluation.evaluate`].
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        held_out = prediction.label_ids != IGNORE_INDEX
        users = np.unique(np.nonzero(held_out)[0], return_inverse=True)[1]
        everything, unseen, repeated, excluded, *with_now = prediction.predictions[held_out].T
        known = not np.isnan(excluded[0])
        ranks = Ranks(
            everything,
            unseen,
            users=users,
            user_ids=range(users.max() + 1),
            repeated=repeated > 0,
            exclude_seen=bool(excluded[0]) if known else repeated.mean() <= MAX_REPEAT_SHARE,
        )
        figures = ranks.metrics(ks=ks, all_and_unseen=all_and_unseen)
        if with_now:
            ranks = replace(ranks, everything=with_now[0], unseen=with_now[1])
            now = ranks.metrics(ks=ks, all_and_unseen=all_and_unseen)
            figures |= {f"{name}{NOW_SUFFIX}": value for name, value in now.items()}
        return figures

    return compute_metrics


def _pad(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [rows, longest], padded at the end with −100."""
    padded = np.full((len(rows), max(len(row) for row in rows)), IGNORE_INDEX, dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return torch.from_numpy(padded)
