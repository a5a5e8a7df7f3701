"""The folder of a run: whose it is, where to resume, and its logs.

    OUTPUT/.lock                who writes here; locked for as long as that process lives
    OUTPUT/identity.json        all that must be the same to resume: flags that matter, data, model, template;
                                which launch wrote it, and after how many steps the run was finished
    OUTPUT/run_config.json      every flag
    OUTPUT/metrics.jsonl, eval.jsonl, checkpoints/, final/

Only rank 0 writes here. Nothing is touched before it is known that this run may.
"""
import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from runtime.checkpoint import check_files, find_checkpoints, newest_whole, read_state, unfinished_checkpoints
from runtime.distributed import from_all
from runtime.files import lock, read_json, write_text, writing
from runtime.flags import flag_name

# In the order in which they are deleted: as long as identity.json is there, the rest is known to be a run's.
RUN_FILES = ("run_config.json", "metrics.jsonl", "eval.jsonl", "checkpoints", "final", "identity.json")
# These may differ on resume, if the steps already trained had the same learning rates under both.
LENGTH = ("epochs", "max_steps", "warmup_ratio")


class Start(NamedTuple):
    """resume: the checkpoint to start from, if any; evaluated: eval.jsonl has an evaluation before that;
    finished: there is nothing left to do."""
    resume: Path | None = None
    evaluated: bool = False
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


# ---------------------------------------------------------------- what must be the same


def check_identity(old: dict, new: dict, settings: dict, where: str, fix: str, skip: tuple = ()) -> None:
    """ValueError that names every flag and file in which two runs differ. old: the identity that was saved;
    new: of this run, or a part of it; settings: this run's flags; skip: names that may differ."""
    files = settings["train_data"]
    # what a hash stands for, in words
    words = {"model": f"--model {settings['model']}: other weights or another config.json",
             "tokenizer": f"--model {settings['model']}: another tokenizer",
             "template": f"--template {settings['template']}: its text has changed",
             "tokens": "the same records give other tokens (data.py or a library has changed)"}
    differ = []
    for name in sorted(new.keys() - {*skip}):
        was, now = old.get(name), new[name]
        if was == now:
            continue
        if name == "train_data" and isinstance(was, list) and len(was) == len(now):
            changed = [str(file) for file, a, b in zip(files, was, now) if a != b]
            differ.append(f"--train-data {' '.join(changed)}: other contents")
        elif name == "train_data":
            differ.append(f"--train-data: {len(now)} file(s), not those of before")
        else:
            was, now = ("not given" if value is None else value for value in (was, now))
            differ.append(words.get(name, f"{flag_name(name)} was {was}, is {now}"))
    if differ:
        raise ValueError(f"{where}: was started differently ({'; '.join(differ)}); {fix}")


def check_ranks(out: Path, identity: dict, resuming: bool) -> None:
    """All ranks call: ValueError on all if they were not given the same, as where machines have unlike copies
    of the data; or if the run would resume from its newest checkpoint, which rank 0 does not see."""
    known = find_checkpoints(out) if resuming else []
    everyone = from_all((socket.gethostname(), identity, known[-1].name if known else ""))
    host, first, newest = everyone[0]
    for rank, (other, theirs, saved) in enumerate(everyone):
        if differ := [f"{name} ({theirs.get(name)}, not {first[name]})" for name in first
                      if first[name] != theirs.get(name)]:
            raise ValueError(f"rank {rank} on {other} and rank 0 on {host} differ in {', '.join(differ)}: "
                             "give every machine the same files, flags and versions")
        if saved > newest:
            raise ValueError(f"--output-dir {out}: {saved} is on {other} (rank {rank}), but not on {host}, "
                             "where rank 0 is and would start from scratch; copy it there, or use a folder "
                             "that all machines see")


# ---------------------------------------------------------------- ownership


def launch() -> str:
    """The same for a process and for those that torchrun starts in its place, and for no others. The number
    of the parent process may come again, as in a container; its start since the host's boot does not."""
    parent = os.getppid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]   # ticks since boot
    except OSError:     # not Linux
        boot = ""
        started = subprocess.run(["ps", "-o", "lstart=", "-p", str(parent)], capture_output=True,
                                 text=True).stdout.strip()
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"host {socket.gethostname()}, started by process {parent} of {started} {boot} {run}".rstrip()


def restarted(out: Path, identity: dict) -> bool:
    """Whether torchrun started this process in place of one that had begun this run in the folder. (Each
    machine has its own count of torchrun's restarts, so that does not tell.) identity: as far as it is known;
    host and process may be alike by chance."""
    old = read_json(out / "identity.json")
    return "TORCHELASTIC_RUN_ID" in os.environ and old == old | identity | {"launch": launch()}


def saved_date(out: Path, from_scratch: bool) -> str:
    """The date that a run in this folder was started with, so that one resumed tomorrow trains on the same
    text; empty if there is none, or the run starts from scratch and torchrun did not restart it."""
    if not (out / "identity.json").is_file() or (from_scratch and not restarted(out, {})):
        return ""
    return read_json(out / "run_config.json").get("date", "")


def check_folder(out: Path, identity: dict, settings: dict, model_folder: Path) -> str:
    """What there is to do in OUTPUT, which is only looked at: "start" from scratch, "delete" a run first,
    "resume" one, or nothing, as one is "finished". identity: as far as it is known yet; settings: every flag.
    ValueError where resuming or writing would be wrong."""
    fix = "give another --output-dir, or --overwrite to delete it and start from scratch"
    resume, overwrite = settings["resume"], settings["overwrite"]
    if model_folder.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--output-dir {out}: holds the --model itself, {model_folder}; give another folder")
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--output-dir {out}: {existing} is not a writable folder; give another")
    # A full disk may leave these before there is an identity.
    present = set(os.listdir(out) if out.is_dir() else ()) - {
        ".lock", "identity.json.part", "run_config.json.part"}
    try:
        old = read_json(out / "identity.json")
    except ValueError as error:
        raise ValueError(f"--output-dir {out}: {error}; give another --output-dir, or delete it") from None
    finished = "finished_after" in old and (out / "final").is_dir()
    metrics = out / "metrics.jsonl"
    trained = any((bool(find_checkpoints(out)), (out / "final").is_dir(),
                   metrics.is_file() and metrics.stat().st_size > 0))

    if restarted(out, identity):    # torchrun must not delete what its own run has trained
        if finished:
            return "finished"
        overwrite, resume = False, "auto" if resume == "never" else resume
    # Other programs have files of these names too; only identity.json, by its content, says whose they are.
    if "launch" not in old and present and not (overwrite and present.isdisjoint(
            name for run_file in RUN_FILES for name in (run_file, f"{run_file}.part"))):
        raise ValueError(f"--output-dir {out}: is not empty and is not a run folder; give another, "
                         "or delete it")
    if resume not in ("auto", "never") and (overwrite or not _begun_from(out, resume)):
        named = Path(resume)
        if overwrite and named.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--overwrite would delete --resume {named}; give another --output-dir")
        if saved := find_checkpoints(named):
            raise ValueError(f"--resume {named}: is the folder of a run; name one of its checkpoints, such "
                             f"as {saved[-1]}, or resume it with --output-dir {named}")
        try:
            state = read_state(named)
        except ValueError as error:
            raise ValueError(f"--resume {error}; name one like RUN/checkpoints/step-00000100") from None
        check_identity(state["identity"], identity, settings, f"--resume {named}",
                       "give the flags it was started with", LENGTH)
    if overwrite:
        return "delete" if trained else "start"
    if not trained:     # a run that ended before its first step owns nothing
        return "start"
    check_identity(old, identity, settings, f"--output-dir {out}", fix, LENGTH)
    if finished and all(old.get(name) == identity[name] for name in LENGTH):
        raise ValueError(f"--output-dir {out}: holds a finished run; {fix}")
    if "finished_after" in old and not finished:
        raise ValueError(f"--output-dir {out}: holds a finished run whose final/ is gone; {fix}")
    if resume == "never":
        raise ValueError(f"--output-dir {out}: holds a run and --resume is never; {fix}")
    return "resume"


def _begun_from(out: Path, checkpoint: str) -> bool:
    """Whether the run in OUTPUT was begun with --resume CHECKPOINT, and has checkpoints of its own since."""
    before = read_json(out / "run_config.json").get("resume", "")
    return Path(before).resolve() == Path(checkpoint).resolve() and bool(find_checkpoints(out))


def claim(out: Path, identity: dict, settings: dict, model_folder: Path, room: int,
          other_length: Callable[[dict, int], str], say: Callable[[str], None]) -> Start:
    """Make OUTPUT this run's. identity: what must be the same to resume; settings: every flag; room: bytes
    that the run will write; other_length(identity, n): why the first n steps of a run with that identity, of
    another length, are not the first n of this one, or "". ValueError as check_folder(), or if another
    process writes there."""
    todo = check_folder(out, identity, settings, model_folder)
    if restarted(out, identity):
        say("started again by torchrun")
    if todo == "finished":
        return Start(finished=True)
    own = find_checkpoints(out) if todo == "resume" else []     # checkpoints
    named = Path(settings["resume"]) if settings["resume"] not in ("auto", "never") else None
    if named and own and _begun_from(out, str(named)):
        named = None    # the same command again resumes the run that it has begun
    elif named and own and own[-1].resolve() != named.resolve():
        raise ValueError(f"--resume {named}: {out} has its own checkpoints, up to {own[-1].name}; leave "
                         "--resume out to resume from there, delete them to go back, or give another "
                         "--output-dir")
    if named:
        check_files(named)

    start = newest_whole(out, say) if own and named is None else named
    step = 0
    if start:
        state = read_state(start)
        step = state["step"]
        check_identity(state["identity"], identity, settings, str(start),
                       "it is another run's: delete it, or give another --output-dir", LENGTH)
        if reason := other_length(state["identity"], step):
            result = "" if todo != "resume" or not (out / "final").is_dir() else (
                f", or start a new run from its result: --model {out / 'final'} --output-dir ANOTHER")
            raise ValueError(f"{start}: cannot be resumed with {_length(identity)}: {reason}. Give "
                             f"{_length(state['identity'])} again{result}")
    elif todo == "resume" and (out / "final").is_dir():
        raise ValueError(f"--output-dir {out}: holds a finished run whose last checkpoint was not kept (give "
                         "--save-every for that); start a new one from its result: "
                         f"--model {out / 'final'} --output-dir ANOTHER")

    out.mkdir(parents=True, exist_ok=True)
    try:
        if not lock(out / ".lock", launch()):
            say(f"warning: {out}/.lock cannot be locked here; see to it that no other run writes there")
    except ValueError as error:
        raise ValueError(f"--output-dir {out}: {error}; wait for its end, or give another folder") from None

    for part in unfinished_checkpoints(out):
        say(f"{part.name} was not written to its end and is ignored")
        shutil.rmtree(part)
    if todo == "delete":
        say(f"{out}: deleting the run that is there")
    elif todo == "resume" and start is None:
        say(f"{out}: interrupted before its first checkpoint; starting from scratch")
    if todo != "resume" or start is None:
        for path in (out / name for name in RUN_FILES):
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            except OSError as error:
                raise ValueError(f"--output-dir {out}: {path} cannot be deleted ({error.strerror}); delete "
                                 "it, or give another --output-dir") from None
    if start:
        keep_lines(out / "metrics.jsonl", step)
        keep_lines(out / "eval.jsonl", step)
        say(f"resuming after step {step} from {start}")
    if (free := shutil.disk_usage(out).free) < room:
        say(f"warning: --output-dir {out}: {free / 1e6:,.0f} MB are free, the run will write "
            f"{room / 1e6:,.0f} MB")
    _write_identity(out, identity)
    write_text(out / "run_config.json", json.dumps(settings, indent=2))
    return Start(start, bool(start) and (out / "eval.jsonl").is_file() and (
        out / "eval.jsonl").stat().st_size > 0)


def _length(identity: dict) -> str:
    return " ".join(f"{flag_name(name)} {identity[name]}" for name in LENGTH)


def _write_identity(out: Path, identity: dict, finished_after: int | None = None) -> None:
    finished = {} if finished_after is None else {"finished_after": finished_after}
    write_text(out / "identity.json", json.dumps(identity | finished | {"launch": launch()}, indent=2))


def finish_run(out: Path, identity: dict, step: int, keep_last: bool) -> None:
    """Note that final/ holds the run's result. keep_last: the last checkpoint was asked for; else it was only
    for the time until now."""
    _write_identity(out, identity, step)
    if not keep_last:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
