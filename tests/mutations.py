"""Plants known faults, one at a time, and checks that the tests notice each.

    python tests/mutations.py                             every fault, about N minutes on two cores
    python tests/mutations.py --only half-bias kl-sign    these only
    python tests/mutations.py --list

A fault replaces one piece of text by another in a copy of the tree; the tests that it names run there, and
one of them must fail. pytest does not collect this file, since it takes much longer than the suite. Whoever
finds a fault that no test noticed adds it here, with the test that now does.

Exit status 1 if a fault is not noticed, no longer applies, or names a test that does not exist.
"""
import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TAIL = re.compile(r"^(?:FAILED|ERROR) (\S+(?:\[.*?\])?)(?: - |$)", re.MULTILINE)


class Fault(NamedTuple):
    name: str
    what: str                   # what goes wrong, in a few words
    file: str
    old: str                    # occurs once in the file
    new: str
    tests: tuple[str, ...]      # "train::NAME" is tests/test_train.py::test_NAME, "train" the whole file


def fault(name: str, what: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, what, file, old, new, tuple(
        "tests/test_" + test.replace("::", ".py::test_", 1) + ("" if "::" in test else ".py")
        for test in tests))


FAULTS = [
]


class Result(NamedTuple):
    status: str         # noticed, timeout, not noticed or error
    detail: str = ""    # the test that failed, or what is wrong with the fault
    seconds: float = 0.0

    @property
    def fine(self) -> bool:
        return self.status in ("noticed", "timeout")


def copy_tree(folder: Path) -> Path:
    """A copy of the tree without what runs and tools leave there."""
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".venv", "runs", "docs")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


def pytest(tree: Path, arguments: list[str], timeout: float) -> tuple[int | None, str]:
    """The exit status, None if it took longer than timeout seconds, and what was printed."""
    # No bytecode files: they tell changes by time and size, and a fault may change neither.
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        process = subprocess.Popen([sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p",
                                    "no:cacheprovider", *arguments], cwd=tree, env=env, stdout=out,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout)
        except BaseException as error:
            # torchrun ends its ranks on SIGTERM, but leaves them behind on SIGKILL
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(2)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
        out.seek(0)
        return status, out.read()


def try_fault(planted: Fault, known: set[str], timeout: float, all_tests: bool) -> Result:
    text = (ROOT / planted.file).read_text()
    if (count := text.count(planted.old)) != 1:
        return Result("error", f"no longer applies: its text occurs {count} times in {planted.file}")
    if missing := [test for test in planted.tests if test not in known]:
        return Result("error", f"no such test: {missing[0]}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as home:
        tree = copy_tree(Path(home) / "tree")
        (tree / planted.file).write_text(text.replace(planted.old, planted.new))
        status, printed = pytest(tree, list(planted.tests), timeout)
        if status == 0 and all_tests:
            status, printed = pytest(tree, ["tests"], 10 * timeout)
    seconds = time.monotonic() - began
    if status is None:
        return Result("timeout", "", seconds)
    if status == 0:
        return Result("not noticed", "", seconds)
    failed = TAIL.search(printed)
    if status != 1 and not failed:      # 2 to 5: pytest itself could not run them
        return Result("error", printed.strip().splitlines()[-1] if printed.strip() else f"status {status}")
    return Result("noticed", failed[1] if failed else "", seconds)


def known_tests(tests: list[str]) -> set[str]:
    """Every name by which pytest can be given one of the tests in these files."""
    files = sorted({test.split("::")[0] for test in tests if (ROOT / test.split("::")[0]).is_file()})
    status, printed = pytest(ROOT, ["--collect-only", *files], 300)
    if status != 0:
        sys.exit(f"error: pytest cannot collect {' '.join(files)}:\n{printed}")
    nodes = [line for line in printed.splitlines() if "::" in line]
    return {name for node in nodes for name in (node, node.split("[")[0], node.split("::")[0])}


def row(planted: Fault, result: Result) -> str:
    """One line of at most 80 columns."""
    by = result.detail.removeprefix("tests/test_").replace(".py::test_", ": ")
    shown = by if result.status == "noticed" else f"{result.status.upper()} {by}".rstrip()
    line = f"{planted.name:<16}{planted.what:<33} {shown}"
    return line if len(line) <= 80 else line[:79] + "~"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="FAULT", default=[], help="try these faults only")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="faults at once (default 2)")
    parser.add_argument("--timeout", type=float, default=180, metavar="SECONDS",
                        help="for one fault; a hang counts as noticed (default 180)")
    parser.add_argument("--all-tests", action="store_true",
                        help="run the whole suite for a fault that its tests did not notice")
    parser.add_argument("--list", action="store_true", help="print the faults with their tests and end")
    args = parser.parse_args()
    names = [each.name for each in FAULTS]
    if unknown := set(args.only) - set(names):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; --list prints the names")
    assert len(set(names)) == len(names), "two faults have the same name"
    chosen = [each for each in FAULTS if not args.only or each.name in args.only]
    if args.list:
        for each in chosen:
            print(f"{each.name:<16}{each.what:<33} {' '.join(each.tests)}")
        return 0
    tests = sorted({test for each in chosen for test in each.tests})
    known = known_tests(tests)
    status, printed = pytest(ROOT, [test for test in tests if test in known], 3600)
    if status != 0:
        sys.exit(f"error: without a fault these must pass:\n{printed}")

    def work(planted: Fault) -> Result:
        result = try_fault(planted, known, args.timeout, args.all_tests)
        print(f"{result.seconds:4.0f} s  {planted.name}: {result.status} {result.detail}", file=sys.stderr,
              flush=True)
        return result

    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(work, chosen))
    print(f"\n{'fault':<16}{'what it does':<33} noticed by")
    for planted, result in zip(chosen, results):
        print(row(planted, result))
    good = sum(result.fine for result in results)
    print(f"\n{good} of {len(results)} noticed")
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
