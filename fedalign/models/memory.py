"""Keep freed memory in the process: on Linux a part of every small step goes into page faults.

glibc gives large blocks back to the system as soon as they are free, so every activation of every
step may be mapped and cleared anew.  Told to keep them, the plain loop on the pocket took .93 and
.65 of the time in two pairs of runs on two cores.
The price: a process keeps the memory of its largest step until it ends.
"""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of ``mallopt(3)``."""
LARGEST = 32 << 20
"""Blocks up to this come from the kept heap: the most that glibc allows."""


def keep_freed_memory() -> bool:
    """Set it for this process; return whether the C library took it (False off glibc)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    settings = {MMAP_THRESHOLD: LARGEST, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2 * LARGEST}
    taken = [library.mallopt(name, value) == 1 for name, value in settings.items()]
    return all(taken)
