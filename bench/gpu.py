"""What holds on a GPU, and how fast it is: one command, a results file, a table.

    python -m bench.gpu --output results.json
    python -m bench.gpu --only speed-1B peers --output more.json
    python -m bench.gpu --table results.json            # the table of an earlier run
    python -m bench.gpu --device cpu                    # every stage with tiny shapes, to try the command

Every stage is a process of its own with a deadline: one that fails or hangs costs its own results only.
Checks that time nothing run several at once, then measurements run alone. The results file is rewritten
whenever a stage has found something, so an end from outside leaves what was found until then. What a stage
printed is next to the results file, in the folder NAME-logs. The last lines printed are the table and one
JSON line; the exit status is 1 if a check failed or a stage did not end well. bench/gpu_checks.py and
bench/gpu_speed.py hold the stages.
"""
import argparse
import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.common import REPOSITORY, cores, hardware

# Seconds that are left for the table when everything else has to end.
RESERVE = 8
# A stage is not started with less time than this: importing torch and starting CUDA takes about as long.
LEAST = 15


@dataclass(frozen=True)
class Stage:
    """function: "module:function", called with a Report, the device and whether to use tiny shapes; seconds:
    its deadline; alone: whether nothing else may run meanwhile."""
    name: str
    function: str
    seconds: int
    alone: bool = False


# In the order in which they start: what matters most or takes longest first.
STAGES = (
    Stage("versions", "bench.gpu_checks:versions", 60),
    Stage("quickstart", "bench.gpu_checks:quickstart", 190),
    Stage("bf16", "bench.gpu_checks:bf16", 150),
    Stage("attention", "bench.gpu_checks:attention", 90),
    Stage("fp32", "bench.gpu_checks:fp32", 60),
    Stage("syncs", "bench.gpu_checks:syncs", 100),
    Stage("transformers", "bench.gpu_checks:transformers_parity", 90),
    Stage("generation", "bench.gpu_checks:generation", 60),
    Stage("ranks", "bench.gpu_checks:ranks", 120),
    Stage("compile", "bench.gpu_speed:compile_times", 150),
    Stage("ceilings", "bench.gpu_speed:ceilings", 40, alone=True),
    Stage("speed-0.13B", "bench.gpu_speed:speed_small", 120, alone=True),
    Stage("speed-1B", "bench.gpu_speed:speed_large", 150, alone=True),
    Stage("peers", "bench.gpu_speed:peers", 70, alone=True),
    Stage("speed-0.5B", "bench.gpu_speed:speed_middle", 90, alone=True),
)
# Checks may take this share of the budget together, so that time is left to measure.
SHARE_OF_CHECKS = 0.45

TITLES = {
    1: "versions, card, attention", 2: "ceilings of this card", 3: "fp32 against the CPU",
    4: "flash attention over documents against fp64", 5: "bf16: the same step by other ways",
    6: "waits of the host in five steps", 7: "quick start, repeated and resumed",
    8: "transformers on the same weights", 9: "greedy generation", 10: "speed and memory of a step",
    11: "one change switched off", 12: "profile of a step", 13: "other trainers",
    14: "one rank under torchrun", 0: "stages that did not end well"}


# ---------------------------------------------------------------- in the child


class Report:
    """What a stage finds. Each row is appended to a file at once, so a stage that is killed leaves its rows.

    Rows are {"section", "name", "value", "unit", "limit", "passed", "note", "data"}. section: a key of
    TITLES; passed: None for a number that promises nothing; data: more by name, which the table leaves out.
    """

    def __init__(self, file: Path):
        self.file = file

    def row(self, section: int, name: str, value: object = None, unit: str = "", limit: str = "",
            passed: bool | None = None, note: str = "", data: dict | None = None) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        row = {"section": section, "name": name, "value": value, "unit": unit, "limit": limit,
               "passed": passed, "note": note, "data": data or {}}
        with open(self.file, "a") as out:
            out.write(json.dumps(row) + "\n")

    def at_most(self, section: int, name: str, value: float, limit: float, unit: str = "", note: str = ""
                ) -> None:
        """A check. NaN does not pass."""
        self.row(section, name, value, unit, f"<= {limit:.2g}", bool(value <= limit), note)

    def at_least(self, section: int, name: str, value: float, limit: float, unit: str = "", note: str = ""
                 ) -> None:
        """A check that a planted fault is caught, or that something is used at all."""
        self.row(section, name, value, unit, f">= {limit:.2g}", bool(value >= limit), note)

    def holds(self, section: int, name: str, passed: bool, note: str = "") -> None:
        self.row(section, name, "yes" if passed else "no", limit="yes", passed=bool(passed), note=note)

    @contextlib.contextmanager
    def trying(self, section: int, name: str) -> Iterator[None]:
        """What raises inside is a failed row, and the stage continues."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            lines = str(error).splitlines() or [""]
            self.row(section, name, passed=False, note=f"{type(error).__name__}: {lines[0][:300]}")


def run_stage(function: str, rows: Path, device: str) -> None:
    """In the child: the stage itself."""
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(Report(rows), device, device == "cpu")


# ---------------------------------------------------------------- in the parent


class Child:
    """A running stage."""

    def __init__(self, stage: Stage, logs: Path, device: str, seconds: float, threads: int):
        self.stage, self.began, self.seconds = stage, time.monotonic(), seconds
        self.rows_file, self.log_file = logs / f"{stage.name}.jsonl", logs / f"{stage.name}.txt"
        for file in (self.rows_file, self.log_file):
            file.write_text("")
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                       "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
        command = [sys.executable, "-m", "bench.gpu", "--stage", stage.function, "--rows",
                   str(self.rows_file), "--device", device]
        with open(self.log_file, "w") as log:
            # In a session of its own, so that its own children end with it.
            self.process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=log, stderr=log,
                                            stdin=subprocess.DEVNULL, start_new_session=True)
        self.outcome = ""

    @property
    def age(self) -> float:
        return time.monotonic() - self.began

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ended(self) -> bool:
        """Whether it has ended; it is killed at its deadline."""
        status = self.process.poll()
        if status is None and self.age < self.seconds:
            return False
        # Also after an orderly end, because it may have left children.
        self.kill()
        if status is None:
            self.outcome = f"killed at its deadline of {self.seconds:.0f} s"
        elif status:
            last = self.log_file.read_text(errors="replace").strip().splitlines()[-1:]
            self.outcome = f"exit status {status}: {''.join(last)[:300]}"
        else:
            self.outcome = "ended"
        self.seconds = self.age
        return True

    def rows(self) -> list[dict]:
        # The last line may be half written.
        lines = self.rows_file.read_text().split("\n")[:-1]
        return [{"stage": self.stage.name, **json.loads(line)} for line in lines]


class Run:
    """The stages of one run, and the results file."""

    def __init__(self, output: Path, device: str, budget: float):
        self.output, self.device, self.end = output, device, time.monotonic() + budget - RESERVE
        self.budget, self.began = budget, time.monotonic()
        self.logs = output.with_name(f"{output.stem}-logs")
        self.logs.mkdir(parents=True, exist_ok=True)
        self.children: list[Child] = []
        self.skipped: dict[str, str] = {}
        self.written: tuple | None = None
        self.machine = hardware("triton", "transformers", "accelerate", "trl", "liger-kernel", "numpy")

    @property
    def results(self) -> dict:
        stages = {child.stage.name: {"outcome": child.outcome or "running",
                                     "seconds": round(child.seconds if child.outcome else child.age, 1)}
                  for child in self.children}
        stages |= {name: {"outcome": why, "seconds": 0.0} for name, why in self.skipped.items()}
        rows = [row for child in self.children for row in child.rows()]
        rows += [{"stage": name, "section": 0, "name": name, "value": None, "unit": "", "limit": "",
                  "passed": False, "note": stage["outcome"], "data": {}}
                 for name, stage in stages.items() if stage["outcome"] not in ("ended", "running")]
        return {"device": self.device, "hardware": self.machine, "budget": self.budget,
                "seconds": round(time.monotonic() - self.began, 1), "stages": stages, "rows": rows}

    def write(self) -> dict:
        """Write the results file, if there is anything new. Returns the results."""
        results = self.results
        news = len(results["rows"]), [stage["outcome"] for stage in results["stages"].values()]
        if news != self.written:
            # Renamed into place: whoever reads the file meanwhile finds a whole one.
            aside = self.output.with_name(self.output.name + ".new")
            aside.write_text(json.dumps(results, indent=1))
            aside.replace(self.output)
            self.written = news
        return results

    def run(self, stages: list[Stage], at_once: int, until: float) -> None:
        """Run stages, `at_once` at a time, each until its deadline and all until `until`."""
        waiting, running = list(stages), []
        while waiting or running:
            while waiting and len(running) < at_once:
                stage, left = waiting.pop(0), until - time.monotonic()
                if left < LEAST:
                    self.skipped[stage.name] = "not started: no time was left"
                    continue
                child = Child(stage, self.logs, self.device, min(stage.seconds, left),
                              threads=max(1, cores() // at_once))
                running.append(child)
                self.children.append(child)
            for child in [child for child in running if child.ended()]:
                running.remove(child)
                rows = child.rows()
                failed = [row["name"] for row in rows if row["passed"] is False]
                print(f"{time.monotonic() - self.began:5.0f} s  {child.stage.name}: {child.outcome} in "
                      f"{child.seconds:.0f} s, {len(rows)} rows, {len(failed)} failed", flush=True)
            self.write()
            time.sleep(0.2)

    def kill(self) -> None:
        for child in self.children:
            if not child.outcome:
                child.kill()
                child.outcome, child.seconds = "killed: the run was ended from outside", child.age


# ---------------------------------------------------------------- the table


def shown(value: object) -> str:
    """A number in at most nine characters."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(results: dict) -> str:
    """The rows of a results file in 80 columns, by section. The note of a failed row follows it."""
    lines = []
    for section in [*sorted(number for number in TITLES if number), 0]:
        rows = [row for row in results["rows"] if row["section"] == section]
        if rows:
            lines.append(f"{section or '':>2} {TITLES[section]}")
        for row in rows:
            mark = {True: "pass", False: "FAIL", None: ""}[row["passed"]]
            value = f"{shown(row['value'])} {row['unit']}".strip()[:40]
            room = 60 - len(value)
            lines.append(f"   {row['name'][:room]:<{room}} {value} {row['limit']:>10} {mark:>4}")
            if row["note"] and row["passed"] is not True:
                lines.append(f"      {row['note'][:74]}")
    passed = [row["passed"] for row in results["rows"]]
    versions = ", ".join(f"{name} {version}" for name, version in results["hardware"]["versions"].items())
    lines += [f"{', '.join(results['hardware']['gpus']) or results['hardware']['cpu']}"[:80], versions[:80],
              f"{passed.count(True)} checks passed, {passed.count(False)} failed; {results['seconds']:.0f} s "
              f"of {results['budget']:.0f} s"]
    return "\n".join(line.rstrip() for line in lines)


def summary(results: dict) -> dict:
    """What the last line holds: short enough to be read where only the end of an output is kept."""
    rows = results["rows"]
    return {"passed": sum(row["passed"] is True for row in rows),
            "failed": [f"{row['stage']}: {row['name']}" for row in rows if row["passed"] is False][:40],
            "seconds": results["seconds"],
            "stages": {name: stage["seconds"] for name, stage in results["stages"].items()}}


def main(argv: list[str]) -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", default=names,
                        help=f"run only these: {', '.join(names)}")
    parser.add_argument("--output", type=Path, default=Path("gpu-results.json"), metavar="FILE")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: tiny shapes, to try the command")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of this results file")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    if args.stage:
        run_stage(args.stage, args.rows, args.device)
        return 0
    if args.budget < RESERVE + LEAST:
        parser.error(f"--budget {args.budget:g}: must be {RESERVE + LEAST} or more")

    # A request to end becomes an exception, so that the children end and the table is printed.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    chosen = [stage for stage in STAGES if stage.name in args.only]
    run = Run(args.output.resolve(), args.device, args.budget)
    together = [stage for stage in chosen if not stage.alone]
    alone = [stage for stage in chosen if stage.alone]
    until = run.end if not alone else run.began + SHARE_OF_CHECKS * args.budget
    try:
        run.run(together, max(1, min(4, cores() // 4)), until)
        run.run(alone, 1, run.end)
    finally:
        signal.signal(signal.SIGTERM, before)
        run.kill()
        run.written = None
        results = run.write()
        print(f"\n{table(results)}")
        print(json.dumps(summary(results)), flush=True)
    return int(any(row["passed"] is False for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
