"""What the machine is asked for before and while training: how the allocator behaves, memory, threads.

Nothing here changes a result. Allocator and memory are about CPUs under Linux with glibc, and do nothing
elsewhere. bench.memory measures what they are worth.
"""
import contextlib
import ctypes
import os
import resource
import sys

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
