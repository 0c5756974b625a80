"""
The tests that `transformers` has for its own models, on tiny BlossomRec models.

They are in the source distribution of `transformers`, not in what pip installs, and are not copied here:

    pip download transformers==<installed version> --no-deps --no-binary transformers
    tar xzf transformers-*.tar.gz
    BLOSSOMREC_TRANSFORMERS_SDIST=transformers-<installed version> pytest tests/test_transformers_mixins.py
"""

import importlib
import os
import sys
import types
from pathlib import Path
from unittest import TestCase

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecModel


SDIST = os.environ.get("BLOSSOMREC_TRANSFORMERS_SDIST")
if not SDIST:
    pytest.skip("BLOSSOMREC_TRANSFORMERS_SDIST names no unpacked source distribution", allow_module_level=True)


def load(module: str, name: str) -> type:
    """A class of the source distribution's `tests` folder, imported as a package `transformers_tests`."""
    package = sys.modules.setdefault("transformers_tests", types.ModuleType("transformers_tests"))
    package.__path__ = [str(Path(SDIST).resolve() / "tests")]
    # `test_modeling_common` imports these two, of folders that the source distribution leaves out.
    for absent in ("exporters.test_export.ExportTesterMixin", "generation.test_utils.GenerationTesterMixin"):
        folder, file, mixin = absent.split(".")
        stub = types.ModuleType(f"transformers_tests.{folder}.{file}")
        setattr(stub, mixin, type(mixin, (), {}))
        sys.modules.setdefault(f"transformers_tests.{folder}", types.ModuleType(f"transformers_tests.{folder}"))
        sys.modules.setdefault(stub.__name__, stub)
    return getattr(importlib.import_module(f"transformers_tests.{module}"), name)


ModelTesterMixin = load("test_modeling_common", "ModelTesterMixin")
TrainingTesterMixin = load("test_training_mixin", "TrainingTesterMixin")
# The mixins skip or treat as headless what is in the tables of the models that `transformers` has itself.
MODEL_MAPPING_NAMES["blossomrec"] = "BlossomRecModel"


class TinyModel:
    """What the mixins ask of a model's tests: a tiny configuration, inputs, and the sizes of both."""

    batch_size, seq_length = 3, 15
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True
    base_model_class = BlossomRecModel
    causal_lm_class = BlossomRecForSequentialRecommendation

    def __init__(self, attention_types: str | list[str]) -> None:
        self.attention_types = attention_types

    def get_config(self) -> BlossomRecConfig:
        return BlossomRecConfig(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            intermediate_size=37,
            hidden_dropout_prob=0.0,
            attention_types=self.attention_types,
            compress_block_size=4,
            compress_stride=2,
            selection_block_size=4,
            num_selected_blocks=2,
            short_term_block_size=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[BlossomRecConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(2, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class Mixins(ModelTesterMixin, TrainingTesterMixin):
    all_model_classes = (BlossomRecModel, BlossomRecForSequentialRecommendation)
    attention_types: str | list[str]
    model_tester = None

    def setUp(self) -> None:
        self.model_tester = TinyModel(self.attention_types)
        torch.manual_seed(0)  # some tests compare means of random weights with a tolerance

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "labels" in inputs:
            inputs["labels"] = inputs["input_ids"]  # in place of zeros, which are [PAD]: no targets
        return inputs

    # What differs on purpose

    def test_model_outputs_equivalence(self) -> None:
        """Attention probabilities are those of `attn_implementation="eager"`: the other paths never have them all."""
        with pytest.raises(ValueError, match="`output_attentions=True` works with"):
            super().test_model_outputs_equivalence()
        self.has_attentions = False
        super().test_model_outputs_equivalence()

    def test_retain_grad_hidden_states_attentions(self) -> None:
        """Attention probabilities are computed next to the output, to be looked at; hidden states are a part of it."""
        self.has_attentions = False
        super().test_retain_grad_hidden_states_attentions()

    def test_model_weights_reload_no_missing_tied_weights(self) -> None:
        """The test overwrites the weights of a checkpoint; the manifest of a checkpoint refuses that."""
        with pytest.raises(ValueError, match="is not the file that was saved"):
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_resize_tokens_embeddings(self) -> None:
        """At its end the test makes [PAD] the last of four ids; in a catalog it is the first."""
        with pytest.raises(ValueError, match="`pad_token_id` and `unk_token_id` are 3 and 1"):
            super().test_resize_tokens_embeddings()

    def test_model_rope_scaling_from_config_1_dynamic(self) -> None:
        """The frequencies of "dynamic" depend on the longest history of a batch: a history would not have one output."""
        with pytest.raises(ValueError, match="'rope_type'.*'dynamic'"):
            super().test_model_rope_scaling_from_config_1_dynamic()


class TestFull(Mixins, TestCase):
    attention_types = "full"


class TestBlossom(Mixins, TestCase):
    attention_types = "blossom"


class TestMixed(Mixins, TestCase):
    attention_types = ["blossom", "full"]
