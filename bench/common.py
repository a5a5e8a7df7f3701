"""What the benchmarks share: flags, a description of the machine, child processes, tables.

It imports no torch. Linux counts the memory of the process that starts a child into the child's peak
(ru_maxrss), so a benchmark that starts others has to stay small itself.
"""
import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from runtime.cpu import cores, cpu_field, cpu_name
from runtime.flags import Parser, number

REPOSITORY = Path(__file__).resolve().parent.parent
# Other trainers (bench/peers.py).
PEERS = ("trl", "trl-liger", "trl-liger-padded", "trainer", "transformers")
# The type of --document, the length of synthetic documents in tokens.
document_length = number(int, 1, 10**6)


def make_parser(module: str, doc: str, usage: str = "") -> Parser:
    """Of `python -m bench.MODULE`. doc: the module's docstring; usage: what follows, if not only flags. A
    flag with type=int must be 1 or more."""
    parser = Parser(prog=f"python -m bench.{module}", description=doc.split("\n\n")[0], allow_abbrev=False,
                    usage=f"%(prog)s {usage}" if usage else None)
    parser.register("type", int, number(int, 1))
    return parser


def add_contest_flags(parser: Parser, contenders: Sequence[str]) -> None:
    """The flags of a benchmark whose contenders run in processes of their own, in turn: --rounds, --threads
    and, hidden, those of such a process, --run and --result."""
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--run", choices=contenders, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """The flags of a benchmark, and those behind `--`, which are train.py's."""
    split = argv.index("--") if "--" in argv else len(argv)
    return argv[:split], argv[split + 1:]


def hardware(*packages: str) -> dict:
    """CPU, cores, memory, GPUs as the driver names them, and the installed versions of packages."""
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    gpus: list[str] = []
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        # Without a driver or a card it prints why, there too.
        gpus = [] if done.returncode else done.stdout.splitlines()
    versions = {}
    for package in ("torch", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    special = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
               if name in cpu_field("flags").split()]
    return {"cpu": cpu_name(), "cores": cores(), "instructions": special, "memory_gib": memory,
            "gpus": gpus, "python": platform.python_version(), "versions": versions}


def print_machine(machine: dict, threads: int) -> None:
    """One line on what hardware() found."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    devices = ", ".join([machine["cpu"], *machine["gpus"]])
    print(f"{devices}; {threads} threads, Python {machine['python']}, {versions}", flush=True)


def start(command: list[str], threads: int, log: IO, checkout: Path = REPOSITORY, session: bool = False,
          **variables: str) -> subprocess.Popen:
    """Start `python command...` with so many threads and the modules of `checkout`. log: the file that gets
    its output; session: whether in a session of its own; variables: of the environment."""
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
                   "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **variables}
    return subprocess.Popen([sys.executable, *command], env=environment, stdin=subprocess.DEVNULL, stdout=log,
                            stderr=log, start_new_session=session)


def child(command: list[str], threads: int, checkout: Path = REPOSITORY) -> None:
    """start() it and wait for it; it ends, too, if this program is stopped. ValueError if it fails: the error
    that it printed, or the end of its output."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = start(command, threads, log, checkout, TQDM_DISABLE="1")
        try:
            status = process.wait()
        finally:
            # torchrun ends its ranks when it is asked to end.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
        if status:
            log.seek(0)
            output = log.read().strip()
            _, found, error = f"\n{output}".rpartition("\nerror: ")
            raise ValueError(error if found else
                             f"{' '.join(command[:3])}: exit status {status}\n{output[-2000:]}")


def json_child(command: list[str], threads: int, flags: Sequence[str] = ()) -> dict:
    """child() that writes its result, one JSON object, to the file named by --result. flags: of train.py,
    given after `--`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        child([*command, "--result", str(file), *(["--", *flags] if flags else [])], threads)
        return json.loads(file.read_text())


def read_lines(file: Path) -> list[dict]:
    """The objects of a .jsonl file; of one that is being written, the whole lines; [] if there is none."""
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def in_turn(names: Sequence[str], number: int) -> Sequence[str]:
    """The order of round `number`: every other round runs backwards, so that a drift of the machine's speed
    favours nobody."""
    return names if number % 2 == 0 else names[::-1]


def in_rounds(names: Sequence[str], rounds: int, run: Callable[[str], dict]) -> dict[str, list[dict]]:
    """What run(name) returned for each name, a list by round."""
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for i in range(rounds):
        for name in in_turn(names, i):
            runs[name].append(run(name))
    return runs


def spread(values: list[float], digits: int) -> str:
    """Median and range, "2.10 (1.93-2.26)"; a single value as it is."""
    middle, least, most = (f"{x:,.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least}-{most})"


def print_table(heads: list[str], rows: list[list[str]], widths: list[int]) -> None:
    """First column to the left, the others to the right; a width counts the space before a column."""
    for row in [heads, *rows]:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:])]
        print(f"{row[0]:<{widths[0]}}" + "".join(cells), flush=True)
