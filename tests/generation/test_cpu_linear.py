"""The quick linear layer against the plain one."""

import copy

import pytest
import torch
from torch import nn

from fromage.generation.cpu_linear import FewRows, patch_linears


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (24,), (4, 1, 24), (2, 2, 24), (5, 1, 24), (0, 24)])
@pytest.mark.parametrize("out", [40, 41])
def test_it_gives_what_a_linear_layer_gives(shape, bias, out):
    plain = nn.Linear(24, out, bias=bias)
    quick = copy.deepcopy(plain)
    patch_linears(quick)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(quick(x), plain(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(quick.double()(x.double()), plain.double()(x.double()))
        columns = x.T.contiguous().T if x.ndim == 2 else x
        torch.testing.assert_close(quick.float()(columns), plain.float()(columns), atol=1e-5, rtol=1e-5)


def test_gradients_are_a_linear_layers():
    quick = FewRows(8, 16)
    x = torch.randn(1, 8, requires_grad=True)
    quick(x).sum().backward()
    torch.testing.assert_close(x.grad, quick.weight.sum(0, keepdim=True))


def test_only_plain_layers_change():
    class Other(nn.Linear):
        pass

    tower = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Other(2, 2)), nn.Conv1d(2, 2, 1))
    weights = {name: p.data_ptr() for name, p in tower.named_parameters()}
    patch_linears(tower)
    assert [type(layer) for layer in (tower[0], tower[1][0], tower[2])] == [FewRows, Other, nn.Conv1d]
    assert {name: p.data_ptr() for name, p in tower.named_parameters()} == weights
