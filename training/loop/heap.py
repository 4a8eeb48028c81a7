"""Memory that tensors on the CPU free stays with the process, for the next step asks for the same again."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache

#: What settles this from outside, and then is heeded: glibc's own variables, and other allocators.
SETTLED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")
#: Parameters of glibc's `mallopt`, and their values: blocks of up to 32 MiB, the most that it takes, come of the heap,
#: and the heap is not given back.
_OPTIONS = {-3: 32 << 20, -1: -1}


@lru_cache(maxsize=1)
def keep_freed() -> bool:
    """See to it that freed memory is not given back to the system in each step, to be asked for in the next.

    By default glibc does that with the end of its heap; every page that returns costs a fault and its zeros. Of a step
    of Adam on a ResNet-18 these were up to half. The peak of a process is what it was, and it stays there until the
    process ends.

    Returns:
        Whether it is so now: not without glibc, nor where the environment has settled it (`SETTLED`).
    """
    if not sys.platform.startswith("linux") or any(map(os.environ.get, SETTLED)):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([bool(mallopt(option, value)) for option, value in _OPTIONS.items()])
