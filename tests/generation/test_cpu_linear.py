"""The fast linear layer against the plain one."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fromage.generation import cpu_linear
from fromage.generation.cpu_linear import FewRowLinears, sliced_linear


@pytest.fixture
def sliced(monkeypatch):
    """The shapes of the inputs that went to sliced_linear."""
    seen = []

    def spy(x, *rest):
        seen.append(tuple(x.shape))
        return sliced_linear(x, *rest)

    monkeypatch.setattr(cpu_linear, "sliced_linear", spy)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (24,), (4, 1, 24), (2, 2, 24), (5, 1, 24), (0, 24)])
@pytest.mark.parametrize("out", [40, 41])
def test_it_gives_what_a_linear_layer_gives(shape, bias, out, sliced):
    layer = nn.Linear(24, out, bias=bias)
    x = torch.randn(shape)
    columns = x.T.contiguous().T if x.ndim == 2 else x
    with torch.no_grad():
        for module, value in [(layer, x), (layer, columns), (layer.double(), x.double())]:
            plain = module.to(value.dtype)(value)
            with FewRowLinears():
                torch.testing.assert_close(module(value), plain, atol=1e-5, rtol=1e-5)
    assert len(sliced) == 3


def test_gradients_are_a_linear_layers():
    weight, x = torch.randn(16, 8), torch.randn(1, 8, requires_grad=True)
    with FewRowLinears():
        F.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0, keepdim=True))


@torch.no_grad()
def test_a_model_is_not_changed_and_other_threads_are_not_affected(sliced):
    tower, x = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))), torch.randn(1, 8)
    before = [(type(layer), dict(vars(layer))) for layer in tower.modules()]
    with FewRowLinears():
        other = threading.Thread(target=tower, args=(x,))
        other.start()
        other.join()
        assert sliced == []
        tower(x)
    tower(x)
    assert sliced == [(1, 8)] * 2
    assert [type(layer) for layer in tower.modules()] == [kind for kind, _ in before]
    assert [vars(layer).keys() for layer in tower.modules()] == [held.keys() for _, held in before]
