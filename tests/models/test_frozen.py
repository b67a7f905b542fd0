import copy

import torch
from torch import nn

from fromage.models.frozen import hold


def test_what_is_held_is_no_part_of_the_module():
    owner, other = nn.Module(), nn.Linear(2, 2)
    owner.own = nn.Linear(2, 2)
    hold(owner, "other", other)
    assert owner.other is other and [name for name, _ in owner.named_modules()] == ["", "own"]
    assert len(list(owner.parameters())) == 2 and set(owner.state_dict()) == {"own.weight", "own.bias"}
    owner.to(torch.float64)
    assert (owner.own.weight.dtype, other.weight.dtype) == (torch.float64, torch.float32)


def test_a_copy_of_a_model_holds_its_own_rows(toy_model):
    twin = copy.deepcopy(toy_model)
    assert twin.lm.added is twin.ret and twin.lm.added is not toy_model.ret
    assert twin.lm.hf.get_input_embeddings().added is twin.ret
