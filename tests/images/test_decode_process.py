"""Strangers' images in processes of their own: the same pixels, and an end to what takes too long."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from hostile import encoded, endless
from PIL import Image

from fromage.errors import BrokenSample, UserError
from fromage.images import decode_process
from fromage.images.codec import decode_image, small
from fromage.images.decode_process import Decoders


@pytest.fixture
def decoders():
    made = Decoders(processes=2, seconds=20)
    yield made
    made.close()


def noise(side=64):
    return Image.merge("RGB", [Image.effect_noise((side, side + 9), 80) for _ in range(3)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_the_pixels_are_those_of_this_process(decoders, kind):
    data = encoded(noise(), kind)
    for side in (0, 20):
        image, here = decoders.decode(data, side=side), decode_image(data)
        assert image.size == (here if not side else small(here, side)).size
        assert image.tobytes() == (here if not side else small(here, side)).tobytes()


def test_one_process_decodes_many_and_a_broken_image_costs_none(decoders):
    good, pids = encoded(noise()), set()
    for data in (good, b"no image", good[:80], encoded(Image.new("L", (300, 300))), good) * 2:
        wrong = len(data) == 80 or data == b"no image"
        if wrong:
            with pytest.raises(BrokenSample, match="undecodable image"):
                decoders.decode(data)
        else:
            assert decoders.decode(data).size == decode_image(data).size
        process = decoders._idle.get()
        pids.add(process.process.pid)
        decoders._idle.put(process)
    assert len(pids) == 1
    with pytest.raises(BrokenSample, match="too large"):
        decoders.decode(good, max_pixels=100)


def test_what_takes_too_long_is_ended_and_this_process_runs_on():
    decoders, data, most = Decoders(processes=1, seconds=0.5), endless(), [0.0]
    decoders.seconds = 20
    decoders.decode(encoded(noise()))  # the process has started
    decoders.seconds, over = 0.5, threading.Event()

    def tick():
        while not over.is_set():
            began = time.monotonic()
            time.sleep(0.01)
            most[0] = max(most[0], time.monotonic() - began)

    ticking = threading.Thread(target=tick)
    ticking.start()
    began = time.monotonic()
    with pytest.raises(BrokenSample, match=r"longer than 0\.5 s"):
        decoders.decode(data)
    over.set()
    ticking.join()
    decoders.seconds = 20
    assert time.monotonic() - began < 5 and most[0] < 0.5, "the lock of this process was free"
    assert decoders.decode(encoded(noise())).size == (64, 73), "another process takes its place"
    decoders.close()


def test_a_process_that_dies_is_one_image_lost(decoders):
    data = encoded(noise())
    decoders.decode(data)
    process = decoders._idle.get()
    os.kill(process.process.pid, signal.SIGSTOP)
    decoders._idle.put(process)
    threading.Timer(0.2, os.kill, (process.process.pid, signal.SIGKILL)).start()
    with pytest.raises(BrokenSample, match="ended the process"):
        decoders.decode(data)
    assert decoders.decode(data).tobytes() == decode_image(data).tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep to the limit")
def test_memory_is_limited(monkeypatch):
    monkeypatch.setattr(decode_process, "START", decode_process.START.replace("; work(", "; import fromage.images."
                        "decode_process as d; d.MEMORY = 120 << 20; work("))  # fmt: skip
    decoders = Decoders(processes=1)
    with pytest.raises(BrokenSample, match="memory"):
        decoders.decode(encoded(Image.new("RGB", (5000, 5000))))
    assert decoders.decode(encoded(noise())).size == (64, 73)
    decoders.close()


def test_many_threads_share_few_processes(decoders):
    files, got = [encoded(noise(side)) for side in range(20, 40)], {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: decoders.decode(files[i])})) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i].tobytes() for i in range(20)] == [decode_image(data).tobytes() for data in files]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_processes_of_its_own(decoders):
    data = encoded(noise())
    decoders.decode(data)

    def child(pipe):
        pipe.send(decoders.decode(data).tobytes())
        decoders.close()

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    got = [decoders.decode(data).tobytes() for _ in range(20)]
    assert ours.poll(30) and {*got, ours.recv()} == {decode_image(data).tobytes()}
    process.join()


def test_processes_end_with_the_program():
    code = "from fromage.images.decode_process import decode_apart, DECODERS as d; import sys, os\n"
    code += "decode_apart(sys.stdin.buffer.read()); print(d._idle.get().process.pid, flush=True); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], input=encoded(noise()), capture_output=True, check=True)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("it lives on")


def test_without_processes_it_is_one_line(decoders, monkeypatch):
    def refuse(*args, **options):
        raise OSError("too many")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(UserError, match="no process can be started"):
        decoders.decode(b"")


def test_closing_ends_every_process_that_is_idle():
    decoders = Decoders(3)
    held = [decoders._idle.get() for _ in range(3)]
    ended = []
    for number in range(2):
        decoders._idle.put(SimpleNamespace(end=lambda number=number: ended.append(number)))
    decoders._idle.put(held[0])
    decoders.close()
    assert sorted(ended) == [0, 1] and decoders._idle.qsize() == 3
