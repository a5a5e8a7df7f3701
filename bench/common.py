"""What the benchmarks share: the machine's description, child processes, tables. Imports no torch, so that a
child's peak memory is its own: Linux counts what a process was forked from into its ru_maxrss."""
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# What machine.keep_freed_memory() asks of glibc, as environment variables for programs that do not ask it.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**62), "MALLOC_MMAP_THRESHOLD_": str(2**62),
             "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": str(2**28)}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(*packages: str) -> dict:
    """The CPU as the system names it, the cores this process may use, memory, and versions of packages."""
    cpu, flags, memory = platform.processor(), "", None
    if (info := Path("/proc/cpuinfo")).is_file():
        text = info.read_text()
        cpu = (re.search(r"model name\s*: (.*)", text) or [None, cpu])[1]
        flags = (re.search(r"flags\s*: (.*)", text) or [None, ""])[1]
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    special = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()]
    versions = {name: version(name) for name in ("torch", *packages)}
    return {"cpu": cpu, "cores": cores(), "instructions": special, "memory_gb": memory,
            "python": platform.python_version(), "versions": {k: v for k, v in versions.items() if v}}


def child(command: list[str], threads: int, allocator: bool = False, timeout: float | None = None) -> None:
    """Run `python command...` on so many threads. RuntimeError with the end of its output if it fails."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
                   "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": path,
                   **(ALLOCATOR if allocator else {})}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            status = subprocess.run([sys.executable, *command], env=environment, stdout=log, stderr=log,
                                    timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            status = f"none after {timeout:.0f} s"
        if status:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command[:3])}: exit status {status}\n{log.read()[-2000:].strip()}")


def json_child(command: list[str], threads: int, allocator: bool = False,
               timeout: float | None = None) -> dict:
    """child() that writes its result, one JSON object, to the file named by --result."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        child([*command, "--result", str(file)], threads, allocator, timeout)
        return json.loads(file.read_text())


def print_table(heads: list[str], rows: list[list[str]], widths: list[int]) -> None:
    """First column to the left, the others to the right; a width counts the space before a column."""
    for row in [heads, *rows]:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:])]
        print(f"{row[0]:<{widths[0]}}" + "".join(cells), flush=True)
