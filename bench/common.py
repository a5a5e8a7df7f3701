"""What the benchmarks share: flags, a description of the machine, child processes, tables.

It imports no torch. Linux counts the memory of the process that starts a child into the child's peak
(ru_maxrss), so a benchmark that starts others has to stay small itself.
"""
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from runtime.cpu import cores, cpu_field, cpu_name
from runtime.flags import Parser

REPOSITORY = Path(__file__).resolve().parent.parent
# Other trainers (bench/peers.py).
PEERS = ("trl", "trl-liger", "trl-liger-padded", "trainer", "transformers")


def make_parser(module: str, doc: str, usage: str = "") -> Parser:
    """Of `python -m bench.MODULE`. doc: the module's docstring; usage: what follows, if not only flags."""
    return Parser(prog=f"python -m bench.{module}", description=doc.split("\n\n")[0], allow_abbrev=False,
                  usage=f"%(prog)s {usage}" if usage else None)


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """The flags of a benchmark, and those behind `--`, which are train.py's."""
    split = argv.index("--") if "--" in argv else len(argv)
    return argv[:split], argv[split + 1:]


def hardware(*packages: str) -> dict:
    """CPU, cores, memory in GiB, GPUs as the driver names them, and the installed versions of packages."""
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    gpus: list[str] = []
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    versions = {}
    for package in ("torch", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    special = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
               if name in cpu_field("flags").split()]
    return {"cpu": cpu_name(), "cores": cores(), "instructions": special, "memory_gb": memory, "gpus": gpus,
            "python": platform.python_version(), "versions": versions}


def print_machine(machine: dict, threads: int) -> None:
    """One line on what hardware() found."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    devices = ", ".join([machine["cpu"], *machine["gpus"]])
    print(f"{devices}; {threads} threads, Python {machine['python']}, {versions}", flush=True)


def child(command: list[str], threads: int, checkout: Path = REPOSITORY) -> None:
    """Run `python command...` with so many threads and the modules of `checkout`. RuntimeError with the end
    of its output if it fails."""
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
                   "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": path}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        status = subprocess.run([sys.executable, *command], env=environment, stdout=log,
                                stderr=log).returncode
        if status:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command[:3])}: exit status {status}\n{log.read()[-2000:].strip()}")


def json_child(command: list[str], threads: int, flags: Sequence[str] = ()) -> dict:
    """child() that writes its result, one JSON object, to the file named by --result. flags: of train.py,
    given after `--`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        child([*command, "--result", str(file), *(["--", *flags] if flags else [])], threads)
        return json.loads(file.read_text())


def in_turn(names: list[str], number: int) -> list[str]:
    """The order of round `number`: every other round runs backwards, so that a drift of the machine's speed
    favours nobody."""
    return names if number % 2 == 0 else names[::-1]


def spread(values: list[float], digits: int) -> str:
    """Median and range, "2.10 (1.93-2.26)"; a single value as it is."""
    middle, least, most = (f"{x:,.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least}-{most})"


def print_table(heads: list[str], rows: list[list[str]], widths: list[int]) -> None:
    """First column to the left, the others to the right; a width counts the space before a column."""
    for row in [heads, *rows]:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:])]
        print(f"{row[0]:<{widths[0]}}" + "".join(cells), flush=True)
