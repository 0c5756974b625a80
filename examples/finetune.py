"""
Fine-tunes a BlossomRec model with `transformers.Trainer`; without a checkpoint, trains a small one from scratch.

    python examples/finetune.py                                                   # the built-in data set
    python examples/finetune.py --model runs/ml-1m --data new-interactions.csv --learning_rate 3e-4
    python examples/finetune.py --model runs/ml-1m --data new-interactions.csv --train_only embeddings

A log with items that the checkpoint does not know makes its catalogue grow; the rows of the old items stay in place,
new items begin at their mean. All options of `TrainingArguments` are there: `python examples/finetune.py --help`.
"""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments, set_seed

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.data import item_counts, split
from blossomrec_hf.training import LogArguments, RankingCollator, SequentialRecommendationTrainer, parse_arguments


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
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class FineTuneArguments:
    """What to fine-tune, and how much of it."""

    model: str | None = field(default=None, metadata={"help": "A checkpoint; left out, a new small model."})
    max_length: int = field(default=200, metadata={"help": "The latest items of a history that the model reads."})
    train_only: str = field(default="all", metadata={"help": "all, or embeddings: the layers stay as they are."})

    def __post_init__(self):
        if self.train_only not in ("all", "embeddings"):
            raise ValueError(f"`train_only` must be all or embeddings, got {self.train_only!r}.")


def main() -> None:
    log_args, args, training_args = parse_arguments(
        LogArguments, FineTuneArguments, TrainingArguments, description=__doc__, defaults=DEFAULTS
    )
    set_seed(training_args.seed)

    dataset, tokenizer = log_args.build()
    if args.model is None:
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
        log_items = tokenizer.decode_items(range(2, len(tokenizer)))
        tokenizer = BlossomRecTokenizer.from_pretrained(args.model)
        model = BlossomRecForSequentialRecommendation.from_pretrained(args.model)
        if num_added := tokenizer.add_items(log_items):
            model.resize_token_embeddings(len(tokenizer))
            print(f"{num_added} new items; the catalogue now holds {len(tokenizer) - 2}.")
        dataset, _ = log_args.build(tokenizer)
        model.item_counts.add_(torch.as_tensor(item_counts(dataset, len(tokenizer))))
    if args.train_only == "embeddings":
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)

    trainer = SequentialRecommendationTrainer(
        model,
        training_args,
        data_collator=RankingCollator(max_length=args.max_length),
        train_dataset=split(dataset, "train"),
        eval_dataset=split(dataset, "validation"),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    figures = trainer.evaluate(split(dataset, "test"), metric_key_prefix="test")
    trainer.save_metrics("test", figures)
    trainer.log_metrics("test", figures)


if __name__ == "__main__":
    main()
