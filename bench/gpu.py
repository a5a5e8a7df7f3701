"""What holds on a GPU, and how fast it is: one command, a results file, a table.

    python -m bench.gpu --output results.json
    python -m bench.gpu --only speed-1B peers --output more.json
    python -m bench.gpu --table results.json            # the table of an earlier run
    python -m bench.gpu --markdown results.json         # its tables into docs/gpu.md
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
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.common import REPOSITORY, cores, hardware, make_parser, read_lines, start
from runtime.files import check_writable, read_json, write_text
from runtime.flags import number
from runtime.foreign import check_file
from runtime.start import WIDTH, run_program

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
    Stage("speed-0.5B", "bench.gpu_speed:speed_middle", 90, alone=True),
    Stage("peers", "bench.gpu_speed:peers", 190, alone=True),
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


def make_row(section: int, name: str, value: object = None, unit: str = "", limit: str = "",
             passed: bool | None = None, note: str = "", data: dict | None = None) -> dict:
    """A row of the results. section: a key of TITLES; passed: None for a number that promises nothing; data:
    more by name, which the table leaves out."""
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)
    return {"section": section, "name": name, "value": value, "unit": unit, "limit": limit, "passed": passed,
            "note": note, "data": data or {}}


class Report:
    """What a stage finds. Each row is appended to a file at once, so a stage that is killed leaves its
    rows."""

    def __init__(self, file: Path):
        self.file = file

    def row(self, *values: object, **more: object) -> None:
        """As make_row()."""
        with open(self.file, "a") as out:
            out.write(json.dumps(make_row(*values, **more)) + "\n")

    def at_most(self, section: int, name: str, value: float, limit: float, note: str = "") -> None:
        """A check. NaN does not pass."""
        self.row(section, name, value, "", f"<= {limit:.2g}", bool(value <= limit), note)

    def at_least(self, section: int, name: str, value: float, limit: float) -> None:
        """A check that a planted fault is caught, or that something is used at all."""
        self.row(section, name, value, "", f">= {limit:.2g}", bool(value >= limit))

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


def end_with_parent() -> None:
    """From now on this process and what it starts are killed when the process that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def run_stage(function: str, rows: Path, device: str) -> None:
    """In the child: the stage itself."""
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(Report(rows), device, device == "cpu")


# ---------------------------------------------------------------- in the parent


class Run:
    """The stages of one run, and the results file."""

    def __init__(self, output: Path, device: str, budget: float, stages: list[Stage]):
        self.output, self.device, self.budget = output, device, budget
        self.began = time.monotonic()
        self.logs = output.with_name(f"{output.stem}-logs")
        self.outcomes = dict.fromkeys((stage.name for stage in stages), "not started")
        self.seconds: dict[str, float] = {}
        self.machine = hardware("triton", "transformers", "accelerate", "trl", "liger-kernel", "numpy")
        if device == "cuda" and not has_cuda():
            raise ValueError("--device cuda: PyTorch finds no CUDA device; cpu tries every stage with tiny "
                             "shapes")
        self.logs.mkdir(exist_ok=True)
        for name in self.outcomes:      # an earlier run may have left rows
            (self.logs / f"{name}.jsonl").write_text("")

    @property
    def age(self) -> float:
        return time.monotonic() - self.began

    def run(self, stages: list[Stage], at_once: int, until: float) -> None:
        """Run stages, `at_once` at a time, each until its deadline and all until `until`, an age of this
        run."""
        waiting, running = list(stages), []
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    if until - self.age >= LEAST:
                        running.append(self.begin(waiting.pop(0), until, max(1, cores() // at_once)))
                    else:
                        name = waiting.pop(0).name
                        self.outcomes[name] = ("not started: no time was left; raise --budget, or run --only "
                                               f"{name}")
                running = [each for each in running if not self.ended(*each)]
                self.write()
                time.sleep(0.2)
        finally:
            if running:     # a second Ctrl-C would only stop what follows
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            for name, process, began, _ in running:
                self.end(name, process, began, "killed: the run was ended from outside")

    def begin(self, stage: Stage, until: float, threads: int) -> tuple[str, subprocess.Popen, float, float]:
        """Start a stage: its name, its process, and the ages at which it began and has to end."""
        self.outcomes[stage.name] = "running"
        command = ["-m", "bench.gpu", "--stage", stage.function, "--rows",
                   str(self.logs / f"{stage.name}.jsonl"), "--device", self.device]
        with open(self.logs / f"{stage.name}.txt", "w") as log:
            process = start(command, threads, log, session=True, TOKENIZERS_PARALLELISM="false")
        return stage.name, process, self.age, min(self.age + stage.seconds, until)

    def ended(self, name: str, process: subprocess.Popen, began: float, deadline: float) -> bool:
        """Whether a stage has ended, or now is, at its deadline."""
        status = process.poll()
        if status is None and self.age < deadline:
            return False
        outcome = "ended"
        if status is None:
            outcome = f"killed at its deadline of {deadline - began:.0f} s"
        elif status:
            last = (self.logs / f"{name}.txt").read_text(errors="replace").strip().splitlines()[-1:]
            outcome = f"exit status {status}: {''.join(last)[:300]}"
        self.end(name, process, began, outcome)
        return True

    def end(self, name: str, process: subprocess.Popen, began: float, outcome: str) -> None:
        """Kill what is left of a stage, and of what it started, and note how it ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.seconds[name], self.outcomes[name] = self.age - began, outcome
        print(f"{self.age:5.0f} s  {name}: {outcome} in {self.seconds[name]:.0f} s", flush=True)

    def write(self) -> dict:
        """Write the results file. Returns the results."""
        rows = []
        for name in self.outcomes:
            rows += [{"stage": name, **row} for row in read_lines(self.logs / f"{name}.jsonl")]
        # A failed row for every stage that did not end well, or has not ended yet.
        rows += [{"stage": name, **make_row(0, name, passed=False, note=outcome)}
                 for name, outcome in self.outcomes.items() if outcome != "ended"]
        stages = {name: {"outcome": outcome, "seconds": round(self.seconds.get(name, 0.0), 1)}
                  for name, outcome in self.outcomes.items()}
        results = {"device": self.device, "hardware": self.machine, "budget": self.budget,
                   "seconds": round(self.age, 1), "stages": stages, "rows": rows}
        write_text(self.output, json.dumps(results, indent=1))
        return results


def has_cuda() -> bool:
    """Asked in a process of its own, since importing torch takes memory."""
    command = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command).returncode == 0


def read_results(file: Path) -> dict:
    """The results in a file. ValueError if it is none."""
    check_file(file)
    results = read_json(file)
    if missing := {"hardware", "budget", "seconds", "stages", "rows"} - results.keys():
        raise ValueError(f"{file}: is no results file of this program; it has no "
                         f"{', '.join(sorted(missing))}")
    return results


# ---------------------------------------------------------------- tables


def shown(value: object) -> str:
    """A number with three digits, or without a fraction if it has more."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def quantity(row: dict) -> str:
    return f"{shown(row['value'])} {row['unit']}".strip()


def table(results: dict) -> str:
    """The rows of a results file in 79 columns, by section. The note of a failed row follows it."""
    lines = []
    for section in [*sorted(filter(None, TITLES)), 0]:
        rows = [row for row in results["rows"] if row["section"] == section]
        if rows:
            lines.append(f"{section or '':>2} {TITLES[section]}")
        for row in rows:
            mark = {True: "pass", False: "FAIL", None: ""}[row["passed"]]
            value = quantity(row)[:40]
            room, name = WIDTH - 20 - len(value), row["name"]
            if len(name) > room:
                # The value follows on a line of its own.
                lines.append(f"   {name[:WIDTH - 3]}")
                name = ""
            lines.append(f"   {name:<{room}} {value} {row['limit']:>10} {mark:>4}")
            if row["note"] and row["passed"] is not True:
                lines += [f"      {line}" for line in textwrap.wrap(row["note"], WIDTH - 6)[:3]]
    for line in machine(results):
        lines += textwrap.wrap(line, WIDTH)
    lines.append(judgement(results))
    return "\n".join(line.rstrip() for line in lines)


def machine(results: dict) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in results["hardware"]["versions"].items())
    return [", ".join(results["hardware"]["gpus"]) or results["hardware"]["cpu"], versions]


def judgement(results: dict) -> str:
    passed = [row["passed"] for row in results["rows"]]
    return (f"{passed.count(True)} checks passed, {passed.count(False)} failed; {results['seconds']:.0f} s "
            f"of {results['budget']:.0f} s")


def markdown(results: dict) -> str:
    """The tables of docs/gpu.md."""
    def rows_of(*sections: int) -> list[dict]:
        return [row for row in results["rows"] if row["section"] in sections]

    lines = [f"{'; '.join(machine(results))}. {judgement(results)}.", "", "| checks | passed | failed |",
             "|---|---:|---|"]
    for section, title in TITLES.items():
        checks = [row for row in rows_of(section) if row["passed"] is not None]
        if checks:
            failed = "; ".join(row["name"] for row in checks if not row["passed"])
            lines.append(f"| {title} | {sum(row['passed'] for row in checks)} of {len(checks)} | {failed} |")
    lines += ["", "| model | loss | micro-batch tokens | tokens/s | MFU | peak GB | peak / estimate |",
              "|---|---|---:|---:|---:|---:|---:|"]
    for row in rows_of(10):
        if "mfu" in row["data"]:
            of, data = row["name"].partition(":")[0].split(), row["data"]
            memory = [f"{data[key]:.{digits}f}" if key in data else "" for key, digits in
                      (("peak_gb", 1), ("peak_over_estimate", 2))]
            cells = [*of, shown(row["value"]), f"{data['mfu']:.1%}", *memory]
            lines.append(f"| {' | '.join(cells)} |")
        elif row["value"] == "out of memory":
            lines.append(f"| {' | '.join([*row['name'].split(), row['value']])} | | | |")
    for section in (11, 12, 13, 2):
        rows = [row for row in rows_of(section) if row["value"] is not None and row["passed"] is None]
        if rows:
            lines += ["", f"| {TITLES[section]} | |", "|---|---:|"]
            lines += [f"| {row['name']} | {quantity(row)} |" for row in rows]
    return "\n".join(lines)


def write_markdown(results: dict, file: Path) -> None:
    """Put the tables between the two markers of a file."""
    before, begin, after = file.read_text().partition("<!-- results -->\n")
    _, end, after = after.partition("<!-- end of results -->")
    if not end:
        raise ValueError(f"{file}: the lines <!-- results --> and <!-- end of results --> are missing")
    file.write_text(f"{before}{begin}{markdown(results)}\n{end}{after}")


def summary(results: dict) -> dict:
    """What the last line holds: short enough to be read where only the end of an output is kept."""
    rows = results["rows"]
    return {"passed": sum(row["passed"] is True for row in rows),
            "failed": [f"{row['stage']}: {row['name']}" for row in rows if row["passed"] is False][:40],
            "seconds": results["seconds"],
            "stages": {name: stage["seconds"] for name, stage in results["stages"].items()}}


def exit_status(results: dict) -> int:
    """1 if a check failed or a stage did not end well."""
    return int(any(row["passed"] is False for row in results["rows"]))


def main(argv: list[str]) -> int:
    names = [stage.name for stage in STAGES]
    parser = make_parser("gpu", __doc__)
    parser.add_argument("--budget", type=number(float, RESERVE + LEAST, 10**6), default=540,
                        help="seconds for everything")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", default=names,
                        help=f"run only these: {', '.join(names)}")
    parser.add_argument("--output", type=Path, default=Path("gpu-results.json"), metavar="FILE")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: tiny shapes, to try the command")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of this results file")
    parser.add_argument("--markdown", type=Path, metavar="FILE",
                        help="put the tables of this results file into docs/gpu.md")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.table:
        results = read_results(args.table)
        print(table(results))
        return exit_status(results)
    if args.markdown:
        write_markdown(read_results(args.markdown), REPOSITORY / "docs" / "gpu.md")
        return 0
    if args.stage:
        end_with_parent()
        run_stage(args.stage, args.rows, args.device)
        return 0
    check_writable("--output", args.output)
    chosen = [stage for stage in STAGES if stage.name in args.only]
    run = Run(args.output.resolve(), args.device, args.budget, chosen)
    together = [stage for stage in chosen if not stage.alone]
    alone = [stage for stage in chosen if stage.alone]
    end = args.budget - RESERVE
    try:
        run.run(together, max(1, min(4, cores() // 4)), SHARE_OF_CHECKS * args.budget if alone else end)
        run.run(alone, 1, end)
    finally:
        results = run.write()
        print(f"\n{table(results)}")
        print(json.dumps(summary(results)), flush=True)
    return exit_status(results)


if __name__ == "__main__":
    run_program(main)
