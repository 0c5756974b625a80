"""
Trains a BlossomRec model on a log of interactions, evaluates it by full ranking and saves it.

    accelerate launch examples/train.py           # the built-in data set, a few minutes of a CPU
    python examples/train.py --data ml-1m/interactions.txt --max_length 1000 --mixed_precision bf16 --seed 1
    python examples/train.py --data ml-100k.inter --hidden_size 64 --max_length 50 --output_dir runs/ml-100k --resume

All options: `python examples/train.py --help`.
"""

import json
import re
from dataclasses import asdict, dataclass, field

import torch
from accelerate.utils import set_seed

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.command_line import exit_on_error
from blossomrec_hf.data import item_counts, split
from blossomrec_hf.data.metadata import write_item_metadata
from blossomrec_hf.hub import write_card, write_summary
from blossomrec_hf.training import (
    HeldOutItems,
    LogArguments,
    LoopArguments,
    SelectionWatch,
    TrainingLoop,
    append_result,
    describe_environment,
    evaluate,
    parse_arguments,
    save_arguments,
    set_up_logging,
)


# Small enough for two CPU cores and the few minutes that the built-in data set is meant for.
BUILT_IN = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.1,
    "tokens_per_step": 2048,
    "learning_rate": 3e-3,
    "warmup_steps": 50,
    "num_train_epochs": 36,
    "eval_epochs": 2,
}


@dataclass
class ModelArguments:
    """The model; the rest of `BlossomRecConfig` keeps its defaults."""

    attention_types: list[str] = field(
        default_factory=lambda: ["blossom"],
        metadata={"help": "blossom, long_term, short_term or full: one word for all layers, or one for each."},
    )
    hidden_size: int = field(default=128, metadata={"help": "The width of the model."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Layers."})
    num_attention_heads: int = field(default=8, metadata={"help": "Query heads."})
    num_key_value_heads: int = field(default=2, metadata={"help": "Key/value heads."})
    intermediate_size: int = field(default=256, metadata={"help": "The width inside the feed-forward."})
    hidden_dropout_prob: float = field(default=0.3, metadata={"help": "Dropout."})
    config_overrides: str = field(
        default="{}", metadata={"help": 'Any other settings of BlossomRecConfig, as JSON: {"objective": "gbce"}.'}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "blossom_torch, blossom_triton or eager; left out, the fastest that fits."}
    )

    def __post_init__(self) -> None:
        try:
            unknown = json.loads(self.config_overrides).keys() - BlossomRecConfig().to_dict().keys()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"`config_overrides` is {self.config_overrides!r}; it must be a JSON object.") from error
        if unknown:
            raise ValueError(
                f"`config_overrides` names {', '.join(sorted(unknown))}; BlossomRecConfig has no such setting."
            )


@dataclass
class OutputArguments:
    """What to show and to keep of the results."""

    eval_ks: list[int] = field(default_factory=lambda: [1, 5, 10, 20], metadata={"help": "Cut-offs of the figures."})
    all_and_unseen: bool = field(
        default=False,
        metadata={"help": "Also report the test figures with nothing excluded and with seen items excluded."},
    )
    eval_negatives: int = field(
        default=0, metadata={"help": "Also rank test items beside so many drawn ones, as others do (100); 0: no."}
    )
    watch: bool = field(
        default=False, metadata={"help": "Follow gates and selection: selection.jsonl and selection.png in the run."}
    )
    results_json: str | None = field(
        default=None,
        metadata={"help": "Add the results to this file, keyed by configuration, seed and commit; left out, none."},
    )

    def __post_init__(self) -> None:
        if self.eval_negatives < 0:
            raise ValueError(f"`eval_negatives` is {self.eval_negatives}; it must be 0 or more.")


@exit_on_error()
def main() -> None:
    log_args, model_args, args, output_args = parse_arguments(
        LogArguments, ModelArguments, LoopArguments, OutputArguments, description=__doc__, built_in=BUILT_IN
    )
    set_up_logging()

    dataset, tokenizer = log_args.build()
    titles = log_args.item_titles(tokenizer)

    # The same weights on every process; the loop seeds what has to differ.
    set_seed(args.seed)
    types = model_args.attention_types
    settings = asdict(model_args)
    attn_implementation = settings.pop("attn_implementation")
    settings |= {"attention_types": types[0] if len(types) == 1 else types}
    settings |= json.loads(settings.pop("config_overrides"))
    settings.setdefault("repeat_share", log_args.repeat_share(dataset))
    config = BlossomRecConfig(vocab_size=len(tokenizer), **settings)
    model = BlossomRecForSequentialRecommendation._from_config(config, attn_implementation=attn_implementation)
    model.item_counts.copy_(torch.as_tensor(item_counts(dataset, len(tokenizer))))

    validation_view = split(dataset, "validation", max_length=args.max_length)
    test_view = split(dataset, "test", max_length=args.max_length)
    if output_args.eval_negatives:  # who has met every item is told now, not after the training
        HeldOutItems.from_rows(test_view).sample_negatives(output_args.eval_negatives, vocab_size=len(tokenizer))
    loop = TrainingLoop(
        model,
        split(dataset, "train", max_length=args.max_length),
        validation_view,
        args=args,
        tokenizer=tokenizer,
        callbacks=[SelectionWatch(validation_view)] if output_args.watch else [],
    )
    accelerator = loop.accelerator
    size = f"{len(dataset)} users, {len(tokenizer) - 2} items; {model.num_parameters():,} weights"
    accelerator.print(f"{size} on {accelerator.device}", flush=True)
    result = loop.run()
    if accelerator.is_main_process:
        save_arguments(f"{args.output_dir}/run.yaml", log_args, model_args, args, output_args)
        write_item_metadata(args.output_dir, titles)

    figures = evaluate(
        model,
        test_view,
        ks=output_args.eval_ks,
        max_tokens=args.eval_tokens,
        num_negatives=output_args.eval_negatives,
        all_and_unseen=output_args.all_and_unseen,
        accelerator=accelerator,
    )
    if not accelerator.is_main_process:
        return

    print(f"\n{result.epochs} epochs in {result.seconds:.0f} s; the best was epoch {result.best_epoch}, ", end="")
    print(f"validation {args.metric_for_best_model} {result.best_metric:.4f}. Saved in {args.output_dir}.")
    print(f"{config.repeat_share:.1%} of the test targets already occur in their user's history: ", end="")
    print(f"{'seen items are' if config.exclude_seen else 'nothing is'} excluded from the ranking.")
    print_figures(figures, output_args.eval_ks, exclude_seen=config.exclude_seen)
    # The saved model, because a sharded one answers only when all processes ask.
    model = BlossomRecForSequentialRecommendation.from_pretrained(args.output_dir).to(accelerator.device)
    print_recommendations(model, tokenizer, test_view[0], args.max_length)

    configuration = {**asdict(log_args), **asdict(model_args), **args.that_shape_the_weights()}
    for name in ("eval_negatives", "all_and_unseen"):
        if value := getattr(output_args, name):
            configuration[name] = value
    run = {"seed": configuration.pop("seed"), "configuration": configuration, "test": figures}
    run |= {"repeat_share": config.repeat_share, "exclude_seen": config.exclude_seen}
    run |= {"training": asdict(result), **describe_environment()}
    if output_args.results_json is not None:
        append_result(output_args.results_json, **run)
    write_summary(args.output_dir, run)
    write_card(args.output_dir)
    if args.push_to_hub:
        print(f"\nPushed: {loop.push_to_hub().commit_url}")


def print_figures(figures: dict[str, float], ks: list[int], *, exclude_seen: bool) -> None:
    """The test figures as a table: of the protocol, of repeated and of new targets, and what else was asked for."""
    print(f"\n{'test':<24}" + "".join(f"{'@' + str(k):>9}" for k in ks))
    kinds = {"": "unseen items" if exclude_seen else "all items", "_repeated": "repeated", "_new": "new"}
    kinds |= {"_all": "all items", "_unseen": "unseen items"}
    for suffix in dict.fromkeys(re.fullmatch(r"\w+@\d+(.*)", name)[1] for name in figures):
        kind = kinds.get(suffix) or f"{suffix.removeprefix('_uni')} drawn"
        for name in ("recall", "ndcg", "mrr"):
            row = "".join(f"{figures[f'{name}@{k}{suffix}']:>9.4f}" for k in ks)
            print(f"{name + ', ' + kind:<24}{row}")


def print_recommendations(model, tokenizer, row: dict, max_length: int) -> None:
    """Ten items for one user; where users do not repeat items, none of the whole history."""
    history = torch.tensor([row["seen_ids"]], device=model.device)
    recommended = model.recommend(history, top_k=min(10, len(tokenizer) - 2), max_length=max_length)
    found = recommended.item_ids[0] >= 0
    items, scores = tokenizer.decode_items(recommended.item_ids[0][found]), recommended.scores[0][found].tolist()
    print(f"\nuser {row['user_id']}: the latest items {tokenizer.decode_items(row['input_ids'][-10:])}")
    for item, score in zip(items, scores):
        print(f"{item!s:>12} {score:8.3f}")


if __name__ == "__main__":
    main()
