"""
Fine-tune a BlossomRec model with `transformers.Trainer`. Without `--model`, a small new model is trained; only then,
`--time_features`, `--time_zone` and `--event_types` choose what it reads of events. A training summary and a card are saved
next to the model.

    blossomrec finetune                                                   # the built-in data set
    blossomrec finetune --model runs/ml-1m --data new-interactions.csv --replay none
    blossomrec finetune --model runs/ml-1m --data new-interactions.csv --train_only lora
    blossomrec finetune --model runs/ml-1m --data new.csv --replay old.csv --item_vectors vectors.parquet

The new events of a user extend the user's earlier history, and only they are prediction targets. The earlier logs are those
that logs.yaml or run.yaml of the checkpoint name, if they still exist; `--replay` names another one. A share of the earlier
events is learned again (`--replay_share`). A log that repeats the earlier events is accepted: each event counts once. If a
user has at least four new events, the last two are held out for validation and test.

Items that the checkpoint lacks are added to the catalog. Existing items keep their rows, and the vectors of new items start
at given vectors or at an estimate from their events (`initialize_from_events`). All options of `TrainingArguments` are
available. `examples/benchmarks/finetune.py` measures the quality of fine-tuned models.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
import yaml
from datasets import Dataset
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy

from .. import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from ..batches import HistoryStore, PackingCollator
from ..batches.windows import WINDOWS
from ..data import item_counts, split
from ..data.growth import add_item_counts, join_logs, read_histories, recode
from ..data.metadata import as_vectors, category_reader, join_item_metadata, read_item_metadata, write_item_metadata
from ..data.splits import part_lengths
from ..evaluation import sample_users
from ..evaluation.metrics import DEFAULT_KS
from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from ..training import (
    LogArguments,
    LogLinesCallback,
    SequentialRecommendationTrainer,
    add_items,
    check_tracker,
    freeze_all_but_items,
    initialize_from_events,
    parse_arguments,
    read_arguments,
    read_item_vectors,
    save_arguments,
)
from ..training.event_features import EventFeatureArguments, require_event_columns
from ..training.fine_tuning import (
    EVALUATIONS,
    FINE_TUNING_DEFAULTS,
    MIN_STEPS,
    REPLAY_SHARE,
    count_steps,
    windows_to_learn,
)
from ..utils.command_line import exit_on_error, load_checkpoint, report_replacement
from ..utils.environment import check_processes
from ..utils.files import atomic_write, require_folder
from ..utils.progress import can_draw_bars, set_up_logging
from .train import print_figures


if TYPE_CHECKING:
    from peft import PeftModel


logger = logging.getLogger(__name__)

LOGS_FILE = "logs.yaml"  # next to a fine-tuned model: the logs that it was trained on, in order
DEFAULTS = {
    **FINE_TUNING_DEFAULTS,
    "output_dir": "runs/finetuned",
    "eval_strategy": "steps",
    "eval_steps": 1 / EVALUATIONS,  # of all steps
    "save_strategy": "steps",
    "save_steps": 1 / EVALUATIONS,
    "logging_steps": 1 / EVALUATIONS,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "ndcg@10",
    "disable_tqdm": not can_draw_bars(),
    "dataloader_pin_memory": torch.cuda.is_available(),
}
TRAIN_ONLY = ("all", "embeddings", "new_items", "lora")
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@dataclass
class FineTuneArguments(EventFeatureArguments):
    """The model, the events and the parameters to train. The base class is for new models, without `model`."""

    model: str | None = field(
        default=None, metadata={"help": "Folder of a trained model, or a Hub id; by default, a small new model."}
    )
    max_length: int = field(
        default=200, metadata={"help": "Number of latest items that the model reads of each history."}
    )
    windows: str = field(
        default="overlapping",
        metadata={
            "help": "Events of histories longer than max_length to train on. overlapping: all, in windows of max_length, each "
            "new event predicted once per epoch, with at least half a window of context if the history has it; latest: the latest max_length; "
            "random_crop: max_length consecutive events, drawn anew in each epoch."
        },
    )
    eval_users: int = field(default=0, metadata={"help": "Number of users in the validation sample; 0 for all users."})
    train_only: str = field(
        default="all",
        metadata={
            "help": "all: every parameter; embeddings: the item embeddings; new_items: the embeddings of new items; lora: "
            "the embeddings of new items and low-rank adapters of the layers, which are saved in adapter/ and merged into the "
            "model (requires peft)."
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    item_vectors: str | None = field(
        default=None,
        metadata={
            "help": "Initial vectors of new items: a .parquet file with the columns item and vector, or a .safetensors file "
            "with one tensor per item; by default, an estimate from their events."
        },
    )
    replay: str = field(
        default="auto",
        metadata={
            "help": "The earlier log that the new one continues; auto for the logs that the model was trained on, if they "
            "exist; none for no earlier log."
        },
    )
    replay_share: float = field(
        default=REPLAY_SHARE,
        metadata={"help": "Share of earlier events among the prediction targets, at least 0 and below 1."},
    )
    min_steps: int = field(
        default=MIN_STEPS,
        metadata={
            "help": "Minimum number of steps. A small log is repeated for more epochs than num_train_epochs. The number of "
            "steps is rounded up to a multiple of 10."
        },
    )

    def __post_init__(self):
        if self.eval_users < 0:
            raise ValueError(f"`eval_users` must be 0 or more, got {self.eval_users}.")
        if self.windows not in WINDOWS:
            raise ValueError(f"`windows` must be one of {', '.join(WINDOWS)}, got {self.windows!r}.")
        if self.train_only not in TRAIN_ONLY:
            raise ValueError(f"`train_only` must be one of {', '.join(TRAIN_ONLY)}, got {self.train_only!r}.")
        replay = self.replay not in ("auto", "none")
        if self.model is None and (self.train_only != "all" or self.item_vectors or replay):
            raise ValueError("`train_only`, `item_vectors` and `replay` require `model`; give a trained model.")
        if self.model is not None and (self.time_features or self.time_zone != "UTC" or self.event_types):
            raise ValueError(
                f"`model` is {self.model}, which determines what is read of events; omit `time_features`, `time_zone` and "
                "`event_types`, or train a new model without `model`."
            )
        if not 0 <= self.replay_share < 1:
            raise ValueError(f"`replay_share` must be 0 or more and below 1, got {self.replay_share}.")
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be 2 (an item and its next) or more, got {self.max_length}.")


def past_logs(model: str, replay: str) -> list[LogArguments]:
    """The logs that a model was trained on, in order."""
    if replay == "none":
        return []
    if replay != "auto":
        return [LogArguments(data=replay)]
    run, names = Path(model) / "run.yaml", {f.name for f in fields(LogArguments)}
    if not run.exists():
        return []
    logs = [read_arguments(run, LogArguments)]
    path = Path(model) / LOGS_FILE
    if "replay" in logs[0] and path.exists():  # the run was one of this script
        logs = read_arguments(path).get("logs")
        if not isinstance(logs, list) or not all(
            isinstance(log, dict) and isinstance(log.get("data"), str | None) for log in logs
        ):
            raise ValueError(f"{path} has no list of logs; give the earlier log with `replay`, or none.")
    return [LogArguments(**{name: value for name, value in log.items() if name in names}) for log in logs]


def save_logs(folder: str, logs: Sequence[LogArguments]) -> None:
    """Write the logs that the model in `folder` was trained on to the file that [`past_logs`] reads."""
    unique = [asdict(log) for number, log in enumerate(logs) if log not in logs[:number]]
    with atomic_write(Path(folder) / LOGS_FILE) as partial:
        partial.write_text(yaml.safe_dump({"logs": unique}, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_past(
    logs: Sequence[LogArguments], model: str, tokenizer: BlossomRecTokenizer, event_types: Sequence[str] | None
) -> Dataset | None:
    """Read the events of the logs that `model` was trained on, see `LogArguments.build`. Logs that no longer exist are reported."""
    past = []
    for log in logs:
        if log.data is None or Path(log.data).exists():
            past.append(log)
        else:
            logger.warning(
                "%s, a log that %s was trained on, does not exist; its events are not replayed.", log.data, model
            )
    if not past:
        print("No earlier log was found (see `--replay`); the model may forget what it learned from it.")
        return None
    print(f"Continues {', '.join(log.data or 'the built-in data set' for log in past)}.")
    return reduce(join_logs, (log.build(tokenizer, event_types)[0] for log in past))


def new_model(args: FineTuneArguments, dataset: Dataset, vocab_size: int) -> BlossomRecForSequentialRecommendation:
    """A small model, with the item frequencies of the training events."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 128}
    config = BlossomRecConfig(vocab_size=vocab_size, **sizes, **args.event_settings(dataset))
    model = BlossomRecForSequentialRecommendation(config)
    model.item_counts.copy_(torch.as_tensor(item_counts(dataset, vocab_size)))
    return model


def report_unknown_items(dataset: Dataset, tokenizer: BlossomRecTokenizer, data: str | None) -> None:
    """Report the events of prepared data on items that the vocabulary of the data lacks."""
    if unknown := sum(int((history == tokenizer.unk_token_id).sum()) for history in read_histories(dataset)):
        logger.warning(
            "%d events of %s are on items that the tokenizer of its preparation lacks ([UNK]). These items are not learned; "
            "prepare the log without `--tokenizer` to add them.",
            unknown,
            data,
        )


def features_by_item(
    log_args: LogArguments, tokenizer: BlossomRecTokenizer, config: BlossomRecConfig
) -> dict[str, dict[str, Any]]:
    """
    The features that the model reads, of the items in the item table of the log. What is missing there is reported.
    """
    table = log_args.item_table(tokenizer)
    names = [] if table is None else [name for name in config.item_features if name in table.columns]
    if missing := config.item_features.keys() - set(names):
        logger.warning(
            "The log has no %s of its items, which the model reads; new items start without. `blossomrec prepare --items FILE` "
            "with the options of the first log (--item_categories, ...) stores them.",
            ", ".join(sorted(missing)),
        )
    if not names:
        return {}
    known = {name: config.item_features[name] for name in names if table.schema[name] == pl.String}
    texts = [
        (as_vectors if feature["kind"] == "vectors" else category_reader(feature["names"]))(table[name])
        for name, feature in known.items()
    ]
    return {
        str(row.pop("item")): row for row in table.select("item", *names).with_columns(texts).iter_rows(named=True)
    }


def continue_past(model: BlossomRecForSequentialRecommendation, new_log: Dataset, old_log: Dataset | None) -> Dataset:
    """Join the new events to the earlier ones, and update the item frequencies of the model."""
    dataset = join_logs(old_log, new_log)
    counts = model.item_counts.numpy()
    if (np.array(dataset["past_end"]) < list(map(len, read_histories(dataset)))).any():
        counts = add_item_counts(counts, dataset, old_log)
    else:
        print("The earlier log contains every event of the new one; all of them are learned again.")
        dataset = join_logs(None, new_log)
        # If the log has grown since training, the model has not counted all of its events.
        counts = np.maximum(counts, item_counts(dataset, len(counts)))
    model.item_counts.copy_(torch.as_tensor(counts))
    return dataset


def held_out(dataset: Dataset, part: str, columns: Sequence[str]) -> Dataset | None:
    """The view of "validation" or "test" with other columns of the events; `None` if no user has an item there."""
    lengths, targets = part_lengths(dataset, part)
    return split(dataset, part, columns=columns) if ((lengths > 0) & (targets > 0)).any() else None


def validation_users(
    dataset: Dataset, training_args: TrainingArguments, eval_users: int, columns: Sequence[str]
) -> Dataset | None:
    """The users to validate on. If there are none, validation is disabled in `training_args`."""
    validation = held_out(dataset, "validation", columns)
    if validation is None:
        logger.warning(
            "No user has enough new events to hold some out; there is no validation, and the last weights are saved."
        )
        training_args.eval_strategy = IntervalStrategy.NO
        training_args.load_best_model_at_end = False
        return None
    return sample_users(validation, eval_users) if eval_users else validation


def add_adapters(model: BlossomRecForSequentialRecommendation, rank: int) -> "PeftModel":
    """Add low-rank adapters to `model` in place."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_MODULES))


def require_another_folder(output_dir: str, model: str) -> None:
    """
    Raises:
        ValueError: if the run would write into the folder of the model that it starts from.
    """
    if Path(output_dir).resolve() == Path(model).resolve():
        raise ValueError(
            f"`output_dir` is {output_dir}, the folder of `model`, which an interrupted run would damage; give another "
            "folder."
        )


@exit_on_error()
def main() -> None:
    log_args, args, training_args = parse_arguments(
        LogArguments, FineTuneArguments, TrainingArguments, description=__doc__, defaults=DEFAULTS
    )
    set_up_logging()
    check_processes(training_args.world_size)
    require_folder(training_args.output_dir)
    for tracker in training_args.report_to:
        check_tracker(tracker, get_available_reporting_integrations())
    if args.model is not None:
        require_another_folder(training_args.output_dir, args.model)
    if training_args.resume_from_checkpoint is None:
        report_replacement(training_args.output_dir)
    set_seed(training_args.seed)

    event_types = None if args.model is None else load_checkpoint(BlossomRecConfig, args.model).event_types
    dataset, tokenizer = log_args.build(event_types=event_types)
    past, vectors, old_log, old_titles, first_new = [], {}, None, None, NUM_SPECIAL_IDS
    if args.model is None:
        model, past_ends = new_model(args, dataset, len(tokenizer)), [0] * len(dataset)
    else:
        report_unknown_items(dataset, tokenizer, log_args.data)
        log_tokenizer, tokenizer = tokenizer, load_checkpoint(BlossomRecTokenizer, args.model)
        model = load_checkpoint(BlossomRecForSequentialRecommendation, args.model)
        old_titles, first_new = read_item_metadata(args.model), len(tokenizer)
        vectors = {} if args.item_vectors is None else read_item_vectors(args.item_vectors)
        log_items = log_tokenizer.decode_items(range(NUM_SPECIAL_IDS, len(log_tokenizer)))
        features = (
            {} if model.config.item_features is None else features_by_item(log_args, log_tokenizer, model.config)
        )
        if num_added := add_items(model, tokenizer, log_items, vectors=vectors, features=features):
            print(f"{num_added} new items; the catalog now has {tokenizer.num_items}.")
        past = past_logs(args.model, args.replay)
        old_log = read_past(past, args.model, tokenizer, event_types)
        dataset = continue_past(model, recode(dataset, log_tokenizer, tokenizer), old_log)
        past_ends = dataset["past_end"]
    columns = model.config.event_columns
    remedy = "drop `time_features` or `event_types`" if args.model is None else "give `--replay none`"
    require_event_columns(model.config, dataset.column_names, remedy)
    if model.config.repeat_share is None:
        model.config.repeat_share = log_args.repeat_share(dataset)
    titles = join_item_metadata([log_args.item_titles(tokenizer), old_titles])

    histories, train_ends = read_histories(dataset), part_lengths(dataset, "train")[0]
    windows = windows_to_learn(
        histories,
        past_ends,
        train_ends,
        max_length=args.max_length,
        window=args.windows,
        columns={
            name: read_histories(dataset, name)
            for name in ("weights", "basket_starts", *columns)
            if name in dataset.column_names
        },
        replay_share=args.replay_share,
        seed=training_args.seed,
    )
    if not windows.has_targets.any():
        raise ValueError(
            f"`data` is {log_args.data}, in which no user has an earlier event before a new one, so there is nothing to "
            "learn; give a log with longer histories."
        )
    if args.model is not None:
        items = tokenizer.decode_items(range(first_new, len(tokenizer)))
        to_place = [index for index, item in enumerate(items, start=first_new) if str(item) not in vectors]
        trained = [{"input_ids": history[:end]} for history, end in zip(histories, train_ends)]
        for name in columns:
            for row, values in zip(trained, read_histories(dataset, name)):
                row[name] = values[: len(row["input_ids"])]
        trained = HistoryStore.from_rows([row for row in trained if len(row["input_ids"])], columns=columns)
        initialize_from_events(model.to(training_args.device), to_place, trained)
    if training_args.max_steps <= 0:
        training_args.max_steps = count_steps(len(windows), training_args, args.min_steps)
        if training_args.max_steps > count_steps(len(windows), training_args, 0):
            logger.info(
                "The log is small and is learned for %d steps, more than %g epochs (`num_train_epochs`); with a lower `min_steps`, "
                "fewer.",
                *(training_args.max_steps, training_args.num_train_epochs),
            )
    validation = validation_users(dataset, training_args, args.eval_users, columns)
    if args.train_only != "all":
        freeze_all_but_items(model, NUM_SPECIAL_IDS if args.train_only == "embeddings" else first_new)
    if args.train_only == "lora":
        adapted = add_adapters(model, args.lora_rank)
        model.get_input_embeddings().requires_grad_(True)

    trainer = SequentialRecommendationTrainer(
        model,
        training_args,
        data_collator=PackingCollator(max_length=args.max_length, columns=columns),
        train_dataset=windows,
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    if training_args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLinesCallback())
    if trainer.is_world_process_zero():
        write_item_metadata(training_args.output_dir, titles)
        save_arguments(Path(training_args.output_dir) / "run.yaml", log_args, args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if args.train_only == "lora":
        adapted.save_pretrained(Path(training_args.output_dir) / "adapter")
        trainer.model = trainer.model_wrapped = adapted.merge_and_unload()
    trainer.save_model()
    if trainer.is_world_process_zero():
        save_logs(training_args.output_dir, [*past, log_args])
    if (test := held_out(dataset, "test", columns)) is not None:
        figures = trainer.evaluate(test, metric_key_prefix="test")
        trainer.save_metrics("test", figures)
        if trainer.is_world_process_zero():
            named = {name.removeprefix("test_"): value for name, value in figures.items() if "@" in name}
            print_figures(named, DEFAULT_KS, exclude_seen=model.config.exclude_seen)
    data = "the built-in data set" if log_args.data is None else Path(log_args.data).name
    trainer.create_model_card(model_name=Path(training_args.output_dir).resolve().name, dataset=data)


if __name__ == "__main__":
    main()
