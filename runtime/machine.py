"""Settings of the machine: memory allocators, threads, deterministic operations, whether torch.compile works,
and how much memory was used.

Nothing here but deterministic() changes a result. malloc's settings apply to Linux with glibc, and do nothing
elsewhere. Make all settings before CUDA starts: it reads the environment only then.
"""
import contextlib
import ctypes
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from runtime.cpu import cores
from runtime.start import is_main, launched, print_message


def keep_freed_memory(shapes: int = 256) -> None:
    """Let glibc keep freed memory, in huge pages, instead of returning it to the system. A step frees and
    allocates gigabytes, and every page that comes from the system again costs a fault. shapes: how many
    compiled matrix products oneDNN caches (its default is 1024). The cached ones fragment the memory between
    large blocks; others are compiled again.

    On CUDA, let PyTorch's segments grow. Rows whose lengths always change leave gaps in fixed ones."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:     # its old name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(shapes))
    # Another libc has no mallopt, another system no madvise.
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        # M_MMAP_MAX, M_TRIM_THRESHOLD (never), M_TOP_PAD
        for parameter, value in ((-4, 0), (-1, -1), (-2, 2**28)):
            libc.mallopt(parameter, value)
        _use_huge_pages(libc)


def return_freed_memory() -> None:
    """Return to the system what glibc has kept, for other processes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    """Reserve addresses for half of the memory, without using it, and ask for huge pages there. malloc keeps
    the addresses when the block is freed. With several micro-batches in a step SmolLM2-135M trains some 5 to
    10 % faster in huge pages."""
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p])
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    size //= launched("LOCAL_WORLD_SIZE", 1)
    if block := libc.malloc(size):
        page = 2**21
        start, end = -(-block // page) * page, (block + size) // page * page
        # MADV_HUGEPAGE
        libc.madvise(start, end - start, 14)
        libc.free(block)


def to_device(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """x, a tensor on the CPU, on the device. Pinned memory lets the host go on while CUDA copies."""
    if torch.device(device).type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def resolve_dtype(dtype: str, device: torch.device | str) -> str:
    """--dtype for a device, as --device names it: bf16 or fp32. auto is bf16 where the device has
    instructions for products in bf16. Elsewhere they take 6 to 70 times as long as in fp32
    (docs/speed-measured.md). ValueError if dtype is none of the three."""
    if dtype in ("bf16", "fp32"):
        return dtype
    if dtype != "auto":
        raise ValueError(f"--dtype {dtype}: must be auto, bf16 or fp32")
    device = str(device)
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # CPUs with AMX have it, too. PyTorch 2.10 has no public name for it.
        fast = torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def warn_of_emulation(dtype: str, device: torch.device | str) -> None:
    """Say on standard error if --dtype is bf16 and the device has no instructions for it."""
    if dtype == "bf16" and resolve_dtype("auto", device) == "fp32" and is_main():
        print_message("warning: --dtype bf16: there are no instructions for it here, so it may take ten "
                      "times as long as --dtype fp32")


def share_threads() -> None:
    """Under torchrun, which starts each rank with one thread, use this rank's share of the cores."""
    ranks = launched("LOCAL_WORLD_SIZE", 1)
    if ranks > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, cores() // ranks))


WATCHED = 10    # the shortest time that Crowding judges, in seconds
LOOK = 2        # seconds between two looks of sleep_while_crowded()
CROWDED, FREE = 0.1, 0.02   # shares of the threads' time without a core: they sleep above, spin again below


def seconds_without_core() -> float:
    """How long the threads of this process, all together, have been ready to run while others had the cores;
    0 where the system does not say."""
    try:
        files = Path("/proc/self/task").glob("*/schedstat")
        return sum(int(file.read_text().split()[1]) for file in files) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


@contextlib.contextmanager
def sleeping_threads() -> Iterator[None]:
    """Let PyTorch's threads sleep almost at once when they wait for each other. Otherwise they spin for some
    milliseconds, on cores that other processes may need. libgomp does this by itself when it has more threads
    than there are cores, so idle ones are added. Another OpenMP takes no notice."""
    threads, end = torch.get_num_threads(), threading.Event()

    def add_threads() -> None:
        # A parallel operation, 32,768 numbers a thread, gives the thread that calls it a pool of its own.
        torch.zeros(threads * 2**15).add_(1)
        end.wait()

    pools = cores() // (threads - 1) if threads > 1 else 0
    try:
        for _ in range(pools):
            threading.Thread(target=add_threads, daemon=True).start()
        yield
    finally:
        # libgomp frees a pool when its thread ends.
        end.set()


@cache
def sleep_while_crowded() -> None:
    """From now on, let this process's threads sleep while they wait for each other whenever other processes
    take their cores. On two cores next to one busy process a step then takes half the time; on a quiet
    machine spinning is some 5 % faster."""
    def shares() -> Iterator[float]:
        crowding = Crowding()
        while True:
            time.sleep(LOOK)
            yield crowding.share()

    def watch(shares: Iterator[float]) -> None:
        while True:
            next(share for share in shares if share > CROWDED)
            with sleeping_threads():
                next(share for share in shares if share < FREE)

    threading.Thread(target=watch, args=(shares(),), daemon=True).start()


class Crowding:
    """Whether other processes slow this one down."""

    def __init__(self):
        self.began, self.waited = time.monotonic(), seconds_without_core()

    def share(self) -> float:
        """Of the threads' time since the last call, that in which they lacked a core, 0 to 1. More threads
        than PyTorch's may have waited at once."""
        began, waited = self.began, self.waited
        self.began, self.waited = time.monotonic(), seconds_without_core()
        return min(1.0, (self.waited - waited) / (self.began - began) / torch.get_num_threads())

    def warning(self) -> str:
        """A sentence if the threads lacked a core for a fifth of the time or more since the last call that
        judged, else "". A call less than WATCHED seconds after that one judges nothing."""
        seconds = time.monotonic() - self.began
        if seconds < WATCHED:
            return ""
        share = self.share()
        return "" if share < 0.2 else (
            f"warning: slowed down by other processes: in {seconds:.0f} s this one's threads\n"
            f"  waited {share:.0%} of the time for a core")


def deterministic() -> None:
    """Let operations on CUDA give the same bits every time. Otherwise the backward pass of flash attention
    and sums by index do not. PyTorch raises an error for an operation that cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # PyTorch would also fill new memory, which takes time. Everything here is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False


def compile_fault(device: torch.device) -> str:
    """Why torch.compile does not work here, tried on a small function; "" if it does. It needs Triton on CUDA
    and a C++ compiler."""
    try:
        compiled = torch.compile(lambda x: x + torch.compiler.is_compiling())(torch.zeros(2, device=device))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    # With TORCH_COMPILE_DISABLE=1 or TORCHDYNAMO_DISABLE=1 functions run as they are, or raise later.
    return "" if compiled.all() else "it is switched off in the environment"


def reset_peak(device: torch.device) -> None:
    """Reset what peak_memory_mb() and peak_reserved_mb() have counted so far on a CUDA device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory in MiB: allocated on a CUDA device since reset_peak(), or on a CPU resident of this
    process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "linux" else 2**20)


def peak_reserved_mb(device: torch.device) -> float | None:
    """The most memory in MiB that PyTorch has taken from a CUDA device since reset_peak(), for tensors and
    between them; None on a CPU."""
    return torch.cuda.max_memory_reserved(device) / 2**20 if device.type == "cuda" else None
