"""Text from a picture, by Hugging Face's own generate with its key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fromage.model import Fromage


@torch.no_grad()
def caption_images(model: Fromage, features: Tensor, max_new_tokens: int = 32, batch_size: int = 128) -> list[str]:
    """Greedy captions of (N, m) image features: [W_c v(x)] [</s>] and on, without [RET], up to the end of the sentence.

    max_new_tokens: length of a caption at most, in tokens. A caption ends at </s> or a line break.
    """
    tokenizer, out = model.tokenizer, []
    start = [tokenizer.image_id] * model.k + tokenizer.start()
    for chunk in features.split(batch_size):
        ids = torch.tensor([start] * len(chunk), device=model.device)  # (N, k + 1)
        embeds = model.embed(ids, model.prefix(chunk))  # (N, k + 1, d)
        made = model.lm.hf.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            suppress_tokens=[tokenizer.ret_id],
            pad_token_id=tokenizer.pad_id,
            eos_token_id=tokenizer.eos_id,
        )
        out += [tokenizer.decode(row).split("\n")[0].strip() for row in made.tolist()]
    return out
