"""What is read off the processor's description."""

import pytest
import torch

from fromage import processor
from fromage.checkpoints import format as checkpoint_format
from fromage.checkpoints.format import dtype_name
from fromage.errors import UserError


@pytest.mark.parametrize(
    ("about", "capability", "slow"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ],
)
def test_onednn_is_for_amd_with_avx512(about, capability, slow, monkeypatch):
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr(processor, "described", lambda: about)
    assert processor.mkl_is_slow.__wrapped__() == slow


@pytest.mark.parametrize(
    ("flags", "own"), [("avx512f avx512_bf16", True), ("avx512f amx_bf16", True), ("avx512f", False), ("", False)]
)
def test_bfloat16_is_for_processors_that_multiply_in_it(flags, own, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr(processor, "described", lambda: f"flags : fpu {flags}")
    assert processor.multiplies_bfloat16.__wrapped__() == own


@pytest.mark.parametrize(("own", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_a_dtype_that_the_machine_decides(own, dtype, monkeypatch):
    monkeypatch.setattr(checkpoint_format, "multiplies_bfloat16", lambda: own)
    assert (dtype_name("auto"), dtype_name("float16")) == (dtype, "float16")
    with pytest.raises(UserError, match="dtype half: must be one of float32, bfloat16, float16, auto"):
        dtype_name("half")


def test_the_tensors_of_a_planner_are_not_the_processors():
    real = torch.zeros(2)
    with torch._subclasses.FakeTensorMode() as mode:
        planned = mode.from_tensor(real)
    assert processor.on_cpu(real, torch.nn.Parameter(real)) and not processor.on_cpu(real, planned)
