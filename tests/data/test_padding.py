"""Padding on either side, and the mask of tokens."""

import torch

from fromage.data.padding import pad, token_mask


def test_either_side_is_padded_and_masked():
    ids, mask = pad([[5], [6, 7]], 1)
    assert ids.tolist() == [[5, 1], [6, 7]] and mask.tolist() == [[True, False], [True, True]]
    ids, mask = pad([[5], [6, 7]], 1, "left")
    assert ids.tolist() == [[1, 5], [6, 7]] and mask.tolist() == [[False, True], [True, True]]
    assert token_mask([0, 2], 3, torch.device("cpu")).tolist() == [[False] * 3, [True, True, False]]
