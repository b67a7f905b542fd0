import json
import pickle
import shutil
from contextlib import suppress

import pytest
from transformers import AutoTokenizer, LlamaTokenizer

from fromage.data.tokenizer import PromptTokenizer, ret_tokens
from fromage.errors import UserError
from fromage.models.frozen import TOY


@pytest.fixture(scope="module")
def opt(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("opt")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "opt_tokenizer" / name, folder)
    shutil.copy(TOY / "opt" / "tokenizer_config.json", folder)  # OPT's own form
    return PromptTokenizer(str(folder))


def test_opts_own_vocabulary_gives_the_published_ids(opt):
    assert opt.vocab_size == 50265
    assert [*opt.start(), *opt.encode("Hello world")] == [2, 31414, 232]
    assert (opt.pad_id, opt.bos_id, opt.image_id, opt.ret_id) == (1, 2, 50265, 50266)
    assert opt.caption("Hello world", 24) == [2, 31414, 232, 50266]


def test_a_cut_caption_keeps_ret(opt):
    ids = opt.caption("a dog " * 50, 24)
    assert len(ids) == 24 and ids[-1] == opt.ret_id and ids[0] == opt.bos_id and opt.ret_id not in ids[:-1]


def test_several_ret_tokens_end_a_caption_and_count_within_its_length():
    words, folder = "a small red star at night.", str(TOY / "opt")
    one, four = PromptTokenizer(folder), PromptTokenizer(folder, ret_tokens(4))
    assert ret_tokens(3) == ["[RET]", "[RET2]", "[RET3]"] and one.ret_ids == [one.ret_id] == one.trained_ids
    assert four.ret_ids == [one.ret_id + i for i in range(4)] == four.trained_ids
    whole = one.caption(words, 24)
    assert four.caption(words, 24) == [*whole[:-1], *four.ret_ids]
    assert four.caption(words, 8) == [*whole[:4], *four.ret_ids]
    assert four.caption(words, 2) == four.ret_ids
    assert four.decode([*four.encode("a [RET2] b"), *four.ret_ids]) == "a [RET2] b"
    assert PromptTokenizer(folder, rows=("<d0>",)).ret_ids == []


def test_special_words_in_user_text_stay_text(opt):
    ids = opt.encode("a [RET] </s> <|image|> b")
    assert not {opt.ret_id, opt.image_id, opt.bos_id, opt.pad_id} & set(ids)
    assert opt.decode(ids) == "a [RET] </s> <|image|> b"


def test_toy_tokenizer_has_the_form_of_opts():
    toy = PromptTokenizer(str(TOY / "opt"))
    assert toy.start() == [2] and toy.pad_id == 1
    assert toy.decode(toy.encode("a small red star at night.")) == "a small red star at night."
    assert pickle.loads(pickle.dumps(toy)).caption("a red star", 24) == toy.caption("a red star", 24)


def test_toy_tokenizer_config_is_opts():
    config = json.loads((TOY / "opt" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "GPT2Tokenizer" and config["add_bos_token"]


@pytest.mark.parametrize(
    ("template", "start"),
    [("{{ '<|im_start|>' + message }}", ["<|endoftext|>"]), ("{{ bos_token + message }}", ["<|im_start|>"])],
)
def test_what_opens_the_turns_of_a_chat_does_not_start_a_text(template, start, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(str(TOY / "opt"))
    tokenizer.add_tokens(["<|im_start|>", "<|endoftext|>"], special_tokens=True)
    tokenizer.bos_token, tokenizer.chat_template = "<|im_start|>", template
    tokenizer.save_pretrained(tmp_path)
    found = PromptTokenizer(str(tmp_path))
    assert found.start() == [found.special_id(text) for text in start]


def test_code_beside_a_tokenizer_is_not_run(tmp_path):
    for path in (TOY / "opt").glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    about |= {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["strange.Strange", "strange.Strange"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Strange: pass\n")
    with suppress(UserError):
        PromptTokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_sentencepiece_keeps_the_space_in_front_of_a_generated_piece(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "\u2581", *"sito", "\u2581s", "it", "\u2581sit", "\u2581o"]
    merges = [("\u2581", "s"), ("i", "t"), ("\u2581s", "it"), ("\u2581", "o")]
    LlamaTokenizer({token: i for i, token in enumerate(tokens)}, merges).save_pretrained(tmp_path)
    llama = PromptTokenizer(str(tmp_path))
    sit_o = llama.encode("sit o")
    assert llama.hf.convert_ids_to_tokens(sit_o) == ["\u2581sit", "\u2581o"]
    assert llama.decode(sit_o) == llama.decode([llama.bos_id, *sit_o]) == " sit o"
    assert llama.decode([tokens.index("i"), *sit_o]) == "i sit o" and llama.decode([]) == ""
    prompt = "it" + llama.decode(sit_o)  # what the next turn reads
    assert llama.encode(prompt) == [*llama.encode("it"), *sit_o]


def test_no_tokenizer_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        PromptTokenizer(str(tmp_path))
