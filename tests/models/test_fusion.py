"""Fusion of the states at several [RET] tokens."""

import pytest
import torch
import torch.nn.functional as F

from fromage.models.fusion import make_fusion


def test_one_state_is_itself_but_for_the_transformer():
    row = torch.randn(3, 1, 6)
    assert torch.equal(make_fusion("mean", 6)(row), row[:, 0]) and torch.equal(make_fusion("first", 6)(row), row[:, 0])


def test_mean_and_first_of_several():
    rows = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(make_fusion("mean", 4)(rows), rows[:, 1]) and torch.equal(make_fusion("first", 4)(rows), rows[:, 0])


@pytest.mark.parametrize(("q", "heads"), [(8, 4), (6, 2), (7, 1)])
def test_the_transformer_is_one_layer_among_the_tokens_and_their_mean(q, heads):
    torch.manual_seed(0)
    fusion, rows = make_fusion("transformer", q).eval(), torch.randn(5, 3, q, requires_grad=True)  # gradient: no fast path
    layer = fusion.layer
    qkv = F.layer_norm(rows, (q,), layer.norm1.weight, layer.norm1.bias) @ layer.self_attn.in_proj_weight.T
    parts = (qkv + layer.self_attn.in_proj_bias).view(5, 3, 3, heads, q // heads).permute(2, 0, 3, 1, 4)
    seen = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    mid = rows + layer.self_attn.out_proj(seen)
    out = mid + layer.linear2(layer.linear1(layer.norm2(mid)).relu())
    torch.testing.assert_close(fusion(rows), out.mean(1))
    with torch.no_grad():
        torch.testing.assert_close(fusion(rows), out.mean(1))
    torch.testing.assert_close(fusion.train()(rows), out.mean(1))  # no dropout
