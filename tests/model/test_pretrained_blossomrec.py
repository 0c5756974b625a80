"""Saving and loading, item vectors, growing vocabularies, generation and adapters."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import small_tokenizer
from model_cases import config, histories, padded, recommender
from transformers import AutoModel, AutoModelForCausalLM, pipeline

import blossomrec_hf
from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecModel
from blossomrec_hf.model.features_blossomrec import ItemFeatures


@pytest.mark.parametrize("tied", [True, False])
def test_item_vectors_are_those_of_the_output_side(tied):
    model = recommender(tie_word_embeddings=tied)
    x, ids = torch.randint(2, 60, (2, 9)), [5, 59, 0, 5]
    vectors = model.item_vectors()
    hidden_states = model.model(x).last_hidden_state
    assert torch.equal(vectors, model.model.item_embedding.weight) == tied
    torch.testing.assert_close(hidden_states @ vectors.T, model(x).logits)
    for chosen in (ids, torch.tensor(ids), torch.tensor(ids, dtype=torch.int32)):
        assert torch.equal(model.item_vectors(chosen), vectors[ids])
    assert model.item_vectors([]).shape == (0, 16)
    model.item_vectors([5]).sum().backward()
    assert model.lm_head.weight.grad[5].all() and not model.lm_head.weight.grad[6].any()


@pytest.mark.parametrize("ids", [[60], [-1], 5, [[5, 6]], [0.5], ["5"]])
def test_item_vectors_of_no_vocabulary_ids_are_refused(ids):
    with pytest.raises(ValueError, match="`ids`"):
        recommender().item_vectors(ids)


def test_item_weights_have_one_reader():
    """`item_vectors`; only the placement of new items, which writes rows of both tables, has the weights themselves."""
    tables, owners = {"lm_head", "item_embedding"}, {"get_input_embeddings", "get_output_embeddings"}
    package, found = Path(blossomrec_hf.__file__).parent, set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Attribute) or node.attr != "weight":
                continue
            owner = node.value
            if isinstance(owner, ast.Call) and getattr(owner.func, "attr", None) in owners:
                found.add(path.name)
            elif getattr(owner, "attr", None) in tables:
                found.add(path.name)
    assert found == {"new_items.py"}


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, tied):
    model = recommender(tie_word_embeddings=tied).float()
    model.item_counts.random_(100)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    x = torch.randint(2, 60, (2, 30))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is BlossomRecForSequentialRecommendation
    assert (loaded.lm_head.weight is loaded.model.item_embedding.weight) == tied
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert torch.equal(loaded.item_counts, model.item_counts)
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base) is BlossomRecModel and not info["missing_keys"]
    assert torch.equal(base(x).last_hidden_state, model.model(x).last_hidden_state)


def test_what_is_frozen_stays_frozen_after_loading(tmp_path):
    """The training loop expects a gradient of every trainable parameter; tables of features and such a compressor get none."""
    features = ItemFeatures.from_columns({"plot": torch.randn(58, 3).numpy()})
    model = recommender(item_features=features.config(), selection_gradient="none", attention_types="blossom").float()
    model.set_item_features(features)
    model.save_pretrained(tmp_path)
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert "model.item_features.columns.0.table" in frozen and any("compressor" in name for name in frozen)
    for options in ({}, {"dtype": torch.bfloat16}):
        loaded = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path, **options)
        assert {name for name, weight in loaded.named_parameters() if not weight.requires_grad} == frozen
    base = AutoModel.from_pretrained(tmp_path)
    assert {f"model.{name}" for name, weight in base.named_parameters() if not weight.requires_grad} == frozen


def test_the_code_travels_with_the_checkpoint(tmp_path):
    recommender().save_pretrained(tmp_path)
    auto_map = BlossomRecConfig.from_pretrained(tmp_path).auto_map
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"}
    flat = {path.name for path in Path(blossomrec_hf.__file__).parent.glob("model/[a-z]*.py")}
    assert flat <= {path.name for path in tmp_path.glob("*.py")}


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flex_attention", "flash"])
def test_attention_of_other_models_is_refused_with_the_names_of_its_own(name, tmp_path):
    """Without the messages of `transformers`, which ask for an issue there."""
    model = recommender()
    model.save_pretrained(tmp_path)
    said = f"`attn_implementation` is '{name}', which BlossomRec does not have; give 'blossom' .the default., 'blossom_torch'"
    for call in (
        lambda: model.set_attn_implementation(name),
        lambda: type(model).from_pretrained(tmp_path, attn_implementation=name),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert model.config._attn_implementation == "blossom"


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["blossomrec_hf"] = None  # importing it fails, as where it is not installed
import torch
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    assert model.config._attn_implementation == "blossom"
    ids = torch.load(folder + "/ids.pt")
    torch.save((model(ids).logits, model.recommend(ids).item_ids), folder + "/out.pt")
    # `Trainer` smooths over the next items, too.
    arguments = TrainingArguments(folder + "/run", label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    inputs = {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}
    torch.save(Trainer(model, arguments).compute_loss(model, inputs).detach(), folder + "/smoothed.pt")
"""


def test_checkpoints_work_where_the_package_is_not_installed(tmp_path):
    features = ItemFeatures.from_columns({"genre": ["a", "b"] * 29})
    described = recommender(item_features=features.config(), scoring="cosine").float()
    described.set_item_features(features)
    models = {tmp_path / "plain": recommender().float(), tmp_path / "described": described}
    ids = padded(histories(40, 7), "right")[0]
    for folder, model in models.items():
        model.save_pretrained(folder)
        torch.save(ids, folder / "ids.pt")
    subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *map(str, models)],
        check=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    for folder, model in models.items():
        smoothed = torch.load(folder / "smoothed.pt")
        targets = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
        predicted = model(ids).logits[:, :-1].transpose(1, 2)
        expected = torch.nn.functional.cross_entropy(predicted, targets, label_smoothing=0.1)
        torch.testing.assert_close(smoothed, expected)
        logits, item_ids = torch.load(folder / "out.pt")
        torch.testing.assert_close(logits, model(ids).logits)
        assert torch.equal(item_ids, model.recommend(ids).item_ids)


def test_an_empty_checkpoint_folder_is_reported(tmp_path):
    with pytest.raises(OSError, match="safetensors"):
        BlossomRecForSequentialRecommendation.from_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        BlossomRecForSequentialRecommendation.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_new_items_leave_old_ones_alone(tied):
    model = recommender(tie_word_embeddings=tied)
    model.item_counts.random_(100)
    x = torch.randint(2, 60, (2, 30))
    before, counts, rows = model(x).logits, model.item_counts.clone(), model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    torch.testing.assert_close(model(x).logits[..., :60], before)
    torch.testing.assert_close(model.lm_head.weight[60:], rows[2:].mean(0).expand(10, -1))
    assert torch.equal(model.item_counts[:60], counts) and not model.item_counts[60:].any()
    model(torch.tensor([[69, 65]]))


def test_generating_is_refused_in_a_sentence():
    model = recommender()
    assert not hasattr(model, "generate") and not model.can_generate()
    with pytest.raises(ValueError, match="does not generate.*recommend"):
        model.generate(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="does not generate.*recommend"):
        pipeline("text-generation", model=model, tokenizer=small_tokenizer())


def test_lora_for_causal_language_models():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(recommender(), lora)
    x = torch.randint(2, 60, (2, 9))
    model(input_ids=x, labels=x).loss.backward()
    assert all(weight.grad.any() for name, weight in model.named_parameters() if "lora_B" in name)
    assert model.eval().recommend(x, top_k=3).item_ids.shape == (2, 3)
    with pytest.raises(ValueError, match="does not generate.*recommend"):
        model.generate(input_ids=x)
