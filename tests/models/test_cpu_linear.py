"""Faster linear layers against the plain one."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from fromage.models import cpu_linear
from fromage.models.cpu_linear import (
    FEW_HALVES,
    FEW_ROWS,
    MANY_PRODUCTS,
    MANY_ROWS,
    cpu_linears,
    halves_of,
    with_cpu_linears,
)
from fromage.processor import reads_weights_slowly

PLAIN = F.linear


@pytest.fixture(autouse=True)
def ways(monkeypatch):
    """Which ways were taken, and how many rows went there; oneDNN is one wherever PyTorch has it."""
    monkeypatch.setattr(cpu_linear, "reads_weights_slowly", lambda rows, weight: True)
    monkeypatch.setattr(cpu_linear, "mkl_is_slow", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    seen = []

    def spy(way, call):
        def told(x, *rest):
            seen.append((way, x.numel() // x.shape[-1]))
            return call(x, *rest)

        return told

    monkeypatch.setattr(cpu_linear, "_sliced", spy("slices", cpu_linear._sliced))
    monkeypatch.setattr(cpu_linear, "_product", spy("onednn", cpu_linear._product))
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (24,), (4, 1, 24), (2, 2, 24), (5, 1, 24), (0, 24)])
@pytest.mark.parametrize("out", [40, 41])
def test_few_rows_give_what_a_linear_layer_gives(shape, bias, out, ways):
    layer = nn.Linear(24, out, bias=bias)
    x = torch.randn(shape)
    columns = x.T.contiguous().T if x.ndim == 2 else x
    with torch.no_grad():
        for module, value in [(layer, x), (layer, columns), (layer.double(), x.double())]:
            plain = module.to(value.dtype)(value)
            assert_close(with_cpu_linears(module)(value), plain, atol=1e-5, rtol=1e-5)
    rows = x.numel() // 24
    assert ways == ([("slices", rows)] * 2 if 0 < rows <= FEW_ROWS and out % 8 == 0 else [])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(MANY_ROWS, 128), (3, 40, 128)])
def test_many_rows_give_values_and_gradients_of_a_linear_layer(shape, bias, ways):
    N = MANY_PRODUCTS // (MANY_ROWS * 128)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(N, 128, requires_grad=True)
    given = (x, weight, torch.randn(N, requires_grad=True)) if bias else (x, weight)
    slope = torch.randn(*shape[:-1], N)
    wanted = PLAIN(*given)
    gradients = torch.autograd.grad(wanted, given, slope)
    with cpu_linears():
        found = F.linear(*given)
    assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, given, slope), gradients, strict=True):
        assert_close(ours, theirs, atol=1e-3, rtol=1e-5)
    assert {way for way, _ in ways} == {"onednn"} and len(ways) == 3


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded", "sliced"])
def test_layouts(layout, ways):
    x = {
        "rows": torch.randn(64, 256),
        "columns": torch.randn(256, 64).T,
        "expanded": torch.randn(1, 256).expand(64, -1),
        "sliced": torch.randn(64, 600)[:, 100:356],
    }[layout].requires_grad_()
    weight = torch.randn(256, 128).T
    with cpu_linears():
        y = F.linear(x, weight)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert_close(y, PLAIN(x, weight), atol=1e-4, rtol=1e-5)
    assert_close(grad, weight.sum(0).expand_as(grad), atol=1e-4, rtol=1e-5)
    assert len(ways) == 2


def test_a_frozen_layer_keeps_no_input_and_has_no_gradient(ways):
    x, weight = torch.randn(64, 256, requires_grad=True), torch.randn(128, 256)
    with cpu_linears():
        y = F.linear(x, weight)
    assert [kept is None for kept in y.grad_fn.saved_tensors] == [True, False]
    y.sum().backward()
    assert weight.grad is None and len(ways) == 2


def test_a_gradient_of_few_rows_is_a_linear_layers(ways):
    weight, x = torch.randn(16, 8), torch.randn(1, 8, requires_grad=True)
    with cpu_linears():
        F.linear(x, weight).sum().backward()
    assert_close(x.grad, weight.sum(0, keepdim=True))
    assert ways == []


def test_autocast_and_other_types_are_pytorchs_own(ways):
    x, weight = torch.randn(64, 256), torch.randn(128, 256)
    with cpu_linears():
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, weight).dtype == torch.bfloat16
        assert F.linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
        assert F.linear(x.to("meta"), weight.to("meta")).shape == (64, 128)
    assert ways == []


@torch.no_grad()
def test_a_model_is_not_changed_and_other_threads_are_not_affected(ways):
    tower, x = nn.Sequential(nn.Linear(8, 2**12), nn.Sequential(nn.Linear(2**12, 2**8))), torch.randn(MANY_ROWS, 8)
    before = [(type(layer), dict(vars(layer))) for layer in tower.modules()]
    with cpu_linears():
        other = threading.Thread(target=tower, args=(x,))
        other.start()
        other.join()
        assert ways == []
        tower(x)
    tower(x)
    assert ways == [("onednn", MANY_ROWS)] * 2
    twin = with_cpu_linears(tower)
    twin(x[:1])
    tower(x[:1])
    assert ways[2:] == [("slices", 1)] * 2
    assert [(type(layer), vars(layer)) for layer in tower.modules()] == before
    assert all(mine is its for mine, its in zip(twin.parameters(), tower.parameters(), strict=True))


def test_nothing_is_called_in_between_where_no_layer_gains(monkeypatch):
    monkeypatch.setattr(cpu_linear, "mkl_is_slow", lambda: False)
    with cpu_linears():
        assert not torch.overrides._get_current_function_mode_stack()


@torch.no_grad()
def test_shared_layers_hooks_and_subclasses_stay(ways):
    class Own(nn.Linear):
        pass

    shared = nn.Linear(8, 8)
    model, x = nn.Sequential(shared, Own(8, 8), shared), torch.randn(1, 8)
    called = []
    model[0].register_forward_hook(lambda *given: called.append(len(given)))
    twin = with_cpu_linears(model)
    assert_close(twin(x), model(x))
    assert twin[0] is twin[2] and type(twin[1]) is Own and called == [3] * 4 and ways == [("slices", 1)] * 2
    twin[0].weight.zero_()
    assert not model[0].weight.any()


def test_layers_of_the_toy_model_go_there(toy_model, ways):
    embeds = torch.randn(4, 32, toy_model.lm.width)
    mask = torch.ones(4, 32, dtype=torch.bool)
    found = toy_model.lm(embeds, mask)
    assert ways and {way for way, _ in ways} == {"onednn"}
    plain = toy_model.lm.hf.base_model(inputs_embeds=embeds, attention_mask=mask.long()).last_hidden_state
    assert_close(found, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (24,), (FEW_HALVES, 24), (FEW_HALVES + 1, 24)])
def test_few_rows_by_weights_in_float16(bias, shape):
    model = nn.Sequential(nn.Linear(24, 40, bias=bias))
    halves, x = halves_of(model), torch.randn(shape)
    if not halves:
        pytest.skip("PyTorch has no such kernel for this processor")
    with torch.no_grad():
        made = with_cpu_linears(model, halves)(x)
    expected = F.linear(x, model[0].weight.half().float(), model[0].bias)
    few = x.numel() // 24 <= FEW_HALVES
    assert_close(made, expected if few else model(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(made, model(x)) is not few
    assert halves_of(model) is halves


def test_weights_in_float16_are_of_frozen_float32_layers_on_the_cpu_alone():
    assert not halves_of(nn.Sequential(nn.Linear(8, 8).bfloat16()))
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(2, 8, requires_grad=True)
    made = with_cpu_linears(model, halves_of(model))(x)
    assert torch.equal(made, F.linear(x, model[0].weight, model[0].bias)), "where a gradient is wanted, none of it"


def test_slices_are_taken_where_they_were_seen_to_help(monkeypatch):
    small, large = torch.empty(64, 64), torch.empty(2**13, 2**10)
    for capability, threads, helps in (("AVX512", 1, (True, True, True)), ("AVX2", 1, (False, False, False)),
                                       ("AVX2", 2, (False, True, True))):  # fmt: skip
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert helps == tuple(reads_weights_slowly(*asked) for asked in ((1, small), (2, small), (1, large)))
