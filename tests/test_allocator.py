"""What the allocator is told, seen in a process of its own."""

import os
import subprocess
import sys

import pytest

from fromage import allocator

GLIBC = sys.platform == "linux" and bool(getattr(os, "confstr", lambda name: None)("CS_GNU_LIBC_VERSION"))
FAULTS = """
import resource, sys
from fromage.allocator import keep_freed_memory
told = keep_freed_memory()
for _ in range(20):
    bytearray(b"x") * (64 << 20)
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


OF_COMMANDS = """
import multiprocessing, resource, sys
from fromage.cli.main import main

def faults(queue):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(b"x") * (64 << 20)
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

sys.argv = ["fromage", "--version"]
main()
process = multiprocessing.get_context("fork")
queue = process.Queue()
faults(queue)
worker = process.Process(target=faults, args=(queue,))
worker.start()
print(queue.get(), queue.get())
worker.join()
"""


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_the_command_line_and_its_workers_keep_freed_memory():
    plain = {name: value for name, value in os.environ.items() if not name.startswith((allocator.OPTION, *allocator.OTHERS))}
    counted = []
    for said in ({}, {allocator.OPTION: "system"}):
        out = subprocess.run(
            [sys.executable, "-c", OF_COMMANDS], env=plain | said, capture_output=True, text=True, check=True
        )
        counted.append([int(word) for word in out.stdout.split()[-2:]])
    assert all(few < many / 4 for few, many in zip(*counted, strict=True)), counted


def run(**variables):
    """Whether it was told, and how many pages were faulted in by twenty blocks of 64 MB."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith((allocator.OPTION, *allocator.OTHERS))}
    out = subprocess.run([sys.executable, "-c", FAULTS], env=plain | variables, capture_output=True, text=True, check=True)
    told, faults = out.stdout.split()
    return told == "True", int(faults)


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_memory_that_was_freed_is_used_again():
    (kept, few), (left, many) = run(), run(FROMAGE_ALLOCATOR="system")
    assert (kept, left) == (True, False) and few < many / 4


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
@pytest.mark.parametrize(
    "said", [{"MALLOC_TOP_PAD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}, {"LD_PRELOAD": "libm.so.6"}]
)
def test_what_the_environment_says_stays(said):
    assert run(**said)[0] is False


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_left_alone(platform, monkeypatch):
    monkeypatch.setattr("sys.platform", platform)
    assert not allocator.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    for name in list(os.environ):
        if name.startswith((allocator.OPTION, *allocator.OTHERS)):
            monkeypatch.delenv(name)
    assert not allocator.keep_freed_memory()
