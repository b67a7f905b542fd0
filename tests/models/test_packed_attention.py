"""Attention of packed sequences: products of our own against PyTorch's kernel."""

import pytest
import torch
from torch.testing import assert_close

from fromage.models import packed_attention
from fromage.models.packed_attention import AttentionParams

S, T = 3, 7


def masks():
    """Causal, keys of each sequence alone, and rows of one sequence."""
    ends = torch.tensor([3, 7, 5]).view(S, 1, 1, 1)
    return {"causal": None, "padded": torch.arange(T) < ends, "rows": torch.rand(T, T) < 0.5, "window": band(2)}


def band(width):
    back = torch.arange(T)[:, None] - torch.arange(T)
    return (back >= 0) & (back < width)


@pytest.mark.parametrize("name", list(masks()))
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_products_of_our_own_give_what_the_kernel_gives(name, heads, scale, monkeypatch):
    torch.manual_seed(0)
    mask = masks()[name]
    if name == "rows":
        mask[:, 0] = True  # a token sees something
    given = [torch.randn(S, h, T, 8, requires_grad=True) for h in (heads[0], heads[1], heads[1])]
    slope, found = torch.randn(S, heads[0], T, 8), []
    for ours in (False, True):
        monkeypatch.setattr(packed_attention, "slow_kernel", lambda q, ours=ours: ours)
        out = AttentionParams(scale, None, None).attention(*given, mask)
        found.append((out, *torch.autograd.grad(out, given, slope)))
    for kernel, own in zip(*found, strict=True):
        assert_close(own, kernel, atol=1e-5, rtol=1e-5)


def test_the_kernel_is_left_for_half_precision_on_a_cpu():
    for dtype, ours in ((torch.float32, False), (torch.float64, False), (torch.bfloat16, True), (torch.float16, True)):
        assert packed_attention.slow_kernel(torch.zeros(1, dtype=dtype)) == ours
    assert not packed_attention.slow_kernel(torch.zeros(1, dtype=torch.bfloat16, device="meta"))


def test_bfloat16_is_as_near_to_float32_as_the_kernel_is(monkeypatch):
    torch.manual_seed(0)
    given = [torch.randn(8, h, 30, 64) for h in (6, 2, 2)]
    exact, low = AttentionParams(None, None, None).attention(*given, None), [x.bfloat16() for x in given]
    own = AttentionParams(None, None, None).attention(*low, None)
    monkeypatch.setattr(packed_attention, "slow_kernel", lambda q: False)
    kernel = AttentionParams(None, None, None).attention(*low, None)
    error = lambda found: (found - exact).square().mean().sqrt()  # noqa: E731
    assert error(own) <= 1.2 * error(kernel)
