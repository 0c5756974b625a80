"""The fused kernels against the reference: in Triton's interpreter on a CPU, and on a GPU where there is one."""

import copy
import functools
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

import blossomrec_hf
from blossomrec_hf import BlossomRecConfig
from blossomrec_hf.model import ops_triton, ops_triton_launch, ops_triton_selected, ops_triton_streams
from blossomrec_hf.model.attention_blossomrec import BlossomAttention, attend_packed, eager_attention_forward
from blossomrec_hf.model.ops_reference import REFERENCE_OPS, Selection


if ops_triton_launch.triton is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not ops_triton_launch.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"
    ),
    # Keys that a row does not see get any exponential before they are masked, and any weight times that.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in multiply"),
]

ODD = {"compress_block_size": 7, "compress_stride": 4, "selection_block_size": 16, "num_selected_blocks": 3}
ODD |= {"short_term_block_size": 5, "short_term_window": 2, "power_law_base": 3}
WIDE = {"selection_block_size": 32, "compress_block_size": 16, "num_selected_blocks": 1, "short_term_block_size": 16}

# Query heads per key/value head, head width, block size. In the interpreter, which takes seconds for each, every pair of
# two of them once.
REPEATS, WIDTHS, BLOCKS = (1, 2, 4, 8), (16, 32, 64), (16, 32, 64)
ALL_SIZES = [
    pytest.param(
        repeat, width, block, marks=[] if (i + j + k) % 3 == 0 else pytest.mark.gpu, id=f"{repeat}-{width}-{block}"
    )
    for i, repeat in enumerate(REPEATS)
    for j, width in enumerate(WIDTHS)
    for k, block in enumerate(BLOCKS)
]


class Layer:
    """An attention layer on fresh random inputs, larger than usual so that the importance is far from uniform."""

    def __init__(self, lengths, heads=4, groups=2, width=16, kind="blossom", dtype=torch.float32, **config):
        self.config = BlossomRecConfig(
            hidden_size=heads * width,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            num_hidden_layers=1,
            attention_types=kind,
            **config,
        )
        self.layer = BlossomAttention(self.config, 0).to(DEVICE)
        tokens = sum(lengths)
        q, k, v = (scale * torch.randn(1, h, tokens, width) for h, scale in ((heads, 2), (groups, 2), (groups, 1)))
        angle = 3 * torch.randn(tokens, width // 2).repeat(1, 2)
        gates = torch.rand(1, tokens, heads, 2)
        self.direction = torch.randn(1, tokens, heads, width).to(DEVICE, dtype)
        self.inputs = [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v, gates)][: 4 if kind == "blossom" else 3]
        if kind != "short_term":
            torch.nn.init.normal_(self.layer.compressor.position, std=0.25)
            self.layer.to(dtype)
            if self.config.selection_gradient != "none":
                self.inputs += self.layer.compressor.parameters()
        self.where = {
            "cu_seqlens": torch.tensor([0, *lengths], device=DEVICE).cumsum(0),
            "max_seqlen": max(lengths),
            "position_embeddings": (angle.cos()[None].to(DEVICE), angle.sin()[None].to(DEVICE)),
        }

    def outputs(self, attend):
        gates = self.inputs[3] if self.layer.attention_type == "blossom" else None
        return attend(self.layer, *self.inputs[:3], None, gates=gates, **self.where)

    def run(self, attend):
        out, selection = self.outputs(attend)
        return out, selection, torch.autograd.grad(out, self.inputs, self.direction)

    def exact(self, attend=eager_attention_forward):
        """What `run` gives in float64."""
        exact = copy.copy(self)
        exact.layer = copy.deepcopy(self.layer).double()
        given = 4 if self.layer.attention_type == "blossom" else 3
        exact.inputs = [x.detach().double().requires_grad_() for x in self.inputs[:given]]
        if len(self.inputs) > given:
            exact.inputs += exact.layer.compressor.parameters()
        exact.direction = self.direction.double()
        rotary = tuple(x.double() for x in self.where["position_embeddings"])
        exact.where = self.where | {"position_embeddings": rotary}
        return exact.run(attend)


def reference_given(selection: Selection):
    """The reference with the blocks of a `selection`, whose importance it computes itself."""

    def select(q, blocks, queries, *, num_selected_blocks, threshold, **sizes):
        everything = queries.max_length // sizes["block_size"] + 1
        every = REFERENCE_OPS.select(q, blocks, queries, num_selected_blocks=everything, threshold=-1.0, **sizes)
        # A column of its own for what stands for no block, in both.
        place = torch.where(every.importance > 0, every.block_indices, everything)
        pi = torch.zeros_like(every.importance).new_zeros(*every.importance.shape[:2], everything + 1)
        pi = pi.scatter_add(2, place, every.importance)
        chosen = selection.block_indices
        return Selection(chosen, torch.where(chosen < 0, 0.0, pi.gather(2, chosen.clamp(min=0))))

    ops = REFERENCE_OPS._replace(select=select)

    def attend(module, query, key, value, attention_mask=None, **kwargs):
        return attend_packed(ops, module, query, key, value, **kwargs)

    return attend


def triton_forward(*args, **kwargs):
    return AttentionInterface()["blossom_triton"](*args, **kwargs)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str = "") -> None:
    error = (actual.double() - expected.double()).norm()
    # Where a gradient cancels to nothing, what is left is the rounding of every element.
    rounding = 1e-6 * max(10, expected.numel() ** 0.5)
    assert error <= tolerance * expected.double().norm() + rounding, (name, error, expected.norm())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lengths": [50, 0, 1, 33]},
        {"lengths": [49, 18], "kind": "long_term"},
        {"lengths": [30, 1, 37], "kind": "short_term", "heads": 3, "groups": 1},
        {"lengths": [52], "selection_gradient": "none", "groups": 4},
        {"lengths": [66], "heads": 3, "groups": 1, **ODD},
        {"lengths": [70, 5], "heads": 2, "width": 32, **WIDE},
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs["lengths"])),
)
def test_a_layer_has_the_values_and_gradients_of_the_reference(kwargs, overflow_is_an_error):
    layer = Layer(**kwargs)
    expected, expected_selection = layer.outputs(eager_attention_forward)
    out, selection, gradients = layer.run(triton_forward)
    assert_close(out, expected, 1e-5)
    if expected_selection is not None:
        torch.testing.assert_close(selection.block_indices, expected_selection.block_indices)
        torch.testing.assert_close(selection.importance, expected_selection.importance, rtol=1e-4, atol=1e-6)
    # Near π = 1 the reference in float32 loses as many digits as the kernels do.
    for i, (actual, exact) in enumerate(zip(gradients, layer.exact()[2], strict=True)):
        assert actual.dtype == torch.float32
        assert_close(actual, exact, 1e-5, f"input {i}")


@pytest.fixture
def filled_memory():
    """New memory is full of NaN and of the largest integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled_memory")
def test_kernels_read_nothing_that_was_not_written():
    layer = Layer([37, 0, 1, 18], heads=2, groups=1)
    expected, _ = layer.outputs(eager_attention_forward)
    out, _, gradients = layer.run(triton_forward)
    assert_close(out, expected, 1e-5)
    for i, gradient in enumerate(gradients):
        assert gradient.isfinite().all(), f"input {i}"
    with torch.no_grad():
        assert_close(layer.outputs(triton_forward)[0], expected, 1e-5)


@pytest.mark.parametrize(("repeat", "width", "block"), ALL_SIZES)
def test_every_size_has_the_values_and_gradients_of_the_reference(repeat, width, block):
    sizes = {"selection_block_size": block, "compress_stride": block, "compress_block_size": block + 3}
    sizes |= {"num_selected_blocks": 2, "short_term_block_size": 8}
    layer = Layer([min(2 * block, 80) + 9, 0, 1], heads=repeat, groups=1, width=width, **sizes)
    bias = layer.layer.compressor.mlp[0].bias.data  # so far from zero that rounding switches no hidden unit
    bias.copy_(torch.where(torch.rand_like(bias) < 0.5, -10.0, 10.0))
    out, selection, gradients = layer.run(triton_forward)
    expected, _, expected_gradients = layer.exact(reference_given(selection))
    assert_close(out, expected, 1e-5)
    for i, (actual, exact) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert_close(actual, exact, 1e-5 if i < 4 else 1e-4, f"input {i}")


# The interpreter has no arithmetic in bfloat16.
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("repeat", "width", "block"), [(1, 32, 16), (4, 16, 16), (8, 16, 32)])
def test_half_precision_stays_close_when_the_selection_is_given(repeat, width, block, dtype):
    sizes = {"selection_block_size": block, "selection_gradient": "none"}
    layer = Layer([2 * block + 30, 20], heads=2 * repeat, groups=2, width=width, dtype=dtype, **sizes)
    out, selection, gradients = layer.run(triton_forward)
    expected, _, expected_gradients = layer.exact(reference_given(selection))
    assert_close(out, expected, 1e-2)
    for i, (actual, exact) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert_close(actual, exact, 1e-2, f"input {i}")


@pytest.mark.parametrize(
    "distances",
    [
        {"short_term_block_size": 1, "short_term_window": 3},
        {"short_term_block_size": 24, "short_term_window": 1, "power_law_base": 3},
        {"short_term_block_size": 4, "short_term_window": 40},
        {"short_term_block_size": 2, "short_term_window": 5, "power_law_base": 2**31 - 1},
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)
def test_short_term_distances_are_those_of_the_reference(distances, overflow_is_an_error):
    layer = Layer([90, 1, 7], kind="short_term", heads=2, groups=1, **distances)
    expected, _, expected_gradients = layer.run(eager_attention_forward)
    out, _, gradients = layer.run(triton_forward)
    assert_close(out, expected, 1e-5)
    for actual, reference in zip(gradients, expected_gradients, strict=True):
        assert_close(actual, reference, 1e-5)


def test_a_block_that_many_queries_choose_is_split(monkeypatch):
    layer = Layer([70], heads=2, groups=1)
    expected, _, gradients = layer.run(triton_forward)
    monkeypatch.setattr(ops_triton_launch, "CHUNK_ROWS", 8)
    out, _, split_gradients = layer.run(triton_forward)
    assert torch.equal(out, expected)
    for actual, reference in zip(split_gradients, gradients, strict=True):
        assert_close(actual, reference, 1e-5)


def test_pairs_that_are_sorted_give_the_same(monkeypatch):
    layer = Layer([5, 60, 0, 40], heads=2, groups=2)
    expected, _, gradients = layer.run(triton_forward)
    monkeypatch.setattr(ops_triton_selected, "MAX_SCANNED_LENGTH", 0)
    out, _, sorted_gradients = layer.run(triton_forward)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(sorted_gradients, gradients))


@pytest.mark.gpu
def test_a_captured_layer_is_the_layer():
    """The backward pass of a captured layer uses a second stream."""
    layer = Layer([700, 3, 200] * 20, heads=8, groups=2, dtype=torch.bfloat16)
    expected, _, gradients = layer.run(triton_forward)
    expected = expected.detach()  # without its graph, which is of another stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _, captured_gradients = layer.run(triton_forward)
    results = []
    for _ in range(3):
        graph.replay()
        results.append([x.detach().clone() for x in (out, *captured_gradients)])
    assert all(torch.equal(a, b) for again in results[1:] for a, b in zip(again, results[0], strict=True))
    for i, (actual, reference) in enumerate(zip(results[0], (expected, *gradients), strict=True)):
        assert_close(actual, reference, 1e-2, f"{i}")


def test_wide_offsets_give_the_same(monkeypatch):
    layer = Layer([40, 9], heads=2, groups=1)
    expected, _, gradients = layer.run(triton_forward)
    wide = property(lambda self: {"INDEX": ops_triton_launch.tl.int64})
    monkeypatch.setattr(ops_triton_launch.Layout, "index", wide)
    out, _, wide_gradients = layer.run(triton_forward)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(wide_gradients, gradients))


@pytest.mark.parametrize("lengths", [[1], [0, 1, 15], [16, 1], [17]], ids=str)
def test_histories_of_hardly_any_items(lengths):
    layer = Layer(lengths, heads=2, groups=1)
    expected, _, expected_gradients = layer.run(eager_attention_forward)
    out, selection, gradients = layer.run(triton_forward)
    assert_close(out, expected, 1e-5)
    for actual, reference in zip(gradients, expected_gradients, strict=True):
        assert_close(actual, reference, 1e-5)


def test_every_element_is_written_and_twice_the_same_is_the_same(monkeypatch):
    layer = Layer([40, 1, 0, 35], heads=2, groups=1)
    out, selection, gradients = layer.run(triton_forward)

    def poisoned(empty):
        @functools.wraps(empty)
        def make(*args, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return make

    monkeypatch.setattr(ops_triton_launch.Layout, "empty", poisoned(ops_triton_launch.Layout.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    again, selection_again, gradients_again = layer.run(triton_forward)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(selection, selection_again))
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again))


def test_compiles_to_one_graph_and_checkpoints():
    layer = Layer([20, 13], heads=2, groups=1)
    expected, _, gradients = layer.run(triton_forward)
    compiled = torch.compile(triton_forward, fullgraph=True, backend="aot_eager")
    out, _, compiled_gradients = layer.run(compiled)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(compiled_gradients, gradients))

    def checkpointed(*args, **kwargs):
        return checkpoint(triton_forward, *args, use_reentrant=False, **kwargs)

    out, _, checkpointed_gradients = layer.run(checkpointed)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(checkpointed_gradients, gradients))


def test_compiles_once_for_all_lengths():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(triton_forward, fullgraph=True, backend=counter)
    module = Layer([3], heads=2, groups=1).layer
    for lengths in ([20, 13], [40, 9], [70, 3], [33, 30]):
        layer = Layer(lengths, heads=2, groups=1)
        layer.layer = module
        with torch.no_grad():
            out, _ = layer.outputs(compiled)
            assert torch.equal(out, layer.outputs(triton_forward)[0])
    assert counter.frame_count <= 2  # for the first lengths, then for any


@pytest.mark.parametrize("kwargs", [{}, {"kind": "long_term", "num_selected_blocks": 2}, ODD | {"groups": 2}], ids=str)
@pytest.mark.parametrize("blocks_read", [0, 2, 16])
@torch.no_grad()
def test_short_histories_read_all_keys_in_inference(blocks_read, kwargs, monkeypatch):
    monkeypatch.setattr(ops_triton_streams, "MAX_BLOCKS_READ", blocks_read)
    for lengths in ([random.randint(100, 150), 1, 0, 33, 16], [random.randint(1, 32), 2]):
        layer = Layer(lengths, **({"heads": 8, "groups": 2} | kwargs))
        expected, expected_selection = layer.outputs(eager_attention_forward)
        out, selection = layer.outputs(triton_forward)
        assert_close(out, expected, 1e-5)
        torch.testing.assert_close(selection.block_indices, expected_selection.block_indices)


def test_without_gradients_nothing_is_saved_and_the_output_is_the_same():
    layer = Layer([21], heads=2, groups=1)
    expected, _ = layer.outputs(triton_forward)
    with torch.no_grad():
        out, _ = layer.outputs(triton_forward)
    assert torch.equal(out, expected)
    assert not out.requires_grad


def test_operations_carry_the_version_of_the_package():
    assert ops_triton.VERSION == blossomrec_hf.__version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cuda", torch.float32, 12), "head width 12"),
        (("cuda", torch.float64, 16), "float64"),
        (("cuda", torch.bfloat16, 16, {"block_size": 8}), "selection_block_size 8"),
        (("cuda", torch.bfloat16, 16, {"num_selected_blocks": 17}), "num_selected_blocks 17"),
        (("cuda", torch.bfloat16, 16, {"short_block_size": 65}), "short_term_block_size 65"),
        (("cuda", torch.bfloat16, 128, {"short_block_size": 64, "heads_per_group": 8}), "8 heads of width 128"),
    ],
)
def test_what_is_not_supported_is_refused_with_a_sentence(arguments, words):
    *arguments, sizes = arguments if len(arguments) == 4 else (*arguments, {})
    reason = ops_triton_launch.why_unsupported(*arguments, **sizes)
    assert words in reason
    assert "blossom_torch" in reason


def test_no_gpu_is_refused_with_a_sentence_and_blossom_falls_back(monkeypatch):
    monkeypatch.setattr(ops_triton_launch, "INTERPRETED", False)
    assert "CUDA" in ops_triton_launch.why_unsupported("cpu", torch.float32, 16)
    layer = Layer([20], heads=2, groups=1, width=6)
    with pytest.raises(ValueError, match="blossom_torch"):
        layer.outputs(triton_forward)
    expected, _ = layer.outputs(eager_attention_forward)
    out, _ = layer.outputs(AttentionInterface()["blossom"])
    assert_close(out, expected, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[4096], [200] * 40, [1, 1000, 0, 3, 2500]], ids=lambda x: f"{len(x)}")
@pytest.mark.parametrize("config", [{}, {"width": 64, "groups": 4, **WIDE}, {"width": 32, **ODD}], ids=str)
def test_real_sizes_on_a_gpu(lengths, config):
    layer = Layer(lengths, **config)
    expected, expected_selection, expected_gradients = layer.run(AttentionInterface()["blossom_torch"])
    out, selection, gradients = layer.run(triton_forward)
    again, _, gradients_again = layer.run(triton_forward)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again))
    # A near-tie that rounding decides differently changes the output of its query alone.
    same = (selection.block_indices == expected_selection.block_indices).all(-1).float().mean()
    assert same > 0.9999
    if same == 1:
        assert_close(out, expected, 1e-5)
        for i, (actual, reference) in enumerate(zip(gradients, expected_gradients, strict=True)):
            # A hidden unit of the compressor that rounding takes to the other side of zero is an error of its own.
            assert_close(actual, reference, 1e-4 if i < 4 else 1e-2, f"input {i}")
