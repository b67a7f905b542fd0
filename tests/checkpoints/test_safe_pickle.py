"""Foreign pickles: what is not admitted does nothing, and what a file claims is compared with the file."""

import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from fromage.checkpoints.safe_pickle import Inert, load_plain, read_pickle
from fromage.errors import UserError

FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


class Calls:
    """Its unpickling calls something."""

    def __init__(self, call, *args, state=None):
        self.call, self.args, self.state = call, args, state

    def __reduce__(self):
        return self.call, self.args, self.state


def write(path, raw):
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
def test_objects_of_any_class_are_inert_and_tensors_beside_them_are_whole(how, tmp_path):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], 0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    made, base = tmp_path / "made", torch.arange(12.0).reshape(3, 4)
    content = {"a": base, "b": base[1:, ::2], "parameter": torch.nn.Parameter(torch.ones(2)), "half": base.bfloat16(),
               "scheduler": {"after": schedule, "count": 3}, "best": np.float64(0.5), "set": {1, 2},
               "call": Calls(os.mkdir, str(made)), "list": [1.5, None, "x"]}  # fmt: skip
    torch.save(content, tmp_path / "a.pt", **how)
    found = read_pickle(tmp_path / "a.pt", foreign=True)
    for name in ("a", "b", "half", "parameter"):
        assert found[name].dtype == content[name].dtype and torch.equal(found[name], content[name])
    assert isinstance(found["scheduler"]["after"], Inert) and isinstance(found["call"], Inert) and not made.exists()
    assert found["scheduler"]["count"] == 3 and found["list"] == [1.5, None, "x"]
    with pytest.raises(UserError, match=r"a\.pt.*run code"):
        read_pickle(tmp_path / "a.pt")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("call", [(os.mkdir,), (eval,), (exec,), (getattr, "x"), (setattr, "x")])
def test_what_is_refused_is_refused_by_every_protocol(protocol, call, tmp_path):
    raw = pickle.dumps({"a": Calls(call[0], str(tmp_path / "made"), *call[1:])}, protocol)
    with pytest.raises(pickle.UnpicklingError, match="asks for"):
        load_plain(write(tmp_path / "a.pkl", raw))
    assert not (tmp_path / "made").exists()


def test_a_pickle_changes_no_class_of_ours(tmp_path):
    state = {"__setstate__": 1, "extend": 2}
    for way in (state, (None, state)):
        body = pickle.dumps(way, 2)[2:-1]
        raw = b"\x80\x02cfromage.x\ny\n" + body + b"b."
        torch.save({}, tmp_path / "a.pt")
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as out, zipfile.ZipFile(tmp_path / "a.pt") as old:
            for name in old.namelist():
                out.writestr(name, raw if name.endswith("data.pkl") else old.read(name))
        assert read_pickle(tmp_path / "b.pt", foreign=True) is Inert
    assert callable(Inert.extend) and callable(Inert.__setstate__)


def with_pickle(path, change):
    """A file of torch.save with one tensor (4,), its pickle changed."""
    torch.save({"state_dict": {"a": torch.zeros(4)}, "hyper_parameters": {}}, path)
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as out:
        for name, data in records.items():
            out.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return path


MANY = b"J\x00\x00\x00\x20"


@pytest.mark.parametrize("size", [MANY + b"\x85K\x01\x85", MANY + b"\x85K\x00\x85", b"K\x05\x85K\x01\x85"])
def test_a_tensor_of_more_numbers_than_are_stored_is_refused(size, tmp_path):
    """2**29 numbers, the same number 2**29 times, and one number too many, of a storage of four."""
    claim = lambda raw: raw.replace(b"K\x04\x85q\x0aK\x01\x85q\x0b", size)  # noqa: E731
    path = with_pickle(tmp_path / "a.pt", claim)
    with pytest.raises(UserError, match=r"a\.pt"):
        read_pickle(path, foreign=True)
    fewer = lambda raw: raw.replace(b"K\x04\x85q\x0aK\x01\x85q\x0b", b"K\x02\x85K\x01\x85")  # noqa: E731
    assert read_pickle(with_pickle(path, fewer), foreign=True)["state_dict"]["a"].shape == (2,)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x04N" + b"r" + struct.pack("<I", 2**31) + b".",  # a memo of 2**31 entries
        b"\x80\x04B" + struct.pack("<I", 2**31) + b"x.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**36) + b"x.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**36) + b"x.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**36) + b"N.",
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
        b"",
    ],
)
def test_sizes_that_a_pickle_claims_take_no_memory(raw, tmp_path):
    path = write(tmp_path / "a.pkl", raw)
    tracemalloc.start()
    try:
        load_plain(path)
    except Exception as error:
        assert not isinstance(error, AssertionError)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def test_zips_that_torch_does_not_write_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1 << 16)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old:
        records = {name: old.read(name) for name in old.namelist()}
    for name, how, more in (
        ("deflated", zipfile.ZIP_DEFLATED, {}),
        ("script", zipfile.ZIP_STORED, {"a/constants.pkl": b"x"}),
    ):
        with zipfile.ZipFile(tmp_path / f"{name}.pt", "w", how) as out:
            for record, data in {**records, **more}.items():
                out.writestr(record, data)
        for foreign in (False, True):
            with pytest.raises(UserError, match=f"{name}.pt.*(compressed|TorchScript)"):
                read_pickle(tmp_path / f"{name}.pt", foreign=foreign)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(UserError, match=r"a\.tar"):
        read_pickle(tmp_path / "a.tar", foreign=True)


def test_a_large_array_is_a_view_of_the_file(tmp_path):
    path = write(tmp_path / "a.pkl", pickle.dumps({"a": bytes(4 << 20)}, 4))
    tracemalloc.start()
    found = load_plain(path)["a"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found, memoryview) and len(found) == 4 << 20 and peak < 1 << 20
