"""The folder of a run: whose it is, where to go on, and its logs.

    OUTPUT/.lock                who writes here; locked for as long as that process lives
    OUTPUT/identity.json        all that must be the same to go on: flags that matter, data, model, template
    OUTPUT/run_config.json      every flag
    OUTPUT/metrics.jsonl, eval.jsonl, checkpoints/, final/

Only rank 0 writes here. Nothing is touched before it is known that this run may.
"""
import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from checkpoint import check_files, find_checkpoints, newest_whole, read_state, unfinished_checkpoints
from files import lock, write_text, writing
from ranks import from_all

OURS = ("run_config.json", "identity.json", "metrics.jsonl", "eval.jsonl", "checkpoints", "final")


class Start(NamedTuple):
    """resume: the checkpoint to go on from, if any; finished: there is nothing left to do."""
    resume: Path | None = None
    finished: bool = False


# ---------------------------------------------------------------- logs


def append_line(path: Path, record: dict) -> None:
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def keep_lines(path: Path, last_step: int) -> None:
    """Cut a .jsonl file back to the lines up to last_step, so that a resumed run writes each step once."""
    if path.is_file():
        lines = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
                if json.loads(line)["step"] <= last_step:
                    lines.append(line + "\n")
        write_text(path, "".join(lines))


# ---------------------------------------------------------------- whose it is


def launch() -> str:
    """The same for a process and for those that torchrun starts in its place; it tells a reader where."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"host {socket.gethostname()}, started by process {os.getppid()} {run}".rstrip()


def started_again(out: Path) -> bool:
    """Whether torchrun started this process in the place of one that had made the folder its own. (What
    torchrun says of restarts, each machine counts for itself.)"""
    owner = out / ".lock"
    return "TORCHELASTIC_RUN_ID" in os.environ and owner.is_file() and owner.read_text() == launch()


def check_identity(old: dict, new: dict, where: str, fix: str) -> None:
    differ = [f"{name} was {old.get(name)}, is {new.get(name)}" for name in sorted({*old, *new})
              if old.get(name) != new.get(name)]
    if differ:
        raise ValueError(f"{where}: was started differently ({'; '.join(differ)}); {fix}")


def check_ranks(out: Path, identity: dict, going_on: bool) -> None:
    """All ranks call: ValueError on all if they were not given the same, as where machines have unlike copies
    of the data; or if the run would go on from its newest checkpoint, which rank 0 does not see."""
    known = find_checkpoints(out) if going_on else []
    everyone = from_all((socket.gethostname(), identity, known[-1].name if known else ""))
    host, first, newest = everyone[0]
    for rank, (other, theirs, saved) in enumerate(everyone):
        if differ := [f"{name} ({theirs.get(name)}, not {first[name]})" for name in first
                      if first[name] != theirs.get(name)]:
            raise ValueError(f"rank {rank} on {other} and rank 0 on {host} differ in {', '.join(differ)}: "
                             "give every machine the same files, flags and versions")
        if saved > newest:
            raise ValueError(f"--output-dir {out}: {saved} is on {other} (rank {rank}), but not on {host}, "
                             "where rank 0 is and would start anew; copy it there, or use a folder that all "
                             "machines see")


def saved_date(out: Path, anew: bool) -> str:
    """The date that a run in this folder was started with, so that one resumed tomorrow trains on the same
    text; empty if there is none, or `anew` and torchrun did not start this process again."""
    file = out / "run_config.json"
    if not file.is_file() or (anew and not started_again(out)):
        return ""
    return json.loads(file.read_text()).get("date", "")


def claim(out: Path, identity: dict, settings: dict, resume: str, overwrite: bool, model_folder: Path,
          say: Callable[[str], None]) -> Start:
    """Make OUTPUT this run's. identity: what must be the same to go on; settings: every flag; resume: auto,
    never or a checkpoint's folder. ValueError where going on or writing would be wrong, or another process
    writes there."""
    fix = "give another --output-dir, or --overwrite to start anew"
    if model_folder.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--output-dir {out}: holds the --model itself, {model_folder}; give another folder")
    if started_again(out):
        say("started again by torchrun")
        # The lock was taken when the run began: an older final/ is another run's.
        if (final := out / "final").is_dir() and final.stat().st_mtime >= (out / ".lock").stat().st_mtime:
            return Start(finished=True)
        overwrite, resume = False, "auto" if resume == "never" or find_checkpoints(out) else resume
    named = Path(resume) if resume not in ("auto", "never") else None
    there = out.is_dir() and any(path.name != ".lock" for path in out.iterdir())
    if named:
        check_files(named)
        check_identity(read_state(named)["identity"], identity, f"--resume {named}",
                       "give the flags it was started with")
    elif there and not overwrite:
        if not (out / "identity.json").is_file():
            raise ValueError(f"--output-dir {out}: is not empty and holds no run of this trainer; {fix}")
        if (out / "final").is_dir():
            raise ValueError(f"--output-dir {out}: holds a finished run; {fix}")
        if resume == "never":
            raise ValueError(f"--output-dir {out}: holds an interrupted run and --resume is never; {fix}")
        check_identity(json.loads((out / "identity.json").read_text()), identity, f"--output-dir {out}", fix)

    out.mkdir(parents=True, exist_ok=True)
    try:
        if not lock(out / ".lock", launch()):
            say(f"warning: {out}/.lock cannot be locked here; see to it that no other run writes there")
    except ValueError as error:
        raise ValueError(f"--output-dir {out}: {error}; wait for its end, or give another folder") from None

    if there and overwrite and not named:
        for path in (out / name for name in OURS):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif there and not named:
        for part in unfinished_checkpoints(out):
            say(f"{part.name} was not written to its end and is ignored")
            shutil.rmtree(part)
        named = newest_whole(out, say)
        if named is None:
            say(f"{out}: interrupted before its first checkpoint; starting again")
            keep_lines(out / "metrics.jsonl", 0)
            keep_lines(out / "eval.jsonl", -1)
    if named:
        step = read_state(named)["step"]
        keep_lines(out / "metrics.jsonl", step)
        keep_lines(out / "eval.jsonl", step)
        say(f"resuming after step {step} from {named}")
    write_text(out / "identity.json", json.dumps(identity, indent=2))
    write_text(out / "run_config.json", json.dumps(settings, indent=2))
    return Start(named)
