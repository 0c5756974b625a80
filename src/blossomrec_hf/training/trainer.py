"""Training and evaluation with `transformers.Trainer`."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo, HfApi
from torch import nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..batches import PaddingCollator
from ..batches.histories import HistoryStore, concatenate
from ..evaluation.held_out import HeldOutItems
from ..evaluation.metrics import DEFAULT_KS
from ..evaluation.ranking import NEW_SUFFIX, REPEATED_SUFFIX, ModelScores, Ranks, double_ranks, evaluating
from ..model.configuration_blossomrec import MAX_REPEAT_SHARE
from ..model.ids_blossomrec import IGNORE_INDEX, NUM_SPECIAL_IDS
from ..model.manifest_blossomrec import require_loadable
from ..sharing.cards import write_card
from ..sharing.summary import write_summary
from ..sharing.upload import ensure_repo, push
from ..utils.environment import describe_environment
from ..utils.files import remove_folder


_MODEL_SETTINGS = (
    "attention_types hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
    "hidden_dropout_prob objective".split()
)


class RankingCollator(PaddingCollator):
    """
    A [`~blossomrec_hf.batches.PaddingCollator`] for training rows and evaluation rows alike. Rows that hold items to
    predict also give `target_ids` int64 [B, n] and `seen_ids` int64 [B, m], each padded with −100.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        if any(len(row.get("target_ids", ())) > 0 for row in rows):
            batch["target_ids"] = pad([np.unique(row["target_ids"]) for row in rows])
            batch["seen_ids"] = pad([row.get("seen_ids", row["input_ids"]) for row in rows])
        return batch


class SequentialRecommendationTrainer(Trainer):
    """
    A `Trainer` whose evaluation ranks the whole catalogue for every user and gathers ranks, never scores.

    `train_dataset` and `eval_dataset` are views of [`~blossomrec_hf.data.split`]. Left out, `data_collator` is a
    [`RankingCollator`] (pass one to set `max_length`) and `compute_metrics` is [`ranking_compute_metrics`], which
    gives the figures of [`~blossomrec_hf.evaluation.evaluate`]: `eval_ndcg@10`, ....

    `label_smoothing_factor` is uniform over the whole vocabulary, `[PAD]` and `[UNK]` included.

    Raises:
        ValueError: for label smoothing of another objective than `"cross_entropy"`, which it would replace, and for a
            model of a class that no checkpoint can name: one defined in a script, a notebook or a function.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("data_collator", RankingCollator())
        kwargs.setdefault("compute_metrics", ranking_compute_metrics())
        super().__init__(*args, **kwargs)
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
        """What `hub_strategy="every_save"` pushes: the checkpoint's model, where `Trainer` uploads all of `output_dir`."""
        if self.is_world_process_zero() and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            push(
                checkpoint_folder,
                self.hub_model_id,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                commit_message=f"Training in progress, step {self.state.global_step}",
            )

    def training_summary(self) -> dict[str, Any]:
        """What a card is made of, see [`~blossomrec_hf.sharing.summary.write_summary`]: what this trainer did and last measured."""
        figures: dict[str, dict[str, float]] = {}
        for part, prefix in (("test", "test_"), ("validation", "eval_")):
            logged = [line for line in self.state.log_history if any(name.startswith(prefix) for name in line)]
            if logged:
                named = {name.removeprefix(prefix): value for name, value in logged[-1].items()}
                figures[part] = {name: value for name, value in named.items() if "@" in name}
        settings = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "weight_decay", "optim")
        return {
            "configuration": {
                **{name: getattr(self.model.config, name, None) for name in _MODEL_SETTINGS},
                **{name: getattr(self.args, name) for name in settings},
                "lr_scheduler_type": str(self.args.lr_scheduler_type),
                "max_length": getattr(self.data_collator, "max_length", None),
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
        """Writes `training_summary.json` and the card made of it; where nothing was measured, the card of `Trainer`."""
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
        Saves the model and uploads it with its tokenizer, a card, the summary of its training and what else the output
        folder holds for others, in one commit; not the arguments of `Trainer`, which are a pickle. `None` on other
        processes than the first.

        Args:
            blocking: `False` uploads in the background and returns a future.
            kwargs: of `create_model_card`: `model_name`, `dataset`, `license`.

        Raises:
            as [`~blossomrec_hf.sharing.push`], and `ValueError` if there is no `processing_class`.
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
        if self.processing_class is None:
            raise ValueError(
                "`processing_class` is None; pass the tokenizer, without which nobody could use the model."
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        For rows with items to predict: no loss, of these items (float64 [B, n, 4]) the ranks over all and over unseen
        items, whether the user's history has them, and whether the model excludes seen items by default (1, 0, or NaN
        where its `repeat_share` is not known), and the items themselves (int64 [B, n], padded with −100). Other rows are
        evaluated as in `Trainer`.
        """
        if prediction_loss_only or "target_ids" not in inputs:
            inputs = {name: value for name, value in inputs.items() if name not in ("target_ids", "seen_ids")}
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        target_ids = inputs["target_ids"].cpu()
        real = inputs["attention_mask"].bool().cpu()
        histories = [row[kept].numpy() for row, kept in zip(inputs["input_ids"].cpu(), real)]
        seen = [row[row >= NUM_SPECIAL_IDS].numpy() for row in inputs["seen_ids"].cpu()]
        targets = [row[row != IGNORE_INDEX].numpy() for row in target_ids]
        held_out = HeldOutItems(HistoryStore(*concatenate(histories)), targets, seen, range(len(targets)))
        bare_model = self.accelerator.unwrap_model(model)
        with evaluating(bare_model):
            doubled = double_ranks(
                ModelScores(bare_model, held_out, self.compute_loss_context_manager),
                held_out,
                vocab_size=bare_model.config.vocab_size,
                device=inputs["input_ids"].device,
            )
        ranks = torch.where(doubled > 0, doubled.double() / 2, torch.inf)
        config = bare_model.config
        exclude_seen = float("nan") if config.repeat_share is None else float(config.exclude_seen)
        repeated = torch.from_numpy(held_out.repeated).to(ranks)
        columns = torch.stack([*ranks.unbind(1), repeated, torch.full_like(repeated, exclude_seen)], dim=1)
        padded = columns.new_full((*target_ids.shape, 4), float(IGNORE_INDEX))
        padded[(target_ids != IGNORE_INDEX).to(doubled.device)] = columns
        return None, padded, target_ids.to(doubled.device)


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
        everything, unseen, repeated, excluded = prediction.predictions[held_out].T
        known = not np.isnan(excluded[0])
        ranks = Ranks(
            everything,
            unseen,
            users=users,
            user_ids=range(users.max() + 1),
            repeated=repeated > 0,
            exclude_seen=bool(excluded[0]) if known else repeated.mean() <= MAX_REPEAT_SHARE,
        )
        return ranks.metrics(ks=ks, all_and_unseen=all_and_unseen)

    return compute_metrics


def pad(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [rows, longest], padded at the end with −100."""
    padded = np.full((len(rows), max(len(row) for row in rows)), IGNORE_INDEX, dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return torch.from_numpy(padded)
