"""LoRA adapters (Hu et al., ICLR 2022) in the layers of a frozen language model, with peft."""

from __future__ import annotations

from torch import nn

from fromage.distribution import pip_install
from fromage.errors import UserError
from fromage.models.language_model import LanguageModel


def add_lora(lm: LanguageModel, rank: int, empty: bool = False) -> None:
    """Add a trained float32 adapter to each linear layer of the transformer layers; everything else stays frozen.

    empty: adapters on the meta device, without storage. Raises UserError if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"model.lora_rank needs peft: {pip_install('lora')}") from error
    blocks = {id(module) for block in lm.blocks for module in block.modules()}
    linear = [name for name, module in lm.hf.named_modules() if id(module) in blocks and isinstance(module, nn.Linear)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear), lm.hf, low_cpu_mem_usage=empty)
    for parameter in lm.hf.parameters():
        if parameter.requires_grad:  # peft uses the layer's dtype; bfloat16 would round small updates away
            parameter.data = parameter.data.float()
    lm.eval()
