"""Language models from GGUF files: what llama.cpp's converter writes is what is read, once."""

import pytest
import torch
from tiny_gguf import TEMPLATE, rounded, tiny_llama, write_gguf

from fromage.errors import UserError
from fromage.identity import FolderKind
from fromage.models import gguf
from fromage.models.language_model import load_lm

pytest.importorskip("gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FROMAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_llama(), path)
    return path


@torch.no_grad()
def test_it_is_the_model_that_was_written(file, cache):
    lm, plain = load_lm(f"gguf:{file}"), rounded(tiny_llama())
    ids = torch.tensor([[3, 7, 11, 30, 4, 28]])
    found = lm(lm.embed(ids), torch.ones_like(ids, dtype=torch.bool))
    wanted = plain.model(ids).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert lm.dtype == torch.float32 and lm.added.tied


def test_its_tokenizer_and_chat_template_come_with_it(file, cache):
    tokenizer = load_lm(f"gguf:{file}").tokenizer
    assert tokenizer.decode(tokenizer.encode("the ab")) == "the ab" and len(tokenizer.encode(" the")) == 1
    assert (tokenizer.hf.bos_token_id, tokenizer.eos_id) == (1, 2) and tokenizer.hf.chat_template == TEMPLATE
    assert tokenizer.start() == [0], "<|endoftext|>: its bos opens the turns of a chat"


def test_it_is_unpacked_once_and_again_where_the_file_is_another(file, cache, tmp_path, monkeypatch):
    folder, made = gguf.unpacked(file), []
    monkeypatch.setattr(gguf, "unpack", lambda *args: made.append(args) or gguf.UNPACKED)
    assert gguf.unpacked(file) == folder and made == []
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(file.read_bytes())
    assert gguf.unpacked(moved) == folder
    moved.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(UserError):
        gguf.unpacked(moved)
    assert len(made) == 1


def test_a_changed_cache_is_refused(file, cache):
    folder = gguf.unpacked(file)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="remove") as told:
        load_lm(f"gguf:{file}")
    assert str(folder) in str(told.value)


def test_a_kill_in_the_middle_leaves_no_half_of_it(file, cache, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderKind, "seal", killed)
    with pytest.raises(KeyboardInterrupt):
        gguf.unpacked(file)
    assert not [path for path in (cache / "gguf").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda data: data[:4000], "damaged or of an architecture"),
        (lambda data: data[:-100], "damaged or of an architecture"),
        (lambda data: b"GGUF" + b"\xff" * 100, "damaged or of an architecture"),
        (lambda data: b"PK\x03\x04", "is no GGUF file"),
        (lambda data: b"", "is no GGUF file"),
    ],
)
def test_a_damaged_file_is_one_line(file, cache, tmp_path, content, said):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(content(file.read_bytes()))
    with pytest.raises(UserError, match=said) as told:
        load_lm(f"gguf:{bad}")
    assert str(bad) in str(told.value) and "\n" not in str(told.value)


def test_an_unknown_architecture_is_one_line(cache, tmp_path):
    write_gguf(tiny_llama(), tmp_path / "other.gguf", architecture="gadget")
    with pytest.raises(UserError, match="gadget"):
        load_lm(f"gguf:{tmp_path / 'other.gguf'}")


def test_a_missing_file_and_package_are_one_line(file, cache, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"none.gguf: cannot be read"):
        load_lm(f"gguf:{tmp_path / 'none.gguf'}")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install .*\[gguf\]"):
        load_lm(f"gguf:{file}")


def test_a_file_that_lacks_tensors_is_refused_and_not_kept(cache, tmp_path):
    write_gguf(tiny_llama(), tmp_path / "torn.gguf", without={"blk.1.ffn_up.weight"})
    with pytest.raises(UserError, match=r"torn\.gguf: its weights lack model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"):
        load_lm(f"gguf:{tmp_path / 'torn.gguf'}")
    assert not [path for path in (cache / "gguf").iterdir() if path.is_dir()]
