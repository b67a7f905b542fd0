"""glibc's memory allocator, told to keep what is freed for what is wanted next.

By default glibc takes each large block from the system and gives it back when it is freed. The system clears the pages of
the next one, one by one, when they are first written: for activations of a hundred megabytes that takes longer than the
convolution that writes them. Kept memory is used again at once. A process then holds the most it ever needed at a time, and
what lies between its blocks, until it ends; tools/bench_allocator.py measures both.
"""

from __future__ import annotations

import ctypes
import os
import sys

OPTION = "FROMAGE_ALLOCATOR"  # "system" leaves the allocator alone
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of mallopt(3)
PADDING = 64 << 20  # bytes by which the heap grows at least
OTHERS = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_")  # beginnings of variables by which a user has chosen


def keep_freed_memory() -> bool:
    """Tell glibc, for this process and those it forks; returns whether that was done.

    Nothing is done where the C library is another one, or where the environment decides: by FROMAGE_ALLOCATOR=system, by
    settings of glibc, or by another allocator that is loaded first.
    """
    if sys.platform != "linux" or os.environ.get(OPTION) == "system":
        return False
    if any(name.startswith(OTHERS) and value for name, value in os.environ.items()):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: PADDING}
    return all(libc.mallopt(name, value) for name, value in settings.items())
