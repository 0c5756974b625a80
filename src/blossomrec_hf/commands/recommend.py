"""
Write recommendations for all users of a log to Parquet files, with raw item ids.

    blossomrec recommend --model runs/ml-1m --data ml-1m/interactions.txt --output_dir recommendations
    accelerate launch -m blossomrec_hf.commands.recommend --model runs/shop --data data/clicks --output_dir out --top_k 100

`--data` is any log, or a folder that `blossomrec prepare` wrote. Such a folder is read row by row and may be larger than memory.
Users are divided into shards of `--shard_users`, in the order of the data set, and processes share the shards. A shard
`recommendations-00000.parquet` has the columns `user_id`, `item_id` (list, best item first) and `score` (list). Each shard is
written atomically: after an interruption, the same command continues with the first missing shard.

A model of times or event types reads those of the log. `--now` is the time for which to recommend, for models that use it; it may
not be before the last event of a user.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from datasets import Dataset, disable_progress_bars

from .. import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from ..batches import budget_batches
from ..data.parts import reading
from ..data.time_units import as_seconds
from ..training import LogArguments, parse_arguments
from ..utils.command_line import check_at_least, exit_on_error, load_checkpoint
from ..utils.environment import COMPILE_PASSES, check_processes, keep_compiled_code, worth_compiling
from ..utils.files import atomic_write, recover_writes, require_folder
from ..utils.progress import count_noun, progress_bar, set_up_logging


@dataclass
class RecommendArguments:
    """The model, the recommendations and the output."""

    model: str = field(default="runs/blossomrec", metadata={"help": "Folder of a trained model, or a Hub id."})
    output_dir: str = field(default="recommendations", metadata={"help": "Folder for the shards."})
    top_k: int = field(default=10, metadata={"help": "Number of items per user."})
    exclude_seen: bool | None = field(
        default=None,
        metadata={
            "help": "Exclude items of the user's history. By default, they are excluded unless users of the training log repeat "
            "items."
        },
    )
    now: str | None = field(
        default=None,
        metadata={
            "help": "Time for which to recommend: seconds since 1970, or a date (UTC); for models whose time features use it. By "
            "default, unknown."
        },
    )
    target_event_type: str | None = field(
        default=None,
        metadata={
            "help": "Type of the event to recommend for, one of the model's; by default, the first of its target types."
        },
    )
    max_length: int = field(
        default=1000, metadata={"help": "Number of latest items that the model reads of each history."}
    )
    max_tokens: int = field(default=65536, metadata={"help": "Number of items per batch and process."})
    max_users: int = field(default=4096, metadata={"help": "Maximum number of users per batch and process."})
    shard_users: int = field(default=50_000, metadata={"help": "Number of users per shard."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16; by default, the setting of `accelerate launch`."}
    )
    torch_compile: bool | None = field(
        default=None,
        metadata={
            "help": f"Compile the model first. By default, on a GPU if there are {COMPILE_PASSES:,} batches of --max_tokens "
            "items or more."
        },
    )

    def __post_init__(self):
        for name in ("top_k", "max_length", "max_tokens", "max_users", "shard_users"):
            check_at_least(1, **{name: getattr(self, name)})
        if self.now is not None:
            as_seconds("`now`", self.now)


def recommend_shard(
    model: BlossomRecForSequentialRecommendation,
    tokenizer: BlossomRecTokenizer,
    rows: Dataset,
    args: RecommendArguments,
    accelerator: Accelerator,
) -> pa.Table:
    """Compute the recommendations for the users of `rows`, in their order. Users of similar length share a batch."""
    table = rows.with_format("arrow")[:]
    histories = table["input_ids"].combine_chunks()
    columns = {
        name: table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        for name in model.config.event_columns
    }
    asked = asked_for(model.config, args)
    items, offsets = histories.flatten().to_numpy(), histories.value_lengths().to_numpy().cumsum()
    offsets = np.append(0, offsets)
    lengths = np.minimum(np.diff(offsets), args.max_length)
    order = np.argsort(-lengths, kind="stable")
    item_ids = np.full((len(rows), args.top_k), -1, np.int64)
    scores = np.full((len(rows), args.top_k), -np.inf, np.float32)
    for part in budget_batches(lengths[order], args.max_tokens, max_count=args.max_users):
        users = order[part]
        batch = lists_of(items.astype(np.int64), offsets, users)
        read = {name: lists_of(values, offsets, users) for name, values in columns.items()}
        options = {"top_k": args.top_k, "exclude_seen": args.exclude_seen, "max_length": args.max_length}
        with accelerator.autocast():
            out = model.recommend(batch, **options, **read, **asked)
        item_ids[users], scores[users] = out.item_ids.cpu().numpy(), out.scores.float().cpu().numpy()
    found = item_ids >= 0
    ends = pa.array(np.append(0, found.sum(1).cumsum()), pa.int32())
    raw = tokenizer.decode_items(item_ids[found])
    raw = pa.array(raw, pa.int64() if tokenizer.item_type == "int" else pa.string())
    columns = {
        "user_id": table["user_id"],
        "item_id": pa.ListArray.from_arrays(ends, raw),
        "score": pa.ListArray.from_arrays(ends, pa.array(scores[found])),
    }
    return pa.table(columns)


def lists_of(values: np.ndarray, offsets: np.ndarray, users: np.ndarray) -> list[torch.Tensor]:
    """The values of the events of each user."""
    return [torch.from_numpy(values[offsets[user] : offsets[user + 1]]) for user in users]


def asked_for(config: BlossomRecConfig, args: RecommendArguments) -> dict[str, int]:
    """
    The time and the event type to recommend for, as arguments of `model.recommend`.

    Raises:
        ValueError: if the model does not use what is given.
    """
    asked = {}
    if args.now is not None:
        if not config.uses_now:
            raise ValueError(
                f"`now` is {args.now}, but the model's time features ({config.time_features}) do not depend on it; drop it."
            )
        asked["prediction_time"] = int(as_seconds("`now`", args.now))
    if args.target_event_type is not None:
        if args.target_event_type not in (config.event_types or ()):
            raise ValueError(
                f"`target_event_type` is {args.target_event_type!r}, but the model's event types are {config.event_types}."
            )
        asked["target_event_type"] = config.event_types.index(args.target_event_type)
    return asked


def require_later(now: str, dataset: Dataset) -> None:
    """
    Raises:
        ValueError: if a user has an event after `now`.
    """
    tables = dataset.with_format("arrow").select_columns(["timestamps"]).iter(batch_size=50_000)
    times = (table["timestamps"].combine_chunks().flatten().to_numpy() for table in tables)
    latest = max((int(values.max()) for values in times if len(values)), default=0)
    if latest > as_seconds("`now`", now):
        raise ValueError(
            f"`now` is {now}, before the latest event of the log, {np.datetime64(latest, 's')} UTC ({latest}); give a later time, "
            "or a log that ends before it."
        )


def count_batches(dataset: Dataset, args: RecommendArguments) -> int:
    """Number of batches of `args.max_tokens` items that the histories fill."""
    num_items = 0
    for table in dataset.with_format("arrow").select_columns(["input_ids"]).iter(batch_size=50_000):
        lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
        num_items += int(np.minimum(lengths, args.max_length).sum())
    return -(-num_items // args.max_tokens)


def fingerprint(
    model: BlossomRecForSequentialRecommendation,
    tokenizer: BlossomRecTokenizer,
    dataset: Dataset,
    args: RecommendArguments,
    mixed_precision: str,
) -> bytes:
    """
    A digest of everything that the recommendations depend on: configuration, weights, vocabulary, users, events and settings.
    Each shard stores it, so that shards of different runs are never mixed.
    """
    without_effect = ("model", "output_dir", "max_tokens", "max_users", "torch_compile")
    settings = {name: value for name, value in asdict(args).items() if name not in without_effect}
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    weights = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    data, columns = hashlib.sha256(), model.config.event_columns
    for table in (
        dataset.with_format("arrow").select_columns(["user_id", "input_ids", *columns]).iter(batch_size=50_000)
    ):
        histories = table["input_ids"].combine_chunks()
        for values in (table["user_id"].to_pylist(), histories.value_lengths().to_pylist()):
            data.update(json.dumps(values).encode())
        data.update(histories.flatten().to_numpy().astype(np.int64).tobytes())
        for name in columns:
            values = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            data.update(values.astype(np.int64).tobytes())
    digests = {
        "model": weights.hexdigest(),
        "vocabulary": hashlib.sha256(json.dumps([tokenizer.item_type, vocabulary]).encode()).hexdigest(),
        "data": data.hexdigest(),
    }
    return json.dumps({**settings, "mixed_precision": mixed_precision, **digests}).encode()


@exit_on_error()
def main() -> None:
    log_args, args = parse_arguments(LogArguments, RecommendArguments, description=__doc__)
    set_up_logging()
    disable_progress_bars()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    check_processes(accelerator.num_processes)
    tokenizer = load_checkpoint(BlossomRecTokenizer, args.model)
    model = load_checkpoint(BlossomRecForSequentialRecommendation, args.model).to(accelerator.device).eval()
    with accelerator.main_process_first():  # the other processes load what the first one built
        dataset, _ = log_args.build(tokenizer, model.config.event_types)
    if missing := [name for name in model.config.event_columns if name not in dataset.column_names]:
        raise ValueError(
            f"The model reads {' and '.join(missing)} of events, but the data has {', '.join(dataset.column_names)}; name the "
            "columns of the log with `timestamp` and `event_type`."
        )
    asked_for(model.config, args)
    if args.now is not None:
        require_later(args.now, dataset)

    folder = Path(args.output_dir)
    require_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        recover_writes(folder)
    accelerator.wait_for_everyone()
    made_by = fingerprint(model, tokenizer, dataset, args, accelerator.mixed_precision)
    names = [f"recommendations-{number:05d}.parquet" for number in range(-(-len(dataset) // args.shard_users))]
    own = list(enumerate(names))[accelerator.process_index :: accelerator.num_processes]
    done = 0
    for path in sorted(folder.glob("recommendations-*.parquet")):
        with reading(str(path)):
            metadata = pq.read_schema(path).metadata or {}
        if metadata.get(b"made_by") != made_by:
            raise ValueError(
                f"`output_dir` is {folder}, in which {path.name} was made with another model, log or setting; give another "
                "folder, or remove the file."
            )
        done += path.name in names[accelerator.process_index :: accelerator.num_processes]
    compiled = args.torch_compile
    if compiled is None:
        compiled = worth_compiling(accelerator.device, count_batches(dataset, args) // accelerator.num_processes)
    if compiled and done < len(own):
        sizes = {"max_tokens": args.max_tokens, "max_histories": args.max_users, "max_length": args.max_length}
        keep_compiled_code()
        with accelerator.autocast():
            model.compile_for_inference(**sizes)
    bar = progress_bar(
        total=len(own), initial=done, description="Shards", enabled=accelerator.is_main_process, leave=False
    )
    with bar:
        for number, name in own:
            if (folder / name).exists():
                continue
            first = number * args.shard_users
            rows = dataset.select(range(first, min(first + args.shard_users, len(dataset))))
            table = recommend_shard(model, tokenizer, rows, args, accelerator)
            with atomic_write(folder / name) as partial:
                pq.write_table(table.replace_schema_metadata({"made_by": made_by}), partial)
            bar.update()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"{count_noun(len(dataset), 'user')} in {count_noun(len(names), 'shard')} in {folder}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
