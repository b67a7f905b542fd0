import shutil

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from fromage.data.tokenizer import PromptTokenizer
from fromage.errors import UserError
from fromage.models.frozen import TOY
from fromage.models.language_model import LanguageModel, load_lm
from fromage.models.vision.open_clip import OpenClipTower, load_clip
from fromage.models.vision.registry import load_vision


@pytest.fixture(scope="module")
def tokenizer():
    return PromptTokenizer(str(TOY / "opt"))


def tiny(kind, tokenizer):
    torch.manual_seed(0)
    rows = tokenizer.vocab_size + 7  # as OPT has rows beyond its tokenizer
    if kind == "opt":
        config = OPTConfig(vocab_size=rows, hidden_size=24, word_embed_proj_dim=24, ffn_dim=48, num_hidden_layers=2,
                           num_attention_heads=2, max_position_embeddings=64, dropout=0.1)  # fmt: skip
        return LanguageModel(OPTForCausalLM(config), tokenizer, "opt")
    config = LlamaConfig(vocab_size=rows, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config), tokenizer, "llama")


def hf_clip_from(visual, config):
    """Hugging Face's CLIP vision tower with the weights of an open_clip one."""
    theirs = CLIPVisionModel(config).eval()
    state, ours = theirs.state_dict(), visual.state_dict()
    names = {name.split("vision_model.")[-1]: name for name in state}

    def put(name, value):
        target = state[names[name]]
        assert target.shape == value.shape, name
        target.copy_(value)

    put("embeddings.class_embedding", ours["class_embedding"])
    put("embeddings.position_embedding.weight", ours["positional_embedding"])
    put("embeddings.patch_embedding.weight", ours["conv1.weight"])
    for part in ("weight", "bias"):
        put(f"pre_layrnorm.{part}", ours[f"ln_pre.{part}"])
        put(f"post_layernorm.{part}", ours[f"ln_post.{part}"])
    for i in range(config.num_hidden_layers):
        ours_i, theirs_i = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for part in ("weight", "bias"):
            for name, value in zip("qkv", ours[f"{ours_i}.attn.in_proj_{part}"].chunk(3), strict=True):
                put(f"{theirs_i}.self_attn.{name}_proj.{part}", value)
            put(f"{theirs_i}.self_attn.out_proj.{part}", ours[f"{ours_i}.attn.out_proj.{part}"])
            put(f"{theirs_i}.layer_norm1.{part}", ours[f"{ours_i}.ln_1.{part}"])
            put(f"{theirs_i}.layer_norm2.{part}", ours[f"{ours_i}.ln_2.{part}"])
            put(f"{theirs_i}.mlp.fc1.{part}", ours[f"{ours_i}.mlp.c_fc.{part}"])
            put(f"{theirs_i}.mlp.fc2.{part}", ours[f"{ours_i}.mlp.c_proj.{part}"])
    theirs.load_state_dict(state)
    return theirs


def test_vit_l_14_features_are_hugging_faces_pooler_output():
    torch.manual_seed(0)
    published = open_clip.get_model_config("ViT-L-14-quickgelu")
    vision = {**published["vision_cfg"], "layers": 2}  # all widths as published, 2 of 24 layers
    text = {**published["text_cfg"], "layers": 1, "vocab_size": 100}
    clip = open_clip.CLIP(published["embed_dim"], vision, text, quick_gelu=True)
    config = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16,
                              image_size=224, patch_size=14, hidden_act="quick_gelu")  # fmt: skip
    theirs = hf_clip_from(clip.visual, config)
    tower = OpenClipTower(clip, None, "ViT-L-14")
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert tower.width == 1024
        torch.testing.assert_close(tower(pixels), theirs(pixels).pooler_output, atol=1e-4, rtol=1e-4)


def test_a_file_of_weights_does_not_say_its_activation(tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda name, **options: (torch.nn.Identity(), None, None))
    (tmp_path / "clip.pt").touch()
    with pytest.warns(UserWarning, match="name ViT-B-32-quickgelu"):
        load_clip("ViT-B-32", str(tmp_path / "clip.pt"))


def test_openai_weights_bring_quick_gelu(monkeypatch):
    """open_clip itself builds GELU for ViT-B-32 and the tag openai, and only warns."""
    built = {}

    def create(name, pretrained=None, force_quick_gelu=False, **options):
        built[pretrained] = open_clip.create_model(name, force_quick_gelu=force_quick_gelu)
        return built[pretrained], None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for weights in ("openai", "laion2b_s34b_b79k"):
        load_clip("ViT-B-32", weights)
    kinds = {tag: type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__ for tag, clip in built.items()}
    assert kinds == {"openai": "QuickGELU", "laion2b_s34b_b79k": "GELU"}


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_towers_stay_frozen_and_in_eval_mode(kind, tokenizer):
    lm = tiny(kind, tokenizer)
    lm.train()
    assert not any(m.training for m in lm.modules()) and not any(p.requires_grad for p in lm.parameters())
    tower = load_vision("toy")
    tower.train()
    assert not any(m.training for m in tower.modules()) and not any(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_added_row_extends_embedding_and_head(kind, tokenizer):
    lm = tiny(kind, tokenizer)
    ids = torch.tensor([[2, 9, 11, tokenizer.ret_id]])
    embeds = lm.embed(ids)
    assert torch.equal(embeds[0, 3], lm.added.input[0])
    frozen = lm.hf.get_input_embeddings().frozen
    assert torch.equal(embeds[0, :3], frozen(ids[0, :3]))
    hidden = lm(embeds, torch.ones_like(ids, dtype=torch.bool))
    logits = lm.logits(hidden)
    assert logits.shape[-1] == tokenizer.ret_id + 1
    torch.testing.assert_close(logits[..., tokenizer.ret_id], hidden @ lm.added.output[0])
    assert torch.isinf(logits[..., tokenizer.image_id]).all()
    head = lm.hf.get_output_embeddings().frozen
    torch.testing.assert_close(logits[..., : tokenizer.vocab_size], head(hidden)[..., : tokenizer.vocab_size])
    assert (lm.added.input.data_ptr() == lm.added.output.data_ptr()) == (kind == "opt")


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_padding_anywhere_changes_nothing(kind, tokenizer):
    lm = tiny(kind, tokenizer)
    ids = torch.tensor([[2, 9, 11, 30]])
    alone = lm(lm.embed(ids), torch.ones_like(ids, dtype=torch.bool))
    for left, right in ((0, 3), (3, 0), (2, 1)):
        padded = torch.nn.functional.pad(ids, (left, right), value=1)
        mask = torch.nn.functional.pad(torch.ones_like(ids, dtype=torch.bool), (left, right), value=False)
        torch.testing.assert_close(lm(lm.embed(padded), mask)[:, left : left + 4], alone, atol=1e-5, rtol=1e-4)


def test_rescaling_brings_ret_to_the_mean_norm(tokenizer):
    lm = tiny("opt", tokenizer)
    mean = lm.hf.get_input_embeddings().frozen.weight[: tokenizer.vocab_size].norm(dim=1).mean()
    with torch.no_grad():
        lm.added.input.mul_(5)
    lm.added.rescale_()
    torch.testing.assert_close(lm.added.input.norm(), mean)


def test_the_toy_pair_loads_by_the_general_code_in_the_asked_dtype():
    lm, vision = load_lm("toy", "bfloat16"), load_vision("toy", dtype="bfloat16")
    assert lm.dtype == torch.bfloat16 and vision.dtype == torch.bfloat16
    assert {p.dtype for p in vision.parameters()} == {torch.bfloat16}


def test_fingerprint_depends_on_the_weights():
    one, other = load_vision("toy"), load_vision("toy")
    assert one.fingerprint() == other.fingerprint()
    with torch.no_grad():
        next(other.visual.parameters()).add_(1)
    assert one.fingerprint() != other.fingerprint()
    assert "0x" not in one.fingerprint()["preprocessing"]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: load_clip("ViT-Q-99"), "ViT-Q-99"),
        (lambda: load_clip("ViT-L-14", "nobody"), "nobody"),
        (lambda: load_clip("ViT-L-14"), "ViT-L-14: comes without weights.*openai"),
        (lambda: load_vision("ViT-S-32"), "ViT-S-32: comes without weights"),
        (lambda: load_vision("local-dir:/no/such/folder"), "/no/such/folder"),
        (lambda: load_lm("/no/such/folder"), "/no/such/folder"),
    ],
)
def test_unknown_towers_are_named(call, named):
    with pytest.raises(UserError, match=named):
        call()


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tokenizer):
    config = OPTConfig(
        vocab_size=100, hidden_size=24, word_embed_proj_dim=24, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match="only 100 rows"):
        LanguageModel(OPTForCausalLM(config), tokenizer, "short")


def test_weights_count_where_a_name_has_none_of_its_own():
    tower = load_vision("ViT-S-32", "laion", random_weights=True)
    assert tower.name == "ViT-S-32" and tower.width == 384
    assert load_vision("toy", "openai").fingerprint() == load_vision("toy").fingerprint()


def test_of_a_model_with_a_vision_tower_the_language_model_counts(tokenizer):
    seeing = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28}
    words = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    words |= {"num_key_value_heads": 2, "vocab_size": 50272, "final_logit_softcapping": 3.0}
    config = transformers.Gemma3Config(text_config=words, vision_config=seeing | {"patch_size": 14})
    lm = LanguageModel(transformers.AutoModelForCausalLM.from_config(config), tokenizer, "gemma3")
    assert len(lm.blocks) == 2 and lm.cap == 3.0


ODD = {
    "falcon_h1": (  # multiplies the embeddings of ids, and takes embeddings that are given as they are
        transformers.FalconH1Config,
        {"num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "embedding_multiplier": 5.6},
    ),
    "modernbert-decoder": (
        transformers.ModernBertDecoderConfig,
        {"initializer_range": 0.3, "cls_token_id": 2, "sep_token_id": 2},
    ),  # a dense layer in its head
}


@pytest.mark.parametrize("family", ODD)
def test_a_family_that_is_more_than_embedding_layers_and_head_is_refused(tmp_path, family):
    kind, more = ODD[family]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    kind(**sizes, vocab_size=50272, pad_token_id=1, bos_token_id=2, eos_token_id=2, **more).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(TOY / "opt").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{family} does more with words than to embed them, or has more than a linear head"):
        load_lm(str(tmp_path), random_weights=True)


def test_damaged_weights_are_told_as_such(tmp_path):
    shutil.copytree(TOY / "opt", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "fc1.weight" in name)
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="its logits are not finite: its weights are damaged"):
        load_lm(str(tmp_path))


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_weights_that_lack_parameters_are_refused_and_a_tied_head_is_none(kind, tokenizer, tmp_path):
    """Transformers fills what is missing with random numbers, and only prints that it did."""
    if kind == "opt":
        shutil.copytree(TOY / "opt", tmp_path, dirs_exist_ok=True)
    else:
        config = LlamaConfig(vocab_size=tokenizer.vocab_size + 7, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=2, tie_word_embeddings=False)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        for name in ("merges.txt", "vocab.json", "tokenizer_config.json"):
            shutil.copy(TOY / "opt" / name, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert load_lm(str(tmp_path)).added.tied == (kind == "opt") and ("lm_head.weight" in weights) == (kind == "llama")
    lost = "lm_head.weight" if kind == "llama" else next(name for name in weights if "fc1.weight" in name)
    save_file({name: value for name, value in weights.items() if name != lost}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match=f"its weights lack {lost} ") as told:
        load_lm(str(tmp_path))
    assert str(tmp_path) in str(told.value)
    assert load_lm(str(tmp_path), random_weights=True).width == (load_lm("toy").width if kind == "opt" else 24)
