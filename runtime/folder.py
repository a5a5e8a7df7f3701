"""The folder of a run: which run owns it, where to resume, and its logs.

    OUTPUT/.lock                names the process that writes here, and is locked for as long as it lives
    OUTPUT/identity.json        all that must be the same to resume: flags that matter, data, model, template;
                                the launch that wrote it; once finished, the number of steps
    OUTPUT/run_config.json      every flag
    OUTPUT/metrics.jsonl, eval.jsonl, checkpoints/, final/; with --track, tensorboard/ or wandb/

Only rank 0 writes here. Nothing is changed before it is known that this run may do so.
"""
import json
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from runtime.checkpoint import STEP_FOLDER, check_files, find_checkpoints, newest_whole, read_state
from runtime.distributed import from_all
from runtime.files import check_writable, lock, read_json, write_text, writing
from runtime.flags import flag_name
from runtime.foreign import check_file, is_number, lines_of, parse_line

# In the order in which they are deleted: while identity.json exists, the others are known to be a run's.
RUN_FILES = ("run_config.json", "metrics.jsonl", "eval.jsonl", "tensorboard", "wandb", "checkpoints", "final",
             "identity.json")
# These may change on resume, if the steps already trained had the same learning rates either way.
LENGTH = ("epochs", "max_steps", "warmup_ratio")
# What a run does with its folder: start from scratch; delete the run that is there, then start from scratch;
# resume the run that is there; or nothing, because that run has finished.
Action = Literal["start", "delete", "resume", "finished"]


class Start(NamedTuple):
    """resume: the checkpoint to start from, if any; evaluated: whether eval.jsonl holds an evaluation from
    before that; finished: whether there is nothing left to do."""
    resume: Path | None = None
    evaluated: bool = False
    finished: bool = False


# ---------------------------------------------------------------- logs


def append_line(path: Path, record: dict) -> None:
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_log(path: Path, fits: Callable[[dict], bool]) -> tuple[list[dict], int]:
    """The lines of metrics.jsonl or eval.jsonl that are so (is_step, is_evaluation), and how many are not: a
    kill may have cut the last one short."""
    lines, others = [], 0
    if os.path.lexists(path):
        check_file(path)
        with open(path, "rb") as file:
            for raw in lines_of(file):
                try:
                    line = parse_line(raw)
                except ValueError:
                    line = None
                if isinstance(line, dict) and fits(line):
                    lines.append(line)
                else:
                    others += 1
    return lines, others


def is_step(line: dict) -> bool:
    """Whether a line is one of metrics.jsonl, with all that other programs read."""
    numbers = [line.get(name) for name in ("epoch", "tokens", "trained_tokens", "seconds", "peak_memory_mb")]
    numbers += [value for name, value in line.items() if name.startswith("nll_") and value is not None]
    return type(line.get("step")) is int and all(map(is_number, numbers))


def is_evaluation(line: dict) -> bool:
    """Whether a line is one of eval.jsonl."""
    data, contents = line.get("data"), line.get("contents")
    return (type(line.get("step")) is int and isinstance(data, dict) and isinstance(contents, dict)
            and data.keys() <= contents.keys() and all(isinstance(key, str) for key in contents.values())
            and all(isinstance(kinds, dict) for kinds in data.values())
            and all(isinstance(kind, dict) and is_number(kind.get("nll_token_mean"))
                    and is_number(kind.get("tokens", 0))
                    for kinds in data.values() for kind in kinds.values())
            and is_number(line.get("exact_match", 0)) and ("answers" in line) == ("exact_match" in line))


def keep_lines(path: Path, last_step: int, fits: Callable[[dict], bool]) -> None:
    """Remove the lines after last_step, and those that are none, from metrics.jsonl or eval.jsonl, so that a
    resumed run writes each step once."""
    if path.is_file():
        lines, _ = read_log(path, fits)
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= last_step))


# ---------------------------------------------------------------- what must be the same


def check_identity(run: Path, old: dict, new: dict, settings: dict, where: str, fix: str,
                   skip: tuple = ()) -> None:
    """ValueError that names every flag and file in which two runs differ. run: the folder of the earlier one;
    old: the saved identity; new: this run's, or a part of it; settings: this run's flags; where, fix: how the
    message begins and ends; skip: names that may differ."""
    files = settings["train_data"]
    # What a hash stands for: the flag and its contents.
    hashes = {"model": ("model", "other weights or another config.json"),
              "tokenizer": ("model", "another tokenizer"), "template": ("template", "another text")}
    own, flags = {}, {}
    with suppress(ValueError):
        own, flags = read_json(run / "identity.json"), read_json(run / "run_config.json")
    differ = []
    for name in sorted(new.keys() - {*skip}):
        was, now = old.get(name), new[name]
        if was == now:
            continue
        if name == "train_data" and isinstance(was, list) and len(was) == len(now):
            # A folder's name stands for several files.
            one_each = len(files) == len(now)
            changed = [str(file) for i, file in enumerate(files) if not one_each or was[i] != now[i]]
            differ.append(f"--train-data {' '.join(changed)}: other contents")
        elif name == "train_data":
            differ.append(f"--train-data: {len(now)} file(s), not those of before")
        elif name in ("eval_data", "validation_data"):
            # Of a study.
            differ.append(f"{flag_name(name)}: other files, or other contents")
        elif name == "tokens":
            differ.append("the same records give other tokens (data.py or a library has changed)")
        elif name in hashes:
            flag, contents = hashes[name]
            value = settings[flag]
            # A checkpoint that was copied into the folder is not of this run.
            before = flags.get(flag, value) if own.get(name) == was else value
            change = f" {value}" if before == value else f" was {before}, is {value}"
            differ.append(f"{flag_name(flag)}{change}: {contents}")
        else:
            was, now = ("not given" if value is None else value for value in (was, now))
            differ.append(f"{flag_name(name)} was {was}, is {now}")
    if differ:
        raise ValueError(f"{where}: was started differently ({'; '.join(differ)}); {fix}")


def check_ranks(out: Path, identity: dict, resuming: bool) -> None:
    """ValueError on all ranks if they were not given the same, as where machines have different copies of the
    data; or if the run would resume from its newest checkpoint, and rank 0 does not see it. All ranks
    call."""
    known = find_checkpoints(out) if resuming else []
    everyone = from_all((socket.gethostname(), identity, known[-1].name if known else ""))
    host, first, newest = everyone[0]
    for rank, (other_host, other, saved) in enumerate(everyone):
        if differ := [f"{name} ({other.get(name)}, not {first[name]})" for name in first
                      if first[name] != other.get(name)]:
            raise ValueError(f"rank {rank} on {other_host} and rank 0 on {host} differ in "
                             f"{', '.join(differ)}: give every machine the same files, flags and versions")
        if saved > newest:
            raise ValueError(f"--output-dir {out}: {saved} is on {other_host} (rank {rank}), but not on "
                             f"{host}, where rank 0 is and would start from scratch; copy it there, or use a "
                             "folder that all machines see")


# ---------------------------------------------------------------- ownership


def launch() -> str:
    """Identifies the command that started this process: the same for processes that torchrun restarts, and
    for no others. The parent's process number may be reused, as in a container; its start time is not."""
    parent, boot, started = os.getppid(), "", "an unknown time"
    with suppress(OSError):     # not Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # In clock ticks since boot.
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"host {socket.gethostname()}, started by process {parent} of {started} {boot} {run}".rstrip()


def restarted(out: Path, identity: dict) -> bool:
    """Whether torchrun started this process in place of one that had begun this run in the folder. (Each
    machine counts torchrun's restarts for itself, so the count does not tell.) identity: as far as it is
    known, since another launch's host and process number may be the same by chance."""
    old = read_json(out / "identity.json")
    return "TORCHELASTIC_RUN_ID" in os.environ and old == old | identity | {"launch": launch()}


def saved_flag(out: Path, name: str, resume: str, overwrite: bool) -> str:
    """A flag, text, of the run or the checkpoint that this run goes on from, so that it has the same date and
    dtype tomorrow and on another machine; "" if it starts from scratch and torchrun did not restart it.
    resume, overwrite: the flags. What cannot be read is "", too: check_folder() says what is wrong."""
    with suppress(ValueError):
        if resume not in ("auto", "never"):
            identity = read_state(Path(resume))["identity"]
        elif (resume == "never" or overwrite) and not restarted(out, {}):
            identity = {}
        else:
            identity = read_json(out / "identity.json")
        if isinstance(value := identity.get(name), str):
            return value
    return ""


def check_folder(out: Path, identity: dict, settings: dict, model_folder: Path) -> Action:
    """What the run is to do in OUTPUT. Changes nothing. identity: as far as it is known yet; settings: every
    flag. ValueError where resuming or writing would be wrong."""
    resume, overwrite = settings["resume"], settings["overwrite"]
    if model_folder.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--output-dir {out}: holds the --model itself, {model_folder}; give another folder")
    check_writable("--output-dir", out, folder=True)
    try:
        old = read_json(out / "identity.json")
    except ValueError as error:
        raise ValueError(f"--output-dir {out}: {error}; give another --output-dir, or delete it") from None
    finished = "finished_after" in old and (out / "final").is_dir()
    if restarted(out, identity):
        # torchrun must not delete what its own run has trained.
        if finished:
            return "finished"
        overwrite, resume = False, "auto" if resume == "never" else resume
    _check_ownership(out, old)
    _check_kinds(out)
    if resume not in ("auto", "never") and (overwrite or not _begun_from(out, resume)):
        _check_named_checkpoint(Path(resume), out, identity, settings, overwrite)

    metrics = out / "metrics.jsonl"
    has_results = bool(find_checkpoints(out)) or (out / "final").is_dir() or (
        metrics.is_file() and metrics.stat().st_size > 0)
    if overwrite:
        return "delete" if has_results else "start"
    if not has_results:
        # A run that ended before its first step has nothing to lose.
        return "start"
    fix = "give another --output-dir, or --overwrite to delete it and start from scratch"
    check_identity(out, old, identity, settings, f"--output-dir {out}", fix, LENGTH)
    if finished and all(old.get(name) == identity[name] for name in LENGTH):
        raise ValueError(f"--output-dir {out}: holds a finished run; {fix}")
    if "finished_after" in old and not finished:
        raise ValueError(f"--output-dir {out}: holds a finished run whose final/ is gone; {fix}")
    if resume == "never":
        raise ValueError(f"--output-dir {out}: holds a run and --resume is never; {fix}")
    return "resume"


def _check_ownership(out: Path, old: dict) -> None:
    """ValueError if OUTPUT holds files and is not a run's folder: a run neither deletes them nor writes among
    them, with --overwrite neither. old: identity.json."""
    # A full disk may leave these behind before there is an identity.
    present = set(os.listdir(out) if out.is_dir() else ()) - {
        ".lock", "identity.json.part", "run_config.json.part"}
    # Other programs, too, have files of these names; only identity.json's content tells who owns them.
    if "launch" not in old and present:
        raise ValueError(f"--output-dir {out}: is not empty and is not a run folder; give another, "
                         "or delete it")


def _check_kinds(out: Path) -> None:
    """ValueError for a file where the run writes a folder, or a folder where it writes a file: it would train
    and then fail to save."""
    saved = sorted(path for path in (out / "checkpoints").glob("step-*")
                   if STEP_FOLDER.fullmatch(path.name.removesuffix(".part")))
    kinds = {**dict.fromkeys((out / "checkpoints", out / "final", out / "final.part", *saved), "folder"),
             **dict.fromkeys((out / "metrics.jsonl", out / "eval.jsonl"), "file")}
    for path, kind in kinds.items():
        if os.path.lexists(path) and not (path.is_dir() if kind == "folder" else path.is_file()):
            raise ValueError(f"--output-dir {out}: {path} is not a {kind}, and the run writes a {kind} of "
                             "this name; move it away")


def _check_named_checkpoint(named: Path, out: Path, identity: dict, settings: dict, overwrite: bool) -> None:
    """ValueError if the run cannot start from the checkpoint that --resume names."""
    if overwrite and named.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--overwrite would delete --resume {named}; give another --output-dir")
    if saved := find_checkpoints(named):
        raise ValueError(f"--resume {named}: is the folder of a run; name one of its checkpoints, such "
                         f"as {saved[-1]}, or resume it with --output-dir {named}")
    try:
        state = read_state(named)
    except ValueError as error:
        raise ValueError(f"--resume {error}; name one like RUN/checkpoints/step-00000100") from None
    check_identity(named.parent.parent, state["identity"], identity, settings, f"--resume {named}",
                   "give the flags it was started with", LENGTH)


def _begun_from(out: Path, checkpoint: str) -> bool:
    """Whether the run in OUTPUT was started with --resume CHECKPOINT and has its own checkpoints since."""
    before = str(read_json(out / "run_config.json").get("resume", ""))
    return Path(before).resolve() == Path(checkpoint).resolve() and bool(find_checkpoints(out))


def claim(out: Path, identity: dict, settings: dict, model_folder: Path, room: int,
          other_length: Callable[[dict, int], str], say: Callable[[str], None]) -> Start:
    """Make OUTPUT this run's: lock it, delete or cut back what is in the way, and write the run's identity.
    identity: what must be the same to resume; settings: every flag; room: bytes that the run will write;
    other_length(identity, n): why the first n steps of a run with that identity, of another length, are not
    the first n of this one, or "". ValueError as check_folder(), or if another process writes there."""
    saved = find_checkpoints(out)
    action, start, step = choose_start(out, identity, settings, model_folder, other_length, say)
    if restarted(out, identity):
        say("started again by torchrun")
    if action == "finished":
        return Start(finished=True)

    # Until here nothing has been changed.
    lock_folder(out, say)
    if (check_folder(out, identity, settings, model_folder), find_checkpoints(out)) != (action, saved):
        # Another process has trained here until now.
        return claim(out, identity, settings, model_folder, room, other_length, say)
    _prepare(out, action, start, step, say)
    if (free := shutil.disk_usage(out).free) < room:
        say(f"warning: --output-dir {out}: {free / 1e6:,.0f} MB are free, the run will write "
            f"{room / 1e6:,.0f} MB")
    _write_identity(out, identity)
    write_text(out / "run_config.json", json.dumps(settings, indent=2))
    return Start(start, bool(start) and (out / "eval.jsonl").is_file() and (
        out / "eval.jsonl").stat().st_size > 0)


def choose_start(out: Path, identity: dict, settings: dict, model_folder: Path,
                 other_length: Callable[[dict, int], str], say: Callable[[str], None]
                 ) -> tuple[Action, Path | None, int]:
    """What the run is to do in OUTPUT, the checkpoint that it starts from, if any, and how many steps are
    trained there. Changes nothing. Arguments and ValueError as for claim()."""
    action = check_folder(out, identity, settings, model_folder)
    start = _choose_checkpoint(out, action, settings, say) if action != "finished" else None
    if start:
        state = read_state(start)
        check_identity(out, state["identity"], identity, settings, str(start),
                       "it is another run's: delete it, or give another --output-dir", LENGTH)
        if reason := other_length(state["identity"], state["step"]):
            result = "" if action != "resume" or not (out / "final").is_dir() else (
                f", or start a new run from its result: --model {out / 'final'} --output-dir ANOTHER")
            raise ValueError(f"{start}: cannot be resumed with {_length(identity)}: {reason}. Give "
                             f"{_length(state['identity'])} again{result}")
        return action, start, state["step"]
    if action == "resume" and (out / "final").is_dir():
        raise ValueError(f"--output-dir {out}: holds a finished run whose last checkpoint was not kept (give "
                         "--save-every for that); start a new one from its result: "
                         f"--model {out / 'final'} --output-dir ANOTHER")
    return action, None, 0


def _choose_checkpoint(out: Path, action: Action, settings: dict, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that the run starts from, read whole once and undamaged; None to start from scratch.
    ValueError if --resume names one although OUTPUT has other ones of its own."""
    own = find_checkpoints(out) if action == "resume" else []
    named = Path(settings["resume"]) if settings["resume"] not in ("auto", "never") else None
    if named and own and _begun_from(out, str(named)):
        # The same command again resumes the run that it started.
        named = None
    elif named and own and own[-1].resolve() != named.resolve():
        raise ValueError(f"--resume {named}: {out} has its own checkpoints, up to {own[-1].name}; leave "
                         "--resume out to resume from there, delete them to go back, or give another "
                         "--output-dir")
    if named:
        check_files(named)
        return named
    return newest_whole(out, say) if own else None


def lock_folder(out: Path, say: Callable[[str], None]) -> None:
    """Make the folder and lock it. ValueError if another process writes there."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        if not lock(out / ".lock", launch()):
            say(f"warning: {out}/.lock cannot be locked here; see to it that no other run writes there")
    except ValueError as error:
        raise ValueError(f"--output-dir {out}: {error}; wait for its end, or give another folder") from None


def _prepare(out: Path, action: Action, start: Path | None, step: int, say: Callable[[str], None]) -> None:
    """Delete what an earlier run left: all of it to start from scratch, what follows `step` to resume there.
    start: the checkpoint to resume from, if any."""
    for part in sorted((out / "checkpoints").glob("step-*.part")):
        say(f"{part.name} was not written to its end and is ignored")
        shutil.rmtree(part)
    if action == "delete":
        say(f"{out}: deleting the run that is there")
    elif action == "resume" and start is None:
        say(f"{out}: interrupted before its first checkpoint; starting from scratch")
    if action != "resume" or start is None:
        for path in (out / name for name in RUN_FILES):
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            except OSError as error:
                raise ValueError(f"--output-dir {out}: {path} cannot be deleted ({error.strerror}); delete "
                                 "it, or give another --output-dir") from None
    if start:
        keep_lines(out / "metrics.jsonl", step, is_step)
        keep_lines(out / "eval.jsonl", step, is_evaluation)
        say(f"resuming after step {step} from {start}")


def _length(identity: dict) -> str:
    return " ".join(f"{flag_name(name)} {identity.get(name)}" for name in LENGTH)


def _write_identity(out: Path, identity: dict, finished_after: int | None = None) -> None:
    finished = {} if finished_after is None else {"finished_after": finished_after}
    write_text(out / "identity.json", json.dumps(identity | finished | {"launch": launch()}, indent=2))


def finish_run(out: Path, identity: dict, step: int, keep_last: bool) -> None:
    """Record that final/ holds the run's result. keep_last: whether the last checkpoint was asked for; if
    not, it was only a safeguard until now, and is deleted."""
    _write_identity(out, identity, step)
    if not keep_last:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
