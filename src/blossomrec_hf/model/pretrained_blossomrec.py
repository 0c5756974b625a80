"""The parts of BlossomRec models that are not computation: initialization, saving, resizing, refusal of generation."""

import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .attention_blossomrec import BlossomAttention, BlossomGate
from .checkpoint_blossomrec import CheckpointMixin
from .configuration_blossomrec import BlossomRecConfig
from .events_blossomrec import EventVectors
from .features_blossomrec import CategoryVectors, ItemFeatures, VectorProjection
from .ids_blossomrec import NUM_SPECIAL_IDS
from .manifest_blossomrec import require_loadable
from .modules_blossomrec import LogStatistics
from .streams_blossomrec import BlossomCompressor, save_streams


if TYPE_CHECKING:
    # Unused here: `transformers` copies to a checkpoint the files that its model imports, and these belong there.
    from .pipeline_blossomrec import SequentialRecommendationPipeline  # noqa: F401
    from .tokenization_blossomrec import BlossomRecTokenizer  # noqa: F401

# The places of the classes in a checkpoint, for the Auto classes and `pipeline`.
AUTO_MAP = {
    "AutoConfig": "configuration_blossomrec.BlossomRecConfig",
    "AutoModel": "modeling_blossomrec.BlossomRecModel",
    "AutoModelForCausalLM": "modeling_blossomrec.BlossomRecForSequentialRecommendation",
    "AutoTokenizer": ["tokenization_blossomrec.BlossomRecTokenizer", None],
}
CUSTOM_PIPELINES = {
    "sequential-recommendation": {
        "impl": "pipeline_blossomrec.SequentialRecommendationPipeline",
        "pt": ["AutoModelForCausalLM"],
        "type": "text",
    }
}


class BlossomRecPreTrainedModel(CheckpointMixin, PreTrainedModel):
    """Initialization, saving and resizing of BlossomRec models."""

    config: BlossomRecConfig
    config_class = BlossomRecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BlossomRecLayer"]
    _supports_attention_backend = True

    def __init__(self, config: BlossomRecConfig, *args: Any, **kwargs: Any) -> None:
        config.check()  # attributes may have been set since its creation
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        """As in `transformers`; also records the frozen parameters, which loaded weights replace by trainable ones."""
        super().post_init()
        self._frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch."):
            # FSDP2 gives a sharded model a class of its own, which no checkpoint can name.
            parent = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
            cls.__module__, cls.__name__ = parent.__module__, parent.__name__

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # By default, `transformers` would choose "eager", the reference, for a custom model.
        try:
            return super().get_correct_attn_implementation(requested_attention or "blossom", is_init_check)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"`attn_implementation` is {requested_attention!r}, which BlossomRec does not have; give 'blossom' (the default), "
                "'blossom_torch', 'blossom_triton' or 'eager' (the reference)."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """
        As in `transformers`; the configuration also names the code of the model, the tokenizer, the pipeline and streams of
        your own, which is saved, too.

        Raises:
            ValueError: for a model or configuration of a class that is defined in a script, a notebook or a function.
        """
        for part in (self, self.config):
            require_loadable(type(part))
        if self._auto_class is not None:  # then the code is saved, too
            self.config.auto_map = dict(AUTO_MAP)
            self.config.custom_pipelines = CUSTOM_PIPELINES
        attentions = [module for module in self.modules() if isinstance(module, BlossomAttention)]
        streams = [stream for attention in attentions for stream in attention.streams]
        write = kwargs.get("is_main_process", args[0] if args else True)
        save_streams(streams, self.config, save_directory, write=write)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlossomCompressor):
            init.normal_(module.position, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, BlossomGate):
            init.zeros_(module.weight)
            bias = torch.tensor(module.initial_biases).repeat_interleave(self.config.num_attention_heads)
            init.copy_(module.bias, bias)
        elif isinstance(module, EventVectors):
            module.initialize()
        elif isinstance(module, LogStatistics):
            for buffer in module.buffers():
                init.zeros_(buffer)
        elif "replaced_item" in module._parameters:
            init.normal_(module.replaced_item, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, CategoryVectors):
            if not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[0])
            init.zeros_(module.codes)
            init.zeros_(module.offsets)
        elif isinstance(module, VectorProjection):
            init.zeros_(module.table)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """
        As in `transformers`, for a catalog: old rows do not change, and `item_counts` grows by zeros. With
        `mean_resizing` (the default), a new item starts at the mean of the old ones. In a model with `item_features`, a new
        item has no features until `set_item_features`, and its id embedding is zero.
        """
        old = self.get_input_embeddings().num_embeddings
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing=False)
        new = embeddings.num_embeddings
        base = self.base_model
        counts = base.item_counts.new_zeros(new)
        counts[: min(old, new)] = base.item_counts[:new]
        base.log_statistics.item_counts = counts
        base._static_encoders.clear()  # of the former weights
        tables = {id(m.weight): m.weight for m in (embeddings, self.get_output_embeddings()) if m is not None}
        if base.item_features is not None:
            base.item_features.resize(new)
            self.config.item_features = base.item_features.describe()
            embeddings.weight.data[old:] = 0
        elif mean_resizing and new > old:
            for weight in tables.values():
                weight.data[old:] = weight.data[NUM_SPECIAL_IDS:old].mean(0)
        return embeddings

    def set_item_features(self, features: ItemFeatures, *, first_id: int = NUM_SPECIAL_IDS) -> None:
        """
        Set the features of all items, or of the items from vocabulary id `first_id` on.

        Raises:
            ValueError: if `config.item_features` is `None`, or `features` do not fit it: other columns, another number of
                items, vectors of another length or with values that are not finite, other categories or codes.
        """
        base = self.base_model
        if base.item_features is None:
            raise ValueError(
                "`config.item_features` is None; make the model with `BlossomRecConfig(item_features=features.config())`."
            )
        if not NUM_SPECIAL_IDS <= first_id <= self.config.vocab_size:
            raise ValueError(
                f"`first_id` is {first_id}; it must be the vocabulary id of an item, from {NUM_SPECIAL_IDS} to "
                f"{self.config.vocab_size - 1}, and for further items, `resize_token_embeddings` comes first."
            )
        base.item_features.replace(first_id, features)
        self.config.item_features = base.item_features.describe()


class GenerationError(AttributeError, ValueError):
    """
    Raised by everything that generates sequences. An `AttributeError`, so that `hasattr(model, "generate")` is false.
    """

    def __init__(self) -> None:
        super().__init__(
            "BlossomRec recommends the next item and does not generate sequences; use `model.recommend(input_ids)` or "
            '`pipeline("sequential-recommendation", model=...)`.'
        )


class NoGenerationMixin:
    """Refusal of the methods that generate sequences, in place of errors deep inside of them."""

    def __getattr__(self, name: str) -> Any:
        if name in ("generate", "generation_config"):
            raise GenerationError
        return super().__getattr__(name)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `GenerationError`; adapters with `task_type="CAUSAL_LM"` require the method and do not call it in training."""
        raise GenerationError

    @classmethod
    def can_generate(cls) -> bool:
        """`False`; a pipeline that generates calls this first, and is refused here in one sentence."""
        if getattr(sys._getframe(1).f_locals.get("self"), "_pipeline_calls_generate", False):
            raise GenerationError
        return False
