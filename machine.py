"""What the machine is asked for before and while training: how the allocator behaves, memory, threads.

Nothing here changes a result. Allocator and memory are about CPUs under Linux with glibc, and do nothing
elsewhere. bench.memory measures what they are worth.
"""
import contextlib
import ctypes
import os
import re
import resource
import sys
import threading
from pathlib import Path

import torch


def keep_freed_memory(shapes: int = 256) -> None:
    """Tell glibc to keep what is freed instead of handing it back: a step frees and takes gigabytes, and
    every page taken anew costs a fault. And oneDNN how many shapes of products to remember (its default is
    1024): what it remembers stands in the way of large blocks, and what it forgets it compiles again."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(shapes))
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_MAX, M_TRIM_THRESHOLD (none), M_TOP_PAD
        for parameter, value in ((-4, 0), (-1, -1), (-2, 2**28)):
            mallopt(parameter, value)


class Reserve:
    """Takes memory for the first steps while data and model are being read, so that they do not wait for the
    system to hand it over page by page; nothing where the system is not Linux."""

    def __init__(self, size: int) -> None:
        self.thread = None
        try:
            available = int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
            libc = ctypes.CDLL(None)
            malloc, self.free = libc.malloc, libc.free
            malloc.restype, malloc.argtypes, self.free.argtypes = (
                ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p])
            libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        except (OSError, AttributeError, TypeError):    # another system
            return
        size = min(size, available // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.block = malloc(size)
        if not self.block:
            return
        page = 2**21
        start, end = -(-self.block // page) * page, (self.block + size) // page * page

        def touch() -> None:
            libc.madvise(start, max(0, end - start), 14)                        # MADV_HUGEPAGE
            for at in range(start, end, 2**26):
                if libc.madvise(at, min(2**26, end - at), 23):                  # MADV_POPULATE_WRITE
                    break   # an older kernel: the steps will touch it themselves

        self.thread = threading.Thread(target=touch, daemon=True)
        self.thread.start()

    def release(self) -> None:
        """Wait until all is taken, and leave it to malloc."""
        if self.thread:
            self.thread.join()
            self.free(self.block)
            self.thread = None


def share_threads() -> None:
    """Under torchrun, which starts ranks with one thread each, give each its share of the cores."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // ranks))


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "linux" else 2**20)
