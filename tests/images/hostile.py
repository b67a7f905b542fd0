"""Images that cost more than they look, and one way to write a file."""

import io
import struct
import zlib

from PIL import Image

RED = (255, 0, 0)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def webp_chunk(kind, data):
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def webp(width, height):
    """A WebP whose canvas is of that size, and whose one frame is of 8 x 8 pixels."""
    frame = encoded(Image.new("RGB", (8, 8), RED), "WEBP")[12:]
    anmf = struct.pack("<I", 0)[:3] * 2 + (7).to_bytes(3, "little") * 2 + (9).to_bytes(3, "little") + b"\0" + frame
    vp8x = b"\x02\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + webp_chunk(b"VP8X", vp8x) + webp_chunk(b"ANIM", bytes(6)) + webp_chunk(b"ANMF", anmf)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(screen, frame):
    """A GIF that announces one size and holds a frame of another."""
    data = encoded(Image.new("L", (8, 8)), "GIF")
    at = data.index(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    return data[:6] + struct.pack("<HH", *screen) + data[10 : at + 5] + struct.pack("<HH", *frame) + data[at + 9 :]


def apng(width, height, frame):
    """A PNG with an animation of one frame of another size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    control = chunk(b"acTL", struct.pack(">II", 1, 0)) + chunk(
        b"fcTL", struct.pack(">IIIIIHHBB", 0, *frame, 0, 0, 1, 1, 0, 0)
    )
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + bytes(width)) * height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + control + pixels + chunk(b"IEND", b"")


def text_bomb(kind):
    """A PNG whose text is a hundred megabytes, in a hundred kilobytes."""
    plain = encoded(Image.new("L", (8, 8)))
    text = {"zTXt": b"a\0\0", "iTXt": b"a\0\1\0\0\0", "iCCP": b"a\0\0"}[kind] + zlib.compress(bytes(100 << 20), 9)
    chunk = struct.pack(">I", len(text)) + kind.encode() + text + struct.pack(">I", zlib.crc32(kind.encode() + text))
    return plain[:33] + chunk + plain[33:]


def endless():
    """A BMP in run-length encoding whose rows never end: Pillow reads each pair of bytes in Python, holding its lock."""
    pairs = b"\x01\x00" * (4 << 20)
    info = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, len(pairs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(pairs), 0, 0, 54 + 1024) + info + bytes(1024) + pairs
