"""Soak: small trainings that are killed, stopped, spoiled and starved of disk must end in the same bits.

    python -m bench.faults [--runs 12] [--seed 0] [--ranks 1 2] [--folder DIR]

Trains the embedded default's model for a few steps in fp32, with a checkpoint every second step, under torchrun
--max-restarts, with DDP and --shard. Runs take turns in what happens to them, at moments drawn from --seed:

  kill       one to three times a rank is killed (SIGKILL) at any moment from its start on
  kill write the same, when a checkpoint, the token cache or final/ is just being written
  terminate  the whole job is asked to stop (SIGTERM), and started again
  flip       the whole job is killed, and one bit of a file of the newest of its checkpoints is flipped
  truncate   ... or the file is cut short
  disk full  the disk with output and token cache fills up; space is made when the job has given up. A small
             tmpfs, so that this needs root; else left out

Then the same command is given until training is finished. identical: final/model.safetensors has the same bytes
as that of an undisturbed run of the same mode and ranks, and metrics.jsonl and eval.jsonl have the same losses,
each step once. weights, log: these or those differ. lost: not finished after --attempts commands, or after one
that hangs. restarts: starts of rank 0 after the first, torchrun's own included. Each run has a folder and a
token cache of its own. The last line printed is one JSON object. Linux only.
"""
import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.common import REPOSITORY, hardware, print_table

CAUSES = ("kill", "kill write", "terminate", "flip", "truncate", "disk full")
QUICKSTART = REPOSITORY / "quickstart"
DISK = 80 * 2**20       # bytes of the small disk: three checkpoints of 15 MB, final/ and the token cache


class Job:
    """A command of torchrun on train.py, its output appended to HOME/log."""

    def __init__(self, args: argparse.Namespace, home: Path, mode: str, ranks: int) -> None:
        self.home, self.log = home, home.parent / f"{home.name}.log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3",
                   "--nproc-per-node", str(ranks), str(REPOSITORY / "train.py"),
                   "--model", QUICKSTART / "model", "--train-data", args.folder / "train.jsonl",
                   "--eval-data", args.folder / "test.jsonl", "--output-dir", home / "out",
                   "--cache-dir", home / "cache", "--max-length", "256", "--batch-size", "8",
                   "--micro-batch-tokens", "512", "--max-steps", str(args.steps), "--save-every", "2",
                   "--eval-every", "5", "--lr", "1e-3", "--dtype", "fp32", "--save-dtype", "fp32", "--device",
                   "cpu", *(["--shard"] if mode == "shard" else [])]
        self.began = time.monotonic()
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log,
                                            env={**os.environ, "OMP_NUM_THREADS": "1"})

    def running(self) -> bool:
        return self.process.poll() is None

    def ranks(self) -> list[int]:
        """Process ids of the ranks that live now."""
        found = []
        for file in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            try:
                children = file.read_text().split()
                found += [int(pid) for pid in children
                          if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            except OSError:
                continue    # it ended while we looked
        return found

    def wait_until(self, ready) -> bool:
        """False if the job ends first."""
        while self.running():
            if ready():
                return True
            time.sleep(0.002)
        return False

    def kill(self) -> None:
        """The launcher first, so that it starts no rank anew."""
        ranks = self.ranks()
        self.process.kill()
        self.process.wait()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def finish(self, timeout: float) -> bool:
        """Wait for its end; False if it had to be killed."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        return True


def finished(home: Path) -> bool:
    return (home / "out" / "final").is_dir()


def outcome(home: Path) -> tuple[str, list]:
    """A hash of the final weights, and what the logs say of each step."""
    weights = hashlib.sha256((home / "out/final/model.safetensors").read_bytes()).hexdigest()
    metrics, evaluations = ([json.loads(line) for line in (home / "out" / name).read_text().splitlines()]
                            for name in ("metrics.jsonl", "eval.jsonl"))
    return weights, [[(line["step"], line["loss"]) for line in metrics], evaluations]


def writing(home: Path) -> bool:
    """Whether token cache, final/ or a checkpoint is being written now."""
    return any(any(home.glob(pattern)) for pattern in ("*/*.part", "out/checkpoints/*.part"))


def strike(job: Job, cause: str, rng: random.Random, seconds: float) -> None:
    """Do to a running job what `cause` says; seconds: how long it takes undisturbed."""
    def at_any_moment() -> bool:
        moment = time.monotonic() + rng.uniform(0, seconds)
        return job.wait_until(lambda: time.monotonic() >= moment and job.ranks())

    if cause in ("kill", "kill write"):
        for _ in range(rng.randint(1, 3)):
            if at_any_moment() and (cause == "kill" or job.wait_until(lambda: writing(job.home))):
                time.sleep(rng.uniform(0, 0.05) if cause == "kill write" else 0)
                if ranks := job.ranks():
                    os.kill(rng.choice(ranks), signal.SIGKILL)
    elif cause == "terminate":
        if at_any_moment():
            job.process.terminate()
    elif cause in ("flip", "truncate"):
        def whole() -> list[Path]:
            return sorted(p for p in job.home.glob("out/checkpoints/step-*") if p.suffix != ".part")

        # With one checkpoint alone a damaged one would have to be refused: the second must be there.
        if at_any_moment() and job.wait_until(lambda: len(whole()) > 1):
            job.kill()
            damage(rng.choice(sorted(whole()[-1].iterdir())), cause, rng)
    elif at_any_moment():
        with open(job.home / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(4096)):   # until there is no space left
                continue


def damage(file: Path, cause: str, rng: random.Random) -> None:
    place = rng.randrange(file.stat().st_size)
    with open(file, "r+b") as opened:
        if cause == "truncate":
            opened.truncate(place)
            return
        opened.seek(place)
        byte = opened.read(1)[0] ^ 1 << rng.randrange(8)
        opened.seek(place)
        opened.write(bytes([byte]))


def small_disk(home: Path) -> bool:
    """Mount one at home; False if that is not allowed here."""
    home.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", home], capture_output=True)
    return done.returncode == 0


def one_run(args: argparse.Namespace, name: str, cause: str, mode: str, ranks: int, seed: int,
            undisturbed: dict | None) -> dict:
    """Train until finished: {"seconds", "commands", "restarts", "weights", "log"}; weights is None if lost."""
    home, rng, timeout = args.folder / name, random.Random(seed), 600.0
    if undisturbed:
        timeout = 60 + 10 * undisturbed["seconds"]
    began = time.monotonic()
    for attempt in range(args.attempts):
        job = Job(args, home, mode, ranks)
        if undisturbed and attempt == 0:
            strike(job, cause, rng, undisturbed["seconds"])
        ended = job.finish(timeout)
        (home / "ballast").unlink(missing_ok=True)
        if finished(home) or not ended:
            break
    result = {"seconds": time.monotonic() - began, "commands": attempt + 1, "hung": not ended,
              "restarts": ("\n" + job.log.read_text(errors="replace")).count("\nconfiguration\n") - 1, "weights": None}
    if finished(home) and ended:
        result["weights"], result["log"] = outcome(home)
    return result


def verdict(run: dict, undisturbed: dict) -> str:
    if run["weights"] is None:
        return "lost"
    differ = [name for name in ("weights", "log") if run[name] != undisturbed[name]]
    return " and ".join(differ) + " differ" if differ else "identical"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--attempts", type=int, default=5, help="commands until a run counts as lost")
    parser.add_argument("--causes", nargs="+", choices=CAUSES, default=list(CAUSES))
    parser.add_argument("--folder", type=Path, help="keep the runs here; default: none is kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        args.folder = (args.folder or Path(temporary)).resolve()
        args.folder.mkdir(parents=True, exist_ok=True)
        soak(args)


def soak(args: argparse.Namespace) -> None:
    for name, records in (("train", 60), ("test", 12)):
        lines = (QUICKSTART / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (args.folder / f"{name}.jsonl").write_text("".join(lines[:records]))
    machine, rng = hardware(), random.Random(args.seed)
    print(f"{machine['cpu']}, torch {machine['versions'].get('torch')}")
    widths = [12, 7, 7, 10, 10, 9, 24]
    print_table(["cause", "mode", "ranks", "commands", "restarts", "seconds", "final weights and log"], [],
                widths)
    modes = [(mode, ranks) for ranks in args.ranks for mode in ("ddp", "shard") if ranks > 1 or mode == "ddp"]
    undisturbed: dict[tuple[str, int], dict] = {}
    runs = []
    for i in range(args.runs):
        cause, (mode, ranks), seed = args.causes[i % len(args.causes)], rng.choice(modes), rng.random()
        if (mode, ranks) not in undisturbed:
            run = one_run(args, f"{mode}-{ranks}", "none", mode, ranks, 0, None)
            if run["weights"] is None:
                raise RuntimeError(f"the undisturbed run does not finish: {args.folder}/{mode}-{ranks}.log")
            undisturbed[mode, ranks] = run
        name, mounted = f"run-{i:03d}", False
        if cause == "disk full" and not (mounted := small_disk(args.folder / name)):
            print(f"{cause:<{widths[0]}} skipped: mounting a tmpfs is not allowed here")
            continue
        try:
            run = one_run(args, name, cause, mode, ranks, seed, undisturbed[mode, ranks])
        finally:
            if mounted:
                subprocess.run(["umount", args.folder / name], check=True)
        run.update(run=i, cause=cause, mode=mode, ranks=ranks, verdict=verdict(run, undisturbed[mode, ranks]))
        runs.append({key: value for key, value in run.items() if key != "log"})
        print_table([cause, mode, str(ranks), str(run["commands"]), str(run["restarts"]),
                     f"{run['seconds']:.0f}", run["verdict"]], [], widths)
    print(json.dumps({"hardware": machine, "seed": args.seed, "steps": args.steps, "runs": runs}))


if __name__ == "__main__":
    main()
