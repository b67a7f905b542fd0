"""Strangers' images, decoded in processes of their own, which are ended when one takes too long or too much memory.

Pillow's decoders are partly Python and hold the interpreter's lock, and a thread cannot be ended. A process decodes one
image after the other and lives on. Its standard streams carry

    -> a head (REQUEST), the file's bytes
    <- a head (REPLY), and what is wrong with the image, if anything is

and the pixels, in RGB, lie in a file in memory that both sides have open.
"""

from __future__ import annotations

import atexit
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from queue import LifoQueue
from typing import IO

from PIL import Image

from fromage.errors import BrokenSample, UserError, first_line
from fromage.images.codec import STRANGERS_PIXELS, decode_image, small

PROCESSES = 4  # at most; each is started when it is needed
SECONDS = 10.0  # in which an image must be decoded
MEMORY = 2 << 30  # bytes of address space of a process; an image of STRANGERS_PIXELS takes a fifth of it
REQUEST = struct.Struct(">QQQ")  # bytes of the file; pixels at most; pixels of the longer side, 0: as it is
REPLY = struct.Struct(">LLL")  # width, height, bytes of a message that follows
START = "import sys; sys.path[:] = sys.argv[2:]; from fromage.images.decode_process import work; work(int(sys.argv[1]))"


class Decoders:
    """Processes that decode images, one each at a time. Threads may share it.

    Attributes:
        seconds: time limit of an image.
    """

    def __init__(self, processes: int = PROCESSES, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._idle: LifoQueue[_Decoder | None] = LifoQueue()
        self._begin_anew(processes)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=partial(self._begin_anew, processes))

    def _begin_anew(self, processes: int) -> None:
        """In a process that was forked: the processes are its parent's."""
        self._idle = LifoQueue()
        for _ in range(processes):
            self._idle.put(None)

    def decode(self, data: bytes, max_pixels: int = STRANGERS_PIXELS, side: int = 0) -> Image.Image:
        """decode_image in another process. side: pixels of the longer side, to which it is scaled down; 0: none.

        Waits for a process where all are in use. Raises BrokenSample as decode_image does, for an image that takes too long
        and for one that ends the process; UserError where no process can be started. On Windows it is decoded in this one.
        """
        if not hasattr(select, "poll"):
            image = decode_image(data, max_pixels)
            return small(image, side) if side else image
        decoder = self._idle.get()
        try:
            if decoder and not decoder.alive:
                decoder.end()
                decoder = None
            decoder = decoder or _Decoder()
            return decoder.decode(data, max_pixels, side, self.seconds)
        finally:
            self._idle.put(decoder)

    def close(self) -> None:
        """End all processes that are idle."""
        idle = [self._idle.get() for _ in range(self._idle.qsize())]
        for decoder in filter(None, idle):
            decoder.end()
        for _ in idle:
            self._idle.put(None)


class _Decoder:
    """One process."""

    def __init__(self) -> None:
        self.pixels, self.ended = _memory_file(), False
        command = [sys.executable, "-c", START, str(self.pixels), *map(os.path.abspath, sys.path)]
        try:
            self.process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[self.pixels]
            )
        except OSError as error:
            os.close(self.pixels)
            raise UserError(f"no process can be started that decodes images ({first_line(error)}); end others") from error
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        for stream in (self.stdin, self.stdout):
            os.set_blocking(stream.fileno(), False)

    @property
    def alive(self) -> bool:
        """Whether it takes images."""
        return not self.ended and self.process.poll() is None

    def end(self) -> None:
        """Kill it, if that is not done, and close what leads to it."""
        if self.ended:
            return
        self.ended = True
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()
        os.close(self.pixels)

    def decode(self, data: bytes, max_pixels: int, side: int, seconds: float) -> Image.Image:
        """See Decoders.decode; what breaks off ends the process."""
        ends = time.monotonic() + seconds
        try:
            self._write(REQUEST.pack(len(data), max_pixels, side) + data, ends)
            width, height, length = REPLY.unpack(self._read(REPLY.size, ends))
            if not width:
                raise BrokenSample(self._read(length, ends).decode())
            with mmap.mmap(self.pixels, 3 * width * height, prot=mmap.PROT_READ) as file, memoryview(file) as pixels:
                return Image.frombytes("RGB", (width, height), pixels)  # a copy
        except BrokenSample:
            raise
        except BaseException as error:
            self.end()
            if isinstance(error, TimeoutError):
                raise BrokenSample(f"undecodable image: takes longer than {seconds:g} s to decode") from None
            if isinstance(error, (OSError, EOFError)):
                raise BrokenSample("undecodable image: ended the process that decoded it") from None
            raise

    def _write(self, data: bytes, ends: float) -> None:
        rest = memoryview(data)
        while rest:
            _wait(self.stdin, select.POLLOUT, ends)
            rest = rest[os.write(self.stdin.fileno(), rest) :]

    def _read(self, count: int, ends: float) -> bytes:
        data = b""
        while len(data) < count:
            _wait(self.stdout, select.POLLIN, ends)
            got = os.read(self.stdout.fileno(), count - len(data))
            if not got:
                raise EOFError
            data += got
        return data


def _wait(stream: IO[bytes], event: int, ends: float) -> None:
    """Wait until a stream is ready. Raises TimeoutError."""
    waiting = select.poll()
    waiting.register(stream, event)
    if not waiting.poll(max(0.0, 1000 * (ends - time.monotonic()))):
        raise TimeoutError


def _memory_file() -> int:
    """A descriptor of a file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def work(pixels: int) -> None:
    """What the process does: decode what it is sent, to its end. pixels: descriptor of the file that takes them."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other side, which closes the stream
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing that is printed may get among the replies
    while head := stdin.read(REQUEST.size):
        length, max_pixels, side = REQUEST.unpack(head)
        reply = _reply(stdin.read(length), max_pixels, side, pixels)
        with suppress(BrokenPipeError):  # the other side has gone
            stdout.write(reply)
            stdout.flush()


def _reply(data: bytes, max_pixels: int, side: int, pixels: int) -> bytes:
    try:
        os.ftruncate(pixels, 0)
        image = decode_image(data, max_pixels)
        image = small(image, side) if side else image
        _lay(image.tobytes(), pixels)
        return REPLY.pack(*image.size, 0)
    except (BrokenSample, MemoryError) as error:
        why = str(error) or "undecodable image: takes too much memory"
        return REPLY.pack(0, 0, len(told := why.encode("utf-8", "replace"))) + told


def _lay(data: bytes, file: int) -> None:
    rest, at = memoryview(data), 0
    while at < len(data):
        at += os.pwrite(file, rest[at:], at)


DECODERS = Decoders()  # of this process
atexit.register(DECODERS.close)


def decode_apart(data: bytes, max_pixels: int = STRANGERS_PIXELS, side: int = 0) -> Image.Image:
    """Decode a stranger's image: see Decoders.decode, of which this process has one."""
    return DECODERS.decode(data, max_pixels, side)
