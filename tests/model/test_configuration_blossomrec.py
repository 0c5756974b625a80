"""The configuration: what it accepts, what it says of the rest, and that it survives the disk."""

import pytest
from transformers import AutoConfig

from blossomrec_hf import BlossomRecConfig


def test_one_word_is_meant_for_all_layers():
    assert BlossomRecConfig(num_hidden_layers=3, attention_types="full").attention_types == ["full"] * 3


def test_no_key_value_heads_means_as_many_as_query_heads():
    assert BlossomRecConfig(num_attention_heads=4, num_key_value_heads=None).num_key_value_heads == 4


def test_round_trip_through_json(tmp_path):
    config = BlossomRecConfig(
        vocab_size=77,
        num_hidden_layers=3,
        attention_types=["blossom", "short_term", "full"],
        compress_block_size=12,
        compress_stride=4,
        selection_block_size=8,
        gate_initial_bias=(-1.0, 0.5),
        rope_parameters={"rope_theta": 500.0},
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    for loaded in (BlossomRecConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, BlossomRecConfig)
        changed = {"transformers_version": None, "_name_or_path": None}
        assert loaded.to_dict() | changed == config.to_dict() | changed
    assert loaded.rope_parameters["rope_theta"] == 500.0


def test_two_configurations_share_no_rope_parameters():
    given = {"rope_theta": 500.0}
    BlossomRecConfig(rope_parameters=given)
    assert given == {"rope_theta": 500.0}


@pytest.mark.parametrize(
    ("settings", "columns", "uses_now"),
    [
        ({}, (), False),
        ({"time_features": ["previous_gap"]}, ("timestamps",), False),
        ({"time_features": ["previous_gap", "hour"]}, ("timestamps",), True),
        ({"time_features": ["next_gap"], "event_types": ["view", "buy"]}, ("timestamps", "event_type_ids"), True),
        ({"event_types": ["view", "buy"]}, ("event_type_ids",), False),
    ],
)
def test_the_columns_that_a_model_reads_follow_from_its_features(settings, columns, uses_now):
    config = BlossomRecConfig(**settings)
    assert (config.event_columns, config.uses_now) == (columns, uses_now)


def test_unknown_keys_are_kept_as_in_transformers():
    assert BlossomRecConfig(trained_on="clicks").trained_on == "clicks"


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("vocab_size", {"vocab_size": 2}),
        ("hidden_size", {"hidden_size": 100, "num_attention_heads": 8}),
        ("hidden_size", {"hidden_size": 24, "num_attention_heads": 8}),  # an odd head width
        ("num_attention_heads", {"num_attention_heads": 8, "num_key_value_heads": 3}),
        ("num_hidden_layers", {"num_hidden_layers": 0}),
        ("compress_block_size", {"compress_block_size": 8, "compress_stride": 16}),
        ("selection_block_size", {"selection_block_size": 24, "compress_stride": 16}),
        ("num_selected_blocks", {"num_selected_blocks": 0}),
        ("importance_threshold", {"importance_threshold": 1.0}),
        ("selection_gradient", {"selection_gradient": "reinforce"}),
        ("short_term_block_size", {"short_term_block_size": 2.5}),
        ("short_term_window", {"short_term_window": 0}),
        ("power_law_base", {"power_law_base": 1}),
        ("gate_initial_bias", {"gate_initial_bias": [1.0]}),
        ("hidden_dropout_prob", {"hidden_dropout_prob": 1.0}),
        ("attention_types", {"attention_types": [["full"], "full"]}),
        ("attention_types", {"attention_types": ["full"], "num_hidden_layers": 2}),
        ("objective", {"objective": 5}),
        ("rope_type", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
        ("pad_token_id", {"pad_token_id": 5}),
    ],
)
def test_bad_values_are_named(argument, kwargs):
    with pytest.raises(ValueError, match=argument):
        BlossomRecConfig(**kwargs)
