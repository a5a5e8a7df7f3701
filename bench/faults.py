"""Soak test: small trainings that are killed, stopped, damaged and starved of disk must end with equal bits.

    python -m bench.faults [--runs 12] [--seed 0] [--ranks 1 2] [--folder DIR]

Trains the embedded default's model for a few steps in fp32 with a checkpoint every second step, under
torchrun --max-restarts 3, with DDP and --shard. The causes take turns, at moments drawn from --seed:

  kill        one to three times, a rank is killed (SIGKILL) at any moment after its start
  kill write  the same, while a checkpoint, the token cache or final/ is being written
  terminate   the whole job is asked to stop (SIGTERM)
  flip        the whole job is killed, and one bit of a file of its newest checkpoint is flipped
  truncate    the same, but the file is cut short
  flip cache  the same, but with a file of the token cache
  disk full   the disk of output and token cache fills up until the job has given up. It is a small tmpfs;
              left out where mounting one is not allowed

The same command is then repeated until training is finished. identical: final/model.safetensors has the bytes
of an undisturbed run of the same mode and ranks, and metrics.jsonl and eval.jsonl have its losses, each step
once; otherwise, what differs. lost: not finished after --attempts commands. hung: a command took longer than
--timeout seconds. faults: how often the cause struck; 0 if training ended before. restarts: torchrun's own.
The last two lines printed are a summary and one JSON object. Linux only.
"""
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.common import REPOSITORY, hardware, make_parser, print_machine, print_table, read_lines, start
from runtime.flags import number
from runtime.start import run_program

CAUSES = ("kill", "kill write", "terminate", "flip", "truncate", "flip cache", "disk full")
QUICKSTART = REPOSITORY / "quickstart"
DISK = 80 * 2**20       # bytes of the small disk: three checkpoints of 14 MB, final/, token cache


class Job:
    """A command of torchrun on train.py that writes to HOME and appends what it prints to HOME.log."""

    def __init__(self, args: Namespace, home: Path, mode: str, ranks: int) -> None:
        self.home, self.log = home, Path(f"{home}.log")
        command = f"""--max-length 256 --batch-size 8 --micro-batch-tokens 512 --max-steps {args.steps}
            --save-every 2 --eval-every 5 --lr 1e-3 --dtype fp32 --save-dtype fp32 --device cpu"""
        paths = {"model": QUICKSTART / "model", "train-data": args.folder / "train.jsonl",
                 "eval-data": args.folder / "test.jsonl", "output-dir": home / "out",
                 "cache-dir": home / "cache"}
        words = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "3", "--nproc-per-node",
                 str(ranks), str(REPOSITORY / "train.py"), *command.split(), *["--shard"] * (mode == "shard"),
                 *(str(word) for name, path in paths.items() for word in (f"--{name}", path))]
        # At LOGLEVEL INFO torchrun says when it restarts the ranks.
        with open(self.log, "a") as log:
            self.process = start(words, 1, log, LOGLEVEL="INFO")

    def ranks(self) -> list[int]:
        """Process ids of the running ranks."""
        running = []
        # One may end between being listed and being read.
        with contextlib.suppress(OSError):
            for file in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
                running += [int(pid) for pid in file.read_text().split()
                            if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return running

    def wait_until(self, ready: Callable[[], bool]) -> bool:
        """False if the job ends first."""
        while self.process.poll() is None:
            if ready():
                return True
            time.sleep(0.002)
        return False

    def kill(self) -> None:
        """The launcher first, so that it does not restart the ranks."""
        ranks = self.ranks()
        self.process.kill()
        self.process.wait()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def checkpoints(home: Path) -> list[Path]:
    return sorted(p for p in home.glob("out/checkpoints/step-*") if p.suffix != ".part")


def writing(home: Path) -> bool:
    return any(any(home.glob(pattern)) for pattern in ("*/*.part", "out/checkpoints/*.part"))


def strike(job: Job, cause: str, rng: random.Random, steps: int) -> int:
    """Do to a running job what `cause` says. Returns how often that was done: 0 if the job ended before. A
    moment is given as a step, because the speed of a machine drifts; a fifth of them lie before step 0."""
    def lines() -> int:
        file = job.home / "out/metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def wait(ready: Callable[[], object]) -> bool:
        """For a random moment, then until ready. False if the job ended meanwhile."""
        step = rng.randrange(-steps // 4, steps)
        # Seconds after that step, or after the start, which takes about 4.
        later = rng.uniform(0, 0.2 if step > lines() else 4)
        if not (job.wait_until(lambda: lines() >= step) and job.wait_until(job.ranks)):
            return False
        moment = time.monotonic() + later
        return job.wait_until(lambda: time.monotonic() >= moment) and job.wait_until(ready)

    done = 0
    if cause.startswith("kill"):
        for _ in range(rng.randint(1, 3)):
            if wait(job.ranks if cause == "kill" else lambda: writing(job.home)):
                time.sleep(rng.uniform(0, 0.03) if cause == "kill write" else 0)
                for pid in rng.sample(ranks := sorted(job.ranks()), min(1, len(ranks))):
                    os.kill(pid, signal.SIGKILL)
                    done += 1
    elif cause == "terminate" and (done := int(wait(job.ranks))):
        job.process.terminate()
    elif cause == "disk full" and (done := int(wait(job.ranks))):
        with open(job.home / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            # Until no space is left.
            while ballast.write(bytes(4096)):
                continue
    # A job whose only checkpoint is damaged is refused, as it should be: so wait for the second.
    elif cause in ("flip", "truncate", "flip cache") and (
            done := int(wait(lambda: len(checkpoints(job.home)) > 1))):
        job.kill()
        files = job.home.glob("cache/*/*") if cause == "flip cache" else checkpoints(job.home)[-1].iterdir()
        damage(rng.choice(sorted(files)), cause, rng)
    return done


def damage(file: Path, cause: str, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    place = rng.randrange(len(data))
    if cause == "truncate":
        del data[place:]
    else:
        data[place] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def train(args: Namespace, name: str, cause: str, mode: str, ranks: int, seed: float = 0) -> dict:
    """Train until finished, disturbed by the cause: {"faults": how often, "seconds", "commands", "restarts",
    "weights": a hash, "log": what the .jsonl files say of steps}, the last two None if lost."""
    home, began, faults = args.folder / name, time.monotonic(), 0
    for attempt in range(args.attempts):
        job = Job(args, home, mode, ranks)
        try:
            if attempt == 0:
                faults = strike(job, cause, random.Random(seed), args.steps)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(args.timeout)
            hung = job.process.poll() is None
        finally:
            job.kill()
        (home / "ballast").unlink(missing_ok=True)
        if hung or (home / "out/final").is_dir():
            break
    result = {"faults": faults, "seconds": time.monotonic() - began, "commands": attempt + 1,
              "hung": hung, "weights": None, "log": None,
              "restarts": job.log.read_text(errors="replace").count("will restart worker group")}
    if not hung and (home / "out/final").is_dir():
        result["weights"] = hashlib.sha256((home / "out/final/model.safetensors").read_bytes()).hexdigest()
        steps = read_lines(home / "out/metrics.jsonl")
        result["log"] = ([(line["step"], line["loss"]) for line in steps],
                         read_lines(home / "out/eval.jsonl"))
    return result


def disturbed(args: Namespace, name: str, cause: str, mode: str, ranks: int, seed: float,
              undisturbed: dict) -> dict | None:
    """train(), with the key "ends": how it ended. None if the cause is not possible on this machine."""
    home = args.folder / name
    home.mkdir()
    if cause == "disk full" and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", home],
                                               capture_output=True).returncode:
        return None
    try:
        run = train(args, name, cause, mode, ranks, seed)
    finally:
        if cause == "disk full":
            subprocess.run(["umount", home], check=True)
    differ = [what for what in ("weights", "log") if run[what] != undisturbed[what]]
    run["ends"] = " and ".join(differ) + " differ" if differ else "identical"
    if run["weights"] is None:
        run["ends"] = "hung" if run["hung"] else "lost"
    del run["log"]
    return {"cause": cause, "mode": mode, "ranks": ranks, **run}


def soak(args: Namespace) -> None:
    for name, count in (("train", 60), ("test", 12)):
        lines = (QUICKSTART / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (args.folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    machine, rng = hardware(), random.Random(args.seed)
    modes = [(mode, ranks) for ranks in args.ranks for mode in ("ddp", "shard") if ranks > 1 or mode == "ddp"]
    undisturbed: dict[tuple[str, int], dict] = {}
    runs, widths = [], [11, 6, 6, 7, 9, 9, 8, 24]
    print_machine(machine, machine["cores"])
    print_table(["cause", "mode", "ranks", "faults", "commands", "restarts", "seconds", "ends"], [], widths)
    for i in range(args.runs):
        cause, key, seed = args.causes[i % len(args.causes)], rng.choice(modes), rng.random()
        if key not in undisturbed:
            undisturbed[key] = train(args, "-".join(map(str, key)), "none", *key)
            if undisturbed[key]["weights"] is None:
                log = Path(f"{args.folder}/{key[0]}-{key[1]}.log").read_text(errors="replace")
                how = f"took over --timeout {args.timeout:g}" if undisturbed[key]["hung"] else "failed"
                raise ValueError(f"an undisturbed run {how}:\n{log.strip()[-2000:]}")
        if (run := disturbed(args, f"run-{i:03d}", cause, *key, seed, undisturbed[key])) is None:
            print(f"{cause:<{widths[0]}} left out: mounting a tmpfs is not allowed here")
            continue
        runs.append(run)
        print_table([cause, key[0], str(key[1]), str(run["faults"]), str(run["commands"]),
                     str(run["restarts"]), f"{run['seconds']:.0f}", run["ends"]], [], widths)
    ends = Counter(run["ends"] for run in runs)
    print(f"{len(runs)} runs, {sum(run['faults'] for run in runs)} faults, "
          f"{sum(run['restarts'] for run in runs)} restarts: "
          + ", ".join(f"{count} {end}" for end, count in ends.most_common()))
    print(json.dumps({"hardware": machine, "seed": args.seed, "steps": args.steps, "runs": runs}))


def main(argv: list[str]) -> None:
    parser = make_parser("faults", __doc__)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--causes", nargs="+", choices=CAUSES, default=list(CAUSES))
    parser.add_argument("--attempts", type=int, default=5, help="commands until a run counts as lost")
    parser.add_argument("--timeout", type=number(float, 1), default=180,
                        help="seconds until a command counts as hung")
    parser.add_argument("--folder", type=Path, help="an empty one, to keep the runs in")
    args = parser.parse_args(argv)
    if args.folder and args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise ValueError(f"--folder {args.folder}: is not an empty folder; give another")
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        args.folder = (args.folder or Path(temporary)).resolve()
        args.folder.mkdir(parents=True, exist_ok=True)
        soak(args)


if __name__ == "__main__":
    run_program(main)
