"""Models whose weights cannot be read (offloaded, quantized, adapted) answer as their modules' `forward` does."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from accelerate.utils import check_device_map
from small_cases import make_model
from torch.testing._internal.two_tensor import TwoTensor

from blossomrec_hf import BlossomRecCache, BlossomRecForSequentialRecommendation
from blossomrec_hf.evaluation.model_scores import last_item_scores
from blossomrec_hf.model import attention_blossomrec, modules_blossomrec, ranking_blossomrec
from blossomrec_hf.model.modules_blossomrec import dense_weight, is_plain, project, weights_fingerprint
from blossomrec_hf.model.packing_blossomrec import pack_histories
from blossomrec_hf.sharing.export import HistoryScorer


CPU = torch.device("cpu")
KINDS = ("cpu", "cpu with buffers", "disk", "device map")


def model_and_histories() -> tuple[BlossomRecForSequentialRecommendation, list[list[int]]]:
    model = make_model(attention_types=["blossom", "full"], initializer_range=0.3).eval()
    model.item_counts.random_(9)
    return model, [torch.randint(2, 62, (n,)).tolist() for n in (40, 3, 300, 0)]


def offloaded(model, kind: str, folder) -> BlossomRecForSequentialRecommendation:
    """A copy whose weights are on the meta device between calls of its modules."""
    if kind == "device map":
        model.save_pretrained(folder / "checkpoint")
        kwargs = {"device_map": {"model": "disk", "lm_head": "disk"}, "offload_folder": folder / "weights"}
        return BlossomRecForSequentialRecommendation.from_pretrained(folder / "checkpoint", **kwargs).eval()
    model = copy.deepcopy(model)
    if kind == "disk":
        disk_offload(model, folder, execution_device=CPU)
    else:
        cpu_offload(model, execution_device=CPU, offload_buffers=kind == "cpu with buffers")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_model_answers_as_in_memory(kind, tmp_path):
    model, rows = model_and_histories()
    twin = offloaded(model, kind, tmp_path)
    assert twin.lm_head.weight.is_meta and twin.model.layers[0].self_attn.compressor.position.is_meta
    for settings in ({}, {"candidate_ids": [5, 6, 7], "top_k": 2}, {"candidate_ids": [[5, 6], [7], [], [8, 9]]}):
        expected, found = model.recommend(rows, **settings), twin.recommend(rows, **settings)
        assert torch.equal(found.item_ids, expected.item_ids)
        torch.testing.assert_close(found.scores, expected.scores)
    ids = torch.tensor(rows[:1])
    offsets = {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 40]), "max_length_q": 40}
    with torch.no_grad():
        torch.testing.assert_close(twin(ids, labels=ids).loss, model(ids, labels=ids).loss)
        torch.testing.assert_close(twin(ids).logits, model(ids).logits)
        torch.testing.assert_close(last_item_scores(twin, offsets), last_item_scores(model, offsets))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_moves_between_an_offloaded_model_and_its_twin(kind, tmp_path):
    model, rows = model_and_histories()
    twin = offloaded(model, kind, tmp_path)
    assert weights_fingerprint(twin.model) == weights_fingerprint(model.model)
    ids = torch.tensor(rows[:1])
    expected = model(ids).logits[:, 25:]
    for first, second in ((model, twin), (twin, model)):
        first(ids[:, :25], use_cache=True).cache.save(tmp_path / "cache")
        cache = BlossomRecCache.load(tmp_path / "cache", second)
        torch.testing.assert_close(second(ids[:, 25:], cache=cache).logits, expected)


def quantized(model) -> BlossomRecForSequentialRecommendation:
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    return quantize(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8).eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantized_head_ranks_by_its_own_scores():
    model, rows = model_and_histories()
    twin = quantized(model)
    found = twin.recommend(rows[:1], top_k=60, exclude_seen=False)
    # Of the same state: the step of dynamic quantization depends on all positions of a product.
    with torch.no_grad():
        history = pack_histories(torch.tensor(rows[:1]), vocab_size=62)
        logits = twin.lm_head(twin.model.encode(history, last_only=True))[0]
    torch.testing.assert_close(found.scores[0], logits[found.item_ids[0]])
    assert torch.equal(found.scores[0], found.scores[0].sort(descending=True).values)
    assert not torch.equal(found.scores, model.recommend(rows[:1], top_k=60, exclude_seen=False).scores)
    assert twin.recommend(rows).item_ids[3].tolist() == model.recommend(rows).item_ids[3].tolist()
    cache = model(torch.tensor(rows[:1]), use_cache=True).cache
    with pytest.raises(ValueError, match="other weights"):
        twin(torch.tensor([[5]]), cache=cache)
    with pytest.raises(ValueError, match="`index`.*quantized"):
        twin.recommend(rows, index=SimpleNamespace(check=None))


def test_a_step_of_a_fused_optimizer_changes_the_fingerprint():
    """It changes the weights without a new version of the tensors."""
    model, _ = model_and_histories()
    before, x = weights_fingerprint(model.model), torch.randint(2, 60, (2, 9))
    model(x, labels=x).loss.backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()
    assert weights_fingerprint(model.model) != before


def test_weights_made_of_several_tensors_are_not_read():
    """As those of `torchao.quantize_`: the module stays a `Linear`, its weight is of a class of its own."""
    model, _ = model_and_histories()
    before = weights_fingerprint(model.model)
    linear = model.model.layers[0].up_proj
    linear.weight = torch.nn.Parameter(TwoTensor(linear.weight.detach(), linear.weight.detach() + 1))
    assert not is_plain(linear) and is_plain(model.model.layers[0].down_proj)
    fingerprint = weights_fingerprint(model.model)
    assert fingerprint != before and fingerprint == weights_fingerprint(model.model)
    linear.weight.b[3, 5] += 1e-4
    linear.weight = torch.nn.Parameter(TwoTensor(linear.weight.a, linear.weight.b))
    assert weights_fingerprint(model.model) != fingerprint


def test_rows_are_scored_some_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setitem(ranking_blossomrec.MAX_SCORES, "cpu", 130)
    model, rows = model_and_histories()
    twin = offloaded(model, "cpu", tmp_path)
    candidates = torch.randint(2, 62, (4, 9))
    for settings in ({}, {"exclude_ids": candidates}, {"candidate_ids": candidates, "top_k": 3}):
        expected, found = model.recommend(rows, **settings), twin.recommend(rows, **settings)
        assert torch.equal(found.item_ids, expected.item_ids)
    assert twin.recommend(torch.zeros(0, 3, dtype=torch.long)).item_ids.shape == (0, 10)


def adapted(model, *names: str) -> BlossomRecForSequentialRecommendation:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=list(names), init_lora_weights=False, r=4)
    return peft.get_peft_model(copy.deepcopy(model), config).eval().base_model.model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [("lm_head",), ("mlp.0", "mlp.2")])
def test_adapters_of_the_head_and_the_compressor_take_part(names):
    model, rows = model_and_histories()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # merging must not move the input
    twin = adapted(model, *names)
    ids = torch.tensor(rows[:1])
    merged = copy.deepcopy(twin)
    for module in merged.modules():
        if hasattr(module, "merge"):
            module.merge()
    loss, expected = twin(ids, labels=ids).loss, merged(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected)
    assert (twin(ids).logits - model(ids).logits).abs().max() > 1e-2  # the change of the loss may cancel
    loss.backward()
    adapters = [p for n, p in twin.named_parameters() if "lora" in n]
    assert adapters and all(p.grad is not None and p.grad.any() for p in adapters)
    assert torch.equal(twin.recommend(rows).item_ids, merged.recommend(rows).item_ids)


def test_what_needs_the_weights_themselves_refuses_such_models(tmp_path, monkeypatch):
    model, rows = model_and_histories()
    twin = offloaded(model, "cpu", tmp_path)
    with pytest.raises(ValueError, match="`model` is offloaded"):
        HistoryScorer(twin)
    monkeypatch.setattr(attention_blossomrec, "blossom_attention", None)
    twin.set_attn_implementation("blossom_triton")
    with pytest.raises(ValueError, match="blossom_triton.*offloaded.*use `blossom`"):
        twin(torch.tensor(rows[:1]))


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_the_kernels_of_last_positions_refuse_an_adapted_compressor(monkeypatch):
    """They read the weights themselves, without the adapter."""
    twin = adapted(make_model(attention_types="blossom", num_hidden_layers=1), "mlp.0")
    monkeypatch.setattr(attention_blossomrec, "last_attention", None)
    twin.set_attn_implementation("blossom_triton")
    with pytest.raises(ValueError, match="blossom_triton.*adapted.*use `blossom`"):
        twin(torch.randint(2, 62, (1, 40)), logits_to_keep=1)


def test_the_dense_weight_of_a_layer(tmp_path):
    model, _ = model_and_histories()
    assert is_plain(model.lm_head) and dense_weight(model.lm_head) is model.lm_head.weight
    twin = offloaded(model, "disk", tmp_path)
    assert not is_plain(twin.lm_head)
    torch.testing.assert_close(dense_weight(twin.lm_head), model.lm_head.weight)
    torch.testing.assert_close(twin.item_vectors([7, 3]), model.lm_head.weight[[7, 3]])


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
@pytest.mark.parametrize(
    "settings", [{}, {"tie_word_embeddings": False}, {"time_features": ["previous_gap"]}], ids=str
)
def test_an_automatic_device_map_has_a_device_for_every_weight(settings, share):
    model = make_model(num_hidden_layers=4, **settings)
    size = sum(x.nbytes for x in model.state_dict().values())
    memory = {0: int(share * size), 1: int(share * size), "cpu": 2**30}
    check_device_map(
        model, infer_auto_device_map(model, max_memory=memory, no_split_module_classes=["BlossomRecLayer"])
    )


def test_projections_are_one_product_on_a_gpu_unless_a_layer_has_hooks_or_an_adapter(monkeypatch):
    attention = make_model().double().model.layers[0].self_attn
    linears = [attention.q_proj, attention.gate, attention.v_proj]
    torch.nn.init.normal_(attention.gate.weight)
    x = torch.randn(3, attention.config.hidden_size, dtype=torch.float64, requires_grad=True)
    weights = [x, *(p for linear in linears for p in linear.parameters())]
    results = []
    for outputs in (project(linears, x, joined=False), modules_blossomrec._project_joined(linears, x)):
        results.append([*outputs, *torch.autograd.grad(sum((y**2).sum() for y in outputs), weights)])
    torch.testing.assert_close(*results)

    monkeypatch.setattr(modules_blossomrec, "_project_joined", lambda linears, x: "one product")
    on_gpu = SimpleNamespace(is_cuda=True)
    assert project(linears, on_gpu, joined=True) == "one product"
    seen = []
    attention.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]) or (x,))
    (out,) = project(linears[:1], on_gpu, joined=True)
    assert out.shape == (3, attention.q_proj.out_features) and seen == [on_gpu]
