"""
Fine-tunes a BlossomRec model with `transformers.Trainer`; without a checkpoint, trains a small one from scratch.

    python examples/finetune.py                                                   # the built-in data set
    python examples/finetune.py --model runs/ml-1m --data new-interactions.csv --replay none
    python examples/finetune.py --model runs/ml-1m --data new-interactions.csv --train_only lora
    python examples/finetune.py --model runs/ml-1m --data new.csv --replay old.csv --item_vectors vectors.parquet

A log with items that the checkpoint does not know makes its catalogue grow; the rows of the old items stay in place,
new items begin at their mean or at given vectors. So that old users are not forgotten, the log that the checkpoint was
trained on is learned from as well, where its run.yaml names one that is still there (`--replay none` does without;
`benchmark_finetune.py` measures what that costs). All options of `TrainingArguments` are there: `python
examples/finetune.py --help`.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from torch.utils.data import ConcatDataset
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.command_line import exit_on_error, load_checkpoint
from blossomrec_hf.data import item_counts, split
from blossomrec_hf.data.metadata import join_item_metadata, read_item_metadata, write_item_metadata
from blossomrec_hf.training import (
    LogArguments,
    LogLinesCallback,
    RankingCollator,
    SequentialRecommendationTrainer,
    add_items,
    check_tracker,
    freeze_all_but_items,
    parse_arguments,
    read_item_vectors,
    sample_users,
    set_up_logging,
)
from blossomrec_hf.training.progress import on_terminal


DEFAULTS = {
    "output_dir": "runs/finetuned",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "learning_rate": 1e-3,
    "warmup_steps": 20,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "ndcg@10",
    "report_to": "none",
    "disable_tqdm": not on_terminal(),
    "dataloader_pin_memory": torch.cuda.is_available(),
}
TRAIN_ONLY = ("all", "embeddings", "new_items", "lora")
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@dataclass
class FineTuneArguments:
    """What to fine-tune, and how much of it."""

    model: str | None = field(
        default=None, metadata={"help": "The folder of a trained model, or a Hub id; left out, a new small model."}
    )
    max_length: int = field(default=200, metadata={"help": "The latest items of a history that the model reads."})
    eval_users: int = field(default=0, metadata={"help": "Validate on a fixed sample of this many users; 0: on all."})
    train_only: str = field(
        default="all",
        metadata={
            "help": "all; embeddings: the layers stay as they are; new_items: the old items too; lora: low-rank "
            "adapters in the layers, saved in adapter/ and merged into the model, and the new items (needs peft)."
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "The rank of the adapters."})
    item_vectors: str | None = field(
        default=None,
        metadata={
            "help": "Where new items begin: .parquet with columns item, vector, or .safetensors by item; left out, at "
            "the mean of the old ones."
        },
    )
    replay: str = field(
        default="auto",
        metadata={
            "help": "A log of old users to train on beside the new ones; auto: the one that `model` was trained on, if "
            "it is there; none."
        },
    )

    def __post_init__(self):
        if self.train_only not in TRAIN_ONLY:
            raise ValueError(f"`train_only` must be one of {', '.join(TRAIN_ONLY)}, got {self.train_only!r}.")
        replay = self.replay not in ("auto", "none")
        if self.model is None and (self.train_only != "all" or self.item_vectors or replay):
            raise ValueError("`train_only`, `item_vectors` and `replay` are for a `model` that is there already.")

    def old_log(self) -> LogArguments | None:
        """The log to replay, or none."""
        if self.model is None or self.replay == "none":
            return None
        if self.replay != "auto":
            return LogArguments(data=self.replay)
        run = Path(self.model) / "run.yaml"
        if not run.exists():
            return None
        trained = yaml.safe_load(run.read_text(encoding="utf-8"))
        old = LogArguments(**{f.name: trained[f.name] for f in fields(LogArguments) if f.name in trained})
        return old if old.data is None or Path(old.data).exists() else None


@exit_on_error()
def main() -> None:
    log_args, args, training_args = parse_arguments(
        LogArguments, FineTuneArguments, TrainingArguments, description=__doc__, defaults=DEFAULTS
    )
    set_up_logging()
    for tracker in training_args.report_to:
        check_tracker(tracker, get_available_reporting_integrations())
    set_seed(training_args.seed)

    old_titles = None
    if args.model is None:
        dataset, tokenizer = log_args.build()
        config = BlossomRecConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=1,
            intermediate_size=128,
        )
        model = BlossomRecForSequentialRecommendation(config)
        model.item_counts.copy_(torch.as_tensor(item_counts(dataset, len(tokenizer))))
    else:
        tokenizer = load_checkpoint(BlossomRecTokenizer, args.model)
        model = load_checkpoint(BlossomRecForSequentialRecommendation, args.model)
        old_titles = read_item_metadata(args.model)
        log_tokenizer = log_args.build()[1]
        log_items = log_tokenizer.decode_items(range(2, len(log_tokenizer)))
        first_new = len(tokenizer)
        vectors = None if args.item_vectors is None else read_item_vectors(args.item_vectors)
        if num_added := add_items(model, tokenizer, log_items, vectors=vectors):
            print(f"{num_added} new items; the catalogue now holds {len(tokenizer) - 2}.")
        dataset, _ = log_args.build(tokenizer)
        model.item_counts.add_(torch.as_tensor(item_counts(dataset, len(tokenizer))))
    if model.config.repeat_share is None:
        model.config.repeat_share = log_args.repeat_share(dataset)
    titles = join_item_metadata([log_args.item_titles(tokenizer), old_titles])
    train_view, validation_view = split(dataset, "train"), split(dataset, "validation")
    if args.eval_users:
        validation_view = sample_users(validation_view, args.eval_users)
    if (old_log := args.old_log()) is not None:
        print(f"Old users are learned from as well: {old_log.data or 'the built-in data set'}.")
        train_view = ConcatDataset([train_view, split(old_log.build(tokenizer)[0], "train")])
    elif args.model is not None:
        print("Nothing of the old users is learned from (`--replay`); their figures may fall.")
    if args.train_only in ("embeddings", "new_items"):
        freeze_all_but_items(model, 2 if args.train_only == "embeddings" else first_new)
    elif args.train_only == "lora":
        from peft import LoraConfig, get_peft_model

        freeze_all_but_items(model, first_new)
        # The adapters are put into `model` itself, which stays what `Trainer` trains.
        adapted = get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=LORA_MODULES))  # fmt: skip
        model.get_input_embeddings().requires_grad_(True)

    trainer = SequentialRecommendationTrainer(
        model,
        training_args,
        data_collator=RankingCollator(max_length=args.max_length),
        train_dataset=train_view,
        eval_dataset=validation_view,
        processing_class=tokenizer,
    )
    if training_args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLinesCallback())
    if trainer.is_world_process_zero():
        write_item_metadata(training_args.output_dir, titles)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if args.train_only == "lora":
        adapted.save_pretrained(Path(training_args.output_dir) / "adapter")
        trainer.model = trainer.model_wrapped = adapted.merge_and_unload()
    trainer.save_model()
    figures = trainer.evaluate(split(dataset, "test"), metric_key_prefix="test")
    trainer.save_metrics("test", figures)
    trainer.log_metrics("test", figures)


if __name__ == "__main__":
    main()
