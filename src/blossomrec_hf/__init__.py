"""BlossomRec (arXiv 2512.13368), block-level fused sparse attention for sequential recommendation, for `transformers`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from .model.cache_blossomrec import BlossomRecCache
from .model.configuration_blossomrec import BlossomRecConfig
from .model.features_blossomrec import ItemFeatures
from .model.modeling_blossomrec import (
    BlossomRecForSequentialRecommendation,
    BlossomRecModel,
    BlossomRecPreTrainedModel,
)
from .model.objectives_blossomrec import mean_over_targets, register_objective
from .model.pipeline_blossomrec import SequentialRecommendationPipeline
from .model.recommendation_blossomrec import RecommendationOutput
from .model.streams_blossomrec import Stream, register_stream
from .model.tokenization_blossomrec import BlossomRecTokenizer


__version__ = "0.1.0"

AutoConfig.register("blossomrec", BlossomRecConfig)
AutoModel.register(BlossomRecConfig, BlossomRecModel)
AutoModelForCausalLM.register(BlossomRecConfig, BlossomRecForSequentialRecommendation)
AutoTokenizer.register(BlossomRecConfig, fast_tokenizer_class=BlossomRecTokenizer)
PIPELINE_REGISTRY.register_pipeline(
    "sequential-recommendation", SequentialRecommendationPipeline, pt_model=AutoModelForCausalLM, type="text"
)

# So that `save_pretrained` and `push_to_hub` put the code beside the weights.
BlossomRecConfig.register_for_auto_class()
BlossomRecModel.register_for_auto_class("AutoModel")
BlossomRecForSequentialRecommendation.register_for_auto_class("AutoModelForCausalLM")
BlossomRecTokenizer.register_for_auto_class("AutoTokenizer")

__all__ = [
    "BlossomRecCache",
    "BlossomRecConfig",
    "BlossomRecForSequentialRecommendation",
    "BlossomRecModel",
    "BlossomRecPreTrainedModel",
    "BlossomRecTokenizer",
    "ItemFeatures",
    "RecommendationOutput",
    "SequentialRecommendationPipeline",
    "Stream",
    "mean_over_targets",
    "register_objective",
    "register_stream",
]
