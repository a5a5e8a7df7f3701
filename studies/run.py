"""Run grids of the paper's analyses: each is a command of eval.study, spelled out in grids.json.

    python -m studies.prepare --data DIR --output-dir RECORDS
    python -m studies.run --model SMOLLM2 --records RECORDS --output-dir RUNS                    all, in order
    python -m studies.run --model SMOLLM2 --records RECORDS --output-dir RUNS 't0-*' 'dolly-*'
    python -m studies.run --output-dir RUNS 'ratio-*' 'size-*'                            the invented world's

What is finished is not repeated, and what was stopped is resumed. A grid of the invented world
(quickstart/make.py) needs neither --model nor --records. Grids with the same "study" share its folder, so
that each adds contenders to the ones before. --publish DIR copies every study's runs, as they are then, to
DIR/STUDY.jsonl.gz, from which studies.report makes the findings.
"""
import fnmatch
import gzip
import json
import math
import signal
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from runtime.flags import Parser, number
from runtime.start import run_program

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
FILES = ("train_data", "validation_data", "eval_data")      # flags that name records


def load_grids() -> list[dict]:
    """[{"grid", "study", "flags", "world"}], in the order in which they are run. world: quickstart/make.py's
    arguments, or none. In the file, a grid has the flags of the bases that it is like, and its own."""
    file = json.loads((HERE / "grids.json").read_text())
    for grid in file["grids"]:
        parts = [*(file["bases"][base] for base in grid["like"]), grid.get("flags", {})]
        grid["flags"] = {name: value for part in parts for name, value in part.items()}
    return file["grids"]


def make_world(arguments: dict[str, object], folder: Path) -> Path:
    """Records of the invented world with these arguments of quickstart/make.py; made once."""
    out = folder / "-".join(f"{name}-{value}" for name, value in arguments.items())
    if not (out / "test.jsonl").is_file():
        flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
        subprocess.run([sys.executable, str(REPOSITORY / "quickstart/make.py"), "--records-only",
                        "--overwrite", "--output-dir", str(out), *flags], check=True,
                       stdout=subprocess.DEVNULL)
    return out


def study_flags(grid: dict, model: Path | None, records: Path | None, out: Path) -> dict[str, object]:
    """The flags of eval.study as its --config takes them. ValueError if the grid needs --model, --records."""
    if "world" in grid:
        model, records = REPOSITORY / "quickstart/model", make_world(grid["world"], out / "worlds")
    if not model or not records:
        raise ValueError(f"{grid['grid']}: needs --model and --records")
    flags = {"model": str(model), "output_dir": str(out / grid["study"])} | grid["flags"]
    for name in FILES:
        value = flags[name]
        flags[name] = ([f"{records}/{each}.jsonl" for each in value] if isinstance(value, list)
                       else f"{records}/{value}.jsonl")
    return flags


def publish(out: Path, target: Path) -> None:
    """Copy each study's runs.jsonl; the same runs give the same bytes."""
    target.mkdir(parents=True, exist_ok=True)
    for study in dict.fromkeys(grid["study"] for grid in load_grids()):
        runs = out / study / "runs.jsonl"
        if runs.is_file() and runs.stat().st_size:
            (target / f"{study}.jsonl.gz").write_bytes(gzip.compress(runs.read_bytes(), mtime=0))


def wait_for(command: list[str]) -> int:
    """Run a command. Returns its exit status. When it is stopped it saves and reports, so it is waited for.
    Ctrl-C reaches it, too; SIGTERM is passed on."""
    stopped = 0
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                stopped = 128 + signal.SIGINT
            except SystemExit as stop:
                stopped = stop.code
                process.terminate()
    return max(process.returncode, stopped) if stopped else process.returncode


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m studies.run", description=__doc__, allow_abbrev=False,
                    formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="*", metavar="GRID", help="names or patterns (default: all)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="SmolLM2-135M-Instruct's checkpoint")
    parser.add_argument("--records", type=Path, metavar="DIR", help="what studies.prepare wrote")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="RUNS")
    parser.add_argument("--publish", type=Path, metavar="DIR")
    parser.add_argument("--jobs", type=number(int, 1), default=1, help="runs at the same time")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--deadline", type=number(float, 1), default=math.inf,
                        help="seconds after which no run is started")
    args = parser.parse_args(argv)
    grids = [grid for grid in load_grids()
             if not args.grids or any(fnmatch.fnmatch(grid["grid"], pattern) for pattern in args.grids)]
    if not grids:
        raise ValueError(f"{' '.join(args.grids)}: no such grid; grids.json has "
                         + ", ".join(grid["grid"] for grid in load_grids()))
    started, status = time.monotonic(), 0
    for grid in grids:
        left = args.deadline - (time.monotonic() - started)
        if left <= 0 or status >= 128:
            break
        config = args.output_dir / f"{grid['grid']}.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        flags = study_flags(grid, args.model, args.records, args.output_dir.resolve())
        flags |= {"jobs": args.jobs, "device": args.device, "deadline": 0 if math.isinf(left) else left}
        config.write_text(json.dumps(flags, indent=2))
        print(f"== {grid['grid']}", flush=True)
        code = wait_for([sys.executable, "-m", "eval.study", "--config", str(config)])
        # Below 0: minus the number of the signal that killed it.
        status = max(status, 128 - code if code < 0 else code)
    if args.publish:
        publish(args.output_dir, args.publish)
    return status


if __name__ == "__main__":
    run_program(main)
