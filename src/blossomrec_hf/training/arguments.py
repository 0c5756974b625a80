"""The arguments of the training loop, and arguments from the command line or a file."""

import logging
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from accelerate.tracking import get_available_trackers
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser

from ..batches.windows import WINDOWS
from ..data.options import ItemOptions
from ..model.configuration_blossomrec import BlossomRecConfig
from ..utils.command_line import HelpFormatter
from ..utils.environment import COMPILE_PASSES
from ..utils.files import atomic_write
from .log_arguments import LogArguments
from .recipes import SHORT_MEDIAN, Recipe, merge_overrides


logger = logging.getLogger(__name__)

# Arguments that may differ between an interrupted run and its resumption, because the weights do not depend on them
# (except for rounding, which depends on how steps are executed).
_FREE_ON_RESUME = (
    "output_dir resume logging_steps save_seconds save_steps eval_tokens report_to push_to_hub hub_model_id "
    "hub_private_repo hub_revision torch_compile cuda_graphs".split()
)
# These come first in a command.
_FIRST_ARGUMENTS = "data attention_types num_key_value_heads max_length num_train_epochs".split()


@dataclass
class LoopArguments:
    """
    Arguments of [`~blossomrec_hf.training.train`], readable by `HfArgumentParser`.

    A step is one update of the weights. It reads about `tokens_per_step` items in total, whatever the number of processes
    and accumulation steps, so that the learning rate need not change with the number of devices.
    """

    output_dir: str = field(
        default="runs/blossomrec", metadata={"help": "Output directory for checkpoints, metrics and the model."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the initial weights, the data order and the dropout."})
    max_length: int = field(
        default=200, metadata={"help": "Number of latest items that the model reads of each history."}
    )
    windows: str = field(
        default="latest",
        metadata={
            "help": "Events of histories longer than max_length to train on. latest: the latest max_length; overlapping: all, in "
            "windows of max_length, each event predicted once per epoch, with at least half a window of context if the history has it; "
            "random_crop: max_length consecutive events, drawn anew in each epoch."
        },
    )
    num_train_epochs: int = field(
        default=200, metadata={"help": "Maximum number of epochs. Early stopping usually ends the run before."}
    )
    max_steps: int = field(default=-1, metadata={"help": "Maximum number of steps; -1 for no limit."})
    tokens_per_step: int = field(
        default=16384, metadata={"help": "Number of items per step, summed over processes and accumulation steps."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Number of forward passes per step and process."}
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "no, bf16 or fp16; by default, the setting of `accelerate config` or `accelerate launch`."},
    )
    torch_compile: bool | None = field(
        default=None,
        metadata={
            "help": f"Compile the training step. By default, runs of {COMPILE_PASSES:,} steps or more are compiled on a GPU."
        },
    )
    cuda_graphs: bool = field(
        default=True,
        metadata={
            "help": "Capture forward and backward passes as CUDA graphs and replay them. Without effect on a CPU, with fp16 "
            "or FSDP, and if the logits do not fit in memory at once; the log says so."
        },
    )

    optim: str = field(
        default="adamw",
        metadata={"help": "adamw (fused if the device supports it), or any optimizer of `transformers`."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay of AdamW, applied to weight matrices only."}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "beta1 of AdamW."})
    adam_beta2: float = field(default=0.98, metadata={"help": "beta2 of AdamW."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "epsilon of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum norm of the gradient; 0 disables clipping."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "Learning rate schedule, any of `transformers`: linear, cosine, ..."},
    )
    warmup_steps: int = field(
        default=100, metadata={"help": "Number of steps in which the learning rate rises from 0 to its peak."}
    )

    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Decay of the moving average of the weights that is validated and saved; 0 disables it."},
    )

    eval_epochs: int = field(default=1, metadata={"help": "Number of epochs between validations."})
    eval_users: int = field(
        default=0,
        metadata={"help": "Number of users in the validation sample, the same in every run; 0 for all users."},
    )
    eval_tokens: int = field(default=65536, metadata={"help": "Number of items per batch and process in evaluation."})
    metric_for_best_model: str = field(
        default="ndcg@10",
        metadata={
            "help": "Validation metric that selects the best weights. Seen items are excluded from the ranking if at most "
            "1 %% of the test targets repeat one; ndcg@10_unseen always excludes them, ndcg@10_all never. With _now appended, "
            "the model is given the time of the event to be predicted, which its time_features have to use."
        },
    )
    patience: int = field(
        default=20,
        metadata={
            "help": "Number of validations without improvement after which training stops; 0 disables early stopping."
        },
    )

    logging_steps: int = field(default=50, metadata={"help": "Number of steps between two lines of training metrics."})
    save_seconds: float = field(
        default=60.0,
        metadata={
            "help": "Minimum number of seconds between two checkpoints, which are written at the end of an epoch; 0 for every epoch."
        },
    )
    save_steps: int = field(
        default=0, metadata={"help": "Number of steps between two further checkpoints inside an epoch; 0 for none."}
    )
    report_to: str = field(
        default="none",
        metadata={
            "help": "Experiment tracker, which must be installed: tensorboard, trackio, wandb, mlflow, ..., or none."
        },
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the best model to the Hub after training."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to upload to; by default, the name of the output directory."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Create a private repository."})
    hub_revision: str | None = field(
        default=None, metadata={"help": "Branch to upload to, created if it does not exist; by default, main."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Continue from the last checkpoint in the output directory."}
    )

    def __post_init__(self):
        for name in (
            "max_length",
            "num_train_epochs",
            "tokens_per_step",
            "gradient_accumulation_steps",
            "eval_epochs",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("eval_tokens", "logging_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "warmup_steps",
            "patience",
            "eval_users",
            "save_seconds",
            "save_steps",
            "max_grad_norm",
            "weight_decay",
        ):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("windows", self.windows in WINDOWS, ", ".join(WINDOWS))
        self._require("learning_rate", self.learning_rate > 0, "above 0")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "0 or more and below 1")
        self._require("max_steps", self.max_steps == -1 or self.max_steps >= 1, "-1 or at least 1")
        self._require("mixed_precision", self.mixed_precision in (None, "no", "bf16", "fp16"), "no, bf16 or fp16")

        check_tracker(self.report_to, [str(tracker) for tracker in get_available_trackers()])

    def _require(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise ValueError(f"`{name}` must be {expected}, got {getattr(self, name)!r}.")

    def resume_critical_args(self) -> dict[str, Any]:
        """The arguments that must be equal in an interrupted run and its resumption, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FREE_ON_RESUME}


def check_tracker(report_to: str, available: Sequence[str]) -> None:
    """
    Raises:
        ValueError: if `report_to` is a tracker that is not among the `available` ones.
    """
    if report_to not in ("none", "all", *available):
        raise ValueError(
            f"`report_to` is {report_to!r}, which is unknown or not installed: install it (`pip install {report_to}`), or "
            f"give {', '.join(available)}{' or ' if available else ''}none."
        )


# Other options of `blossomrec prepare`, for the message that names it.
_PREPARE_OPTIONS = {option.name for option in fields(ItemOptions)} | set(
    "items split validation test validation_from test_from folds fold_width validation_users test_users".split()
)


def parse_arguments(
    *argument_classes: type,
    description: str | None = None,
    built_in: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    recipes: Mapping[str, Recipe] | None = None,
    suitable: str | None = None,
) -> tuple[Any, ...]:
    """
    Parse dataclasses from the command line, and from a YAML file of the same names if `--config FILE` is given. The command
    line has precedence over the file, the file over the recipe, and the recipe over the defaults.

    Args:
        argument_classes: the dataclasses.
        description: text of `--help` before the options.
        built_in: defaults for the built-in data set, which is used if `data` is not given.
        defaults: defaults that replace those of the classes.
        recipes: what `--recipe` may name, besides "none".
        suitable: the recipe if neither `--recipe` nor `--config` is given. The built-in data set has none. Under FSDP, which
            has no average of the weights, it is used without `ema_decay`.

    Raises:
        ValueError: if an option or the recipe is unknown, or the file has an unknown name or a value of a wrong type.
    """
    epilog = None
    if built_in:
        listed = ", ".join(f"--{name} {value}" for name, value in built_in.items())
        epilog = textwrap.fill(f"Defaults for the built-in data set: {listed}.", 100)
    parser = HfArgumentParser(argument_classes, description=description, epilog=epilog, formatter_class=HelpFormatter)
    parser.add_argument(
        "--config", help="YAML file of arguments, such as the run.yaml of an earlier run; by default, none."
    )
    if recipes:
        listed = "; ".join(
            f"{name}: {recipe.purpose} (found on {recipe.found_on})" for name, recipe in recipes.items()
        )
        default = f"short if the median user has fewer than {SHORT_MEDIAN} events, and medium if not"
        parser.add_argument(
            "--recipe",
            help=f"Settings that replace the defaults. {listed}; none. By default, {default}; none with --config and with the "
            "built-in data set.",
        )
    parser.set_defaults(**(defaults or {}))
    known, _ = parser.parse_known_args()
    from_file = {}
    if known.config is not None:
        from_file = read_arguments(known.config, *argument_classes)
        if unknown := sorted(set(from_file) - set(vars(known))):
            raise ValueError(
                f"`config` {known.config} has {', '.join(unknown)}, which this command has no arguments for."
            )
    chosen, changes, overrides = getattr(known, "recipe", None) or from_file.pop("recipe", None), {}, {}
    if known.data is None and from_file.get("data") is None:
        parser.set_defaults(**(built_in or {}))
    elif chosen is None and known.config is None and suitable is not None:
        chosen = suitable
        logger.info("Recipe %s: %s. --recipe names another, or none.", chosen, recipes[chosen].purpose)
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            changes = {"ema_decay": 0.0}
            logger.info("It is used without `ema_decay`: a sharded model (FSDP) has no average of its weights.")
    if chosen not in (None, "none"):
        if chosen not in recipes:
            raise ValueError(f"`recipe` is {chosen!r}; it may be {', '.join(recipes)} or none.")
        settings, overrides = recipes[chosen].arguments(vars(known))
        parser.set_defaults(**settings | changes)
    parser.set_defaults(**from_file)
    *parsed, rest, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        name = unknown[0].partition("=")[0]
        remedy = "see --help for its options"
        if name.removeprefix("--") in _PREPARE_OPTIONS:
            remedy = "prepare the log with it (`blossomrec prepare`), and give the folder as --data"
        raise ValueError(f"{name} is no option of this command; {remedy}.")
    for part in parsed:
        if overrides and hasattr(part, "config_overrides"):
            part.config_overrides = merge_overrides(overrides, part.config_overrides)
    return tuple(parsed)


def read_arguments(path: str | Path, *argument_classes: type) -> dict[str, Any]:
    """
    Read a YAML file of arguments into a dictionary.

    Args:
        argument_classes: the dataclasses of the arguments. A string is accepted for a value of any type, as on the command
            line.

    Raises:
        ValueError: if the file is not valid YAML, is not a mapping, or has a value of a wrong type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a valid YAML file ({error}); correct it, or give another file.") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path} has {values!r:.80}; it must be a mapping of argument names to values.")
    for argument_class in argument_classes:
        for name, hint in get_type_hints(argument_class).items():
            if name in values and not _may_be(values[name], hint):
                wanted = hint.__name__ if isinstance(hint, type) else hint
                raise ValueError(f"{path} has {values[name]!r} for `{name}`, which must be {wanted}.")
    return values


def _may_be(value: Any, hint: Any) -> bool:
    """Whether a value may be assigned to an annotated type; a string always may, as on the command line."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_origin(kind) or kind for kind in kinds]
    if isinstance(value, str) or not all(isinstance(kind, type) for kind in kinds):
        return True
    return type(value) in kinds or (type(value) is int and float in kinds)


def save_arguments(path: str | Path, *arguments: Any) -> None:
    """Write dataclasses to a YAML file that `--config` reads."""
    values = {name: value for part in arguments for name, value in asdict(part).items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def changed_arguments(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """
    The arguments of `blossomrec train` in `configuration` that differ from their defaults, without the seed, in the order
    in which a command states them. With the built-in data set, all arguments that are set, because some have other
    defaults there.
    """
    defaults = asdict(LogArguments()) | {field.name: field.default for field in fields(LoopArguments)}
    defaults |= {field.name: field.default for field in fields(BlossomRecConfig)}
    defaults |= {
        "attention_types": ["blossom"],
        "config_overrides": "{}",
        "num_key_value_heads": configuration.get("num_attention_heads", BlossomRecConfig.num_attention_heads),
        "event_types": False,
    }
    built_in = configuration.get("data") is None
    return {
        name: configuration[name]
        for name in dict.fromkeys([*_FIRST_ARGUMENTS, *configuration])
        if name in configuration and name != "seed" and configuration[name] is not None
        if built_in or name not in defaults or configuration[name] != defaults[name]
    }
