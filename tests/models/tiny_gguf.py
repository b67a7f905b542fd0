"""A tiny LLaMA, and the same in a GGUF file as llama.cpp's converter writes it."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "he", "Ġt", "Ġthe", "ab"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "Ġ t", "Ġt he", "a b"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.3,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rounded(lm):
    """The same with matrices of 8 bits, and all in 16 bits, as they are unpacked."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0
    for value in {*lm.state_dict(keep_vars=True).values()}:
        if value.ndim == 2:
            value.data = torch.from_numpy(quants.dequantize(quants.quantize(value.detach().numpy(), kind), kind))
        value.data = value.data.half().float()
    return lm


def write_gguf(lm, path, architecture="llama", without=()):
    """Norms in float32, matrices of 8 bits; rows of queries and keys in llama.cpp's order. without: tensors left out."""
    import gguf

    writer, c = gguf.GGUFWriter(path, architecture), lm.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(SPECIAL + WORDS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(WORDS))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate"}
    names |= {"up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm"}
    names |= {"post_attention_layernorm": "ffn_norm"}
    for name, value in lm.state_dict().items():
        rows = value.numpy()
        if ".layers." in name:
            _, _, layer, *part = name.split(".")
            called = f"blk.{layer}.{names[part[-2]]}.weight"
            heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(part[-2])
            if heads:
                rows = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        else:
            called = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if called is None or called in without:  # None: the tied head
            continue
        if rows.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(called, gguf.quants.quantize(np.ascontiguousarray(rows), kind), raw_dtype=kind)
        else:
            writer.add_tensor(called, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
