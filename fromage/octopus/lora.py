"""Adapters of low rank (LoRA, Hu et al., ICLR 2022) in the layers of a frozen language model, by peft."""

from __future__ import annotations

from torch import nn

from fromage.errors import UserError
from fromage.models.language_model import LanguageModel


def add_low_rank(lm: LanguageModel, rank: int) -> None:
    """Give each linear layer of the transformer's layers an adapter in float32 that is trained; all else stays frozen.

    Raises UserError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("model.low_rank needs peft: pip install 'fromage[lora]'") from error
    blocks = {id(module) for block in lm.blocks for module in block.modules()}
    linear = [name for name, module in lm.hf.named_modules() if id(module) in blocks and isinstance(module, nn.Linear)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear), lm.hf)
    for parameter in lm.hf.parameters():
        if parameter.requires_grad:  # peft gives it the layer's type; in bfloat16, small updates would be rounded away
            parameter.data = parameter.data.float()
    lm.eval()
