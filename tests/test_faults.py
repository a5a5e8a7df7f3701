"""What a run survives, and what it refuses: kills, full disks, damaged token caches, two runs in one folder,
machines that differ. Damaged checkpoints are in test_checkpoint.py, signals in test_distributed.py."""
import builtins
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data
import forks
import train
from runtime import checkpoint, distributed, files
from runtime import folder as run_folder
from runtime import weights as weight_files
from tiny import ROOT, arguments, metrics, run_here, run_many, same_weights, setup


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return setup(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    assert run_here(arguments(folder, "undisturbed", save_every=2, keep_checkpoints=9)) == 0
    return folder / "undisturbed"


def same_ending(out: Path, other: Path) -> bool:
    """Weights bit for bit, and every step once with the same loss."""
    steps = ([(line["step"], line["loss"]) for line in metrics(each)] for each in (out, other))
    return same_weights(out, other) and next(steps) == next(steps)


# ---------------------------------------------------------------- kills


@pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL, and torchrun starts ranks anew")
@pytest.mark.parametrize("mode, places", [
    ([], ["token cache", "backward", "checkpoint", "the end"]),
    (["--shard"], ["forward", "all-reduce", "checkpoint", "final"])])
def test_ranks_killed_at_any_place_end_like_those_that_were_not(folder, mode, places):
    """One command: torchrun starts the ranks again each time, and they go on though --overwrite is given."""
    name = "killed" + "".join(mode)
    argv = [*arguments(folder, f"{name}-not", save_every=2), *mode]
    run_many(folder, [argv], 2)
    (folder / f"{name}-marks").mkdir()
    for place in places:
        (folder / f"{name}-marks" / place).touch()
    argv = [*arguments(folder, name, save_every=2, cache_dir=folder / f"{name}-cache"), "--overwrite", *mode]
    done = forks.run([str(ROOT / "tests" / "killed_ranks.py"), str(folder / f"{name}-marks"), *argv], ranks=2,
                     restarts=4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list((folder / f"{name}-marks").iterdir())
    assert same_ending(folder / name, folder / f"{name}-not")
    assert done.stdout.count("started again by torchrun") == len(set(places) - {"token cache"})
    assert ("final was finished before" in done.stdout) == ("the end" in places)
    assert "Traceback" not in done.stderr and "lost another one" in done.stderr


# ---------------------------------------------------------------- full disks


class FullDisk:
    """open() for some files, which then cannot be written to."""

    def __init__(self, name: str) -> None:
        self.name, self.full = name, True

    def __call__(self, path: object, mode: str = "r", **more: object):
        full = self.full and self.name in str(path) and mode[0] in "wa"
        return builtins.open("/dev/full" if full else path, mode, **more)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's disk that is always full")
@pytest.mark.parametrize("module, name", [
    (weight_files, "step-00000004.part/optimizer"), (weight_files, "final.part/model"),
    (run_folder, "metrics.jsonl"), (data, "kinds.bin"), (files, "identity.json")])
def test_a_full_disk_is_named_and_the_same_command_goes_on_when_there_is_room(
        folder, undisturbed, module, name, monkeypatch, capsys):
    disk = FullDisk(name)
    monkeypatch.setattr(module, "open", disk, raising=False)
    out = folder / f"full-{Path(name).stem}"
    argv = arguments(folder, out, save_every=2, cache_dir=f"{out}-cache")
    with pytest.raises(OSError) as error:
        run_here(argv)
    assert error.value.errno == errno.ENOSPC
    line = distributed.message(error.value)
    where = name.split("/")[0].split(".")[0] if module is not data else "-cache"
    assert where in line
    assert "No space left on device; make room there and give the same command again" in line
    assert not list(out.glob("**/*.part/*")), "takes the room of what comes next"
    for saved in checkpoint.find_checkpoints(out):
        checkpoint.check_files(saved)
    disk.full = False
    assert run_here(argv) == 0
    assert ("resuming after step" in capsys.readouterr().out) == (module is weight_files)
    assert same_ending(out, undisturbed)


# ---------------------------------------------------------------- token caches


def test_a_damaged_token_cache_is_made_anew(folder, undisturbed, capsys):
    cache = folder / "damaged-cache"
    argv = dict(cache_dir=cache, max_steps=1, overwrite=True)
    run_here(arguments(folder, "cached", **argv))
    (made,) = cache.iterdir()
    whole = {file.name: file.read_bytes() for file in made.iterdir()}
    assert set(whole) == {"ids.bin", "kinds.bin", "offsets.bin", "origins.bin", "counts.bin", "groups.bin",
                          "report.json", "crc32.json"}
    for name, spoil in [*((name, lambda x: x[:-1] + bytes([x[-1] ^ 1])) for name in whole),
                        ("ids.bin", lambda x: x[:9]), ("kinds.bin", lambda x: b""),
                        ("crc32.json", lambda x: b""), ("crc32.json", lambda x: b"{}")]:
        (made / name).write_bytes(spoil(whole[name]))
        capsys.readouterr()
        run_here(arguments(folder, "cached", **argv))
        assert "is damaged; tokenizing again" in capsys.readouterr().err
        assert {file.name: file.read_bytes() for file in made.iterdir()} == whole
    capsys.readouterr()
    run_here(arguments(folder, "cached", **argv))
    assert "damaged" not in capsys.readouterr().err


@pytest.fixture
def damaged(folder, tmp_path) -> tuple[list[str], Path]:
    """Flags of a run, and its token cache with a bit flipped in a token's number."""
    argv = arguments(folder, tmp_path / "out", cache_dir=tmp_path / "cache", max_steps=1, overwrite=True)
    run_here(argv)
    (made,) = (tmp_path / "cache").iterdir()
    ids = bytearray((made / "ids.bin").read_bytes())
    ids[0] ^= 1
    (made / "ids.bin").write_bytes(ids)
    return argv, made


def test_a_damaged_token_cache_that_cannot_be_replaced_is_never_trained_on(damaged, monkeypatch):
    argv, made = damaged

    def denied(path: object, *more: object, **_: object) -> None:
        if str(made) in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        rename(path, *more)
    rename = os.rename
    monkeypatch.setattr(os, "rename", denied)
    monkeypatch.setattr(data.shutil, "rmtree", lambda *a, **k: None)
    with pytest.raises(ValueError, match=rf"{made}/ids.bin: is damaged, and the folder cannot be replaced "
                                         r"\(Permission denied\): delete it, or give another --cache-dir"):
        run_here(argv)


def test_a_damaged_token_cache_of_another_owner_is_replaced_though_its_files_cannot_be_deleted(
        damaged, undisturbed, monkeypatch, capsys):
    """Renaming asks for rights to the cache folder only, deleting for rights to what is in it."""
    argv, made = damaged
    delete = data.shutil.rmtree
    monkeypatch.setattr(data.shutil, "rmtree", lambda path, *a, **k: None if str(path).endswith(".old.part")
                        else delete(path, *a, **k))
    before = (made / "ids.bin").read_bytes()
    assert run_here(argv) == 0
    assert "is damaged; tokenizing again" in capsys.readouterr().err
    assert (made / "ids.bin").read_bytes() != before
    assert run_here(argv) == 0
    assert "damaged" not in capsys.readouterr().err


def test_a_token_cache_that_cannot_be_read_is_named_and_made_anew(damaged, monkeypatch, capsys):
    argv, made = damaged

    def denied(path: object, *more: object, **most: object):
        if path == made / "ids.bin" and path.stat().st_ino == inode:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return builtins.open(path, *more, **most)
    inode = (made / "ids.bin").stat().st_ino
    os.link(made / "ids.bin", made.parent.parent / "kept")      # so that no new file gets its number
    monkeypatch.setattr(data, "open", denied, raising=False)
    assert run_here(argv) == 0
    assert f"{made}/ids.bin: cannot be read (Permission denied); tokenizing again" in capsys.readouterr().err


def test_a_token_cache_of_other_files_is_made_again(damaged, capsys):
    """Its sums are right, and its records are said to come from a file that is not among those given."""
    argv, made = damaged
    run_here(argv)      # whole again
    capsys.readouterr()
    origins = np.fromfile(made / "origins.bin", np.int32).reshape(-1, 2)
    origins[-1, 0] = 7
    (made / "origins.bin").write_bytes(origins.tobytes())
    sums = json.loads((made / "crc32.json").read_text())
    sums["origins.bin"] = files.checksum(made / "origins.bin")
    (made / "crc32.json").write_text(json.dumps(sums))
    assert run_here(argv) == 0
    assert "is damaged; tokenizing again" in capsys.readouterr().err
    assert not np.fromfile(made / "origins.bin", np.int32).reshape(-1, 2)[:, 0].any()


def test_the_files_that_were_checked_are_those_that_are_mapped(damaged, monkeypatch):
    """Another process replaces the cache between the check and the mapping."""
    argv, made = damaged
    run_here(argv)      # whole again
    whole, wrong = np.fromfile(made / "ids.bin", np.int32), made.parent.parent / "wrong"
    check = files.checksum

    def replace(file) -> int:
        crc = check(file)
        if str(getattr(file, "name", "")) == str(made / "ids.bin"):
            wrong.write_bytes(bytes(4 * len(whole)))
            os.replace(wrong, made / "ids.bin")
        return crc
    monkeypatch.setattr(data, "checksum", replace)
    assert np.array_equal(data._open_cache(made, 1)[0]["ids"], whole)
    assert not np.fromfile(made / "ids.bin", np.int32).any()


def test_a_cache_dir_that_cannot_be_made_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"--cache-dir {tmp_path}/file/cache: {tmp_path}/file is not a "
                                         r"writable folder \(Not a directory\); give another"):
        run_here(arguments(folder, "no-cache", cache_dir=tmp_path / "file" / "cache", max_steps=1))


def test_another_process_that_was_first_is_read_from(folder, tmp_path, monkeypatch):
    argv = arguments(folder, tmp_path / "out", cache_dir=tmp_path / "cache", max_steps=1, overwrite=True)
    write = data._write_cache

    def beaten(part: Path, *more: object) -> None:
        write(part, *more)
        place = part.with_name(part.name.split(".")[0])
        place.mkdir()
        for file in part.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(data, "_write_cache", beaten)
    assert run_here(argv) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_what_killed_tokenizers_left_is_deleted_and_what_others_write_is_not(folder):
    cache = folder / "left-cache"
    argv = arguments(folder, "left", cache_dir=cache, max_steps=1, overwrite=True)
    run_here(argv)
    (made,) = cache.iterdir()
    old, new = (cache / f"{made.name}.elsewhere.{pid}.part" for pid in (1, 2))
    for part in (old, new):
        part.mkdir()
        (part / "ids.bin").write_bytes(b"half")
    for path in (old / "ids.bin", old):
        os.utime(path, (time.time() - 7200,) * 2)
    os.truncate(made / "ids.bin", 3)
    run_here(argv)
    assert sorted(cache.iterdir()) == sorted([made, new])


# ---------------------------------------------------------------- one folder, one run


HOLD = """import sys, time; from pathlib import Path; from runtime import files
files.lock(Path(sys.argv[1]), "host a, process 1"); print("locked", flush=True); time.sleep(100)"""


@pytest.fixture
def holder(folder):
    """Another process that has locked FOLDER/held."""
    (folder / "held").mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / "held" / ".lock")], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_two_runs_cannot_have_one_folder_and_a_lock_that_was_left_behind_locks_nothing(folder, holder):
    argv = arguments(folder, "held", overwrite=True, max_steps=1)
    with pytest.raises(ValueError, match=r"--output-dir .*held: another process is writing there \(host a, "
                                         r"process 1\); wait for its end, or give another folder"):
        run_here(argv)
    assert sorted(path.name for path in (folder / "held").iterdir()) == [".lock"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (folder / "held" / ".lock").read_text() == "host a, process 1"
    assert run_here(argv) == 0


def test_a_file_system_without_locks_is_named(folder, monkeypatch, capsys):
    import fcntl

    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert run_here(arguments(folder, "lockless", max_steps=1)) == 0
    assert "lockless/.lock cannot be locked here" in capsys.readouterr().out


# ---------------------------------------------------------------- started again by torchrun


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, at: int) -> None:
    """The run ends by an error when it logs its step `at`."""
    original = run_folder.append_line

    def append(path: Path, record: dict) -> None:
        if record["step"] == at and path.name == "metrics.jsonl":
            raise Interrupted
        original(path, record)
    monkeypatch.setattr(train, "append_line", append)


@pytest.mark.parametrize("more", [dict(overwrite=True), dict(resume="never"), dict(resume="CHECKPOINT"), {}])
def test_a_restart_by_torchrun_goes_on_and_another_launch_does_as_it_is_told(
        folder, undisturbed, more, monkeypatch, capsys):
    if more.get("resume") == "CHECKPOINT":
        more = dict(resume=undisturbed / "checkpoints" / "step-00000004")
    out = folder / f"again-{'-'.join(more)}-{len(str(more))}"
    argv = arguments(folder, out, save_every=2, **more)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    for step in (6, 8):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt(patch, step)
            run_here(argv)
    assert run_here(argv) == 0
    printed = capsys.readouterr().out
    assert printed.count("started again by torchrun") == 2
    assert f"resuming after step 6 from {out}/checkpoints" in printed
    assert same_weights(out, undisturbed)
    before = (out / "final" / "model.safetensors").stat().st_mtime_ns
    assert run_here(argv) == 0      # killed after it was done
    assert "final was finished before" in capsys.readouterr().out
    assert (out / "final" / "model.safetensors").stat().st_mtime_ns == before
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    if more.get("overwrite"):
        assert run_here(argv) == 0
        assert "resuming" not in capsys.readouterr().out
    elif "resume" not in more or more["resume"] == "never":
        with pytest.raises(ValueError, match="holds a finished run"):
            run_here(argv)


# ---------------------------------------------------------------- several machines


def test_machines_that_differ_stop_before_anything_is_written(folder, monkeypatch):
    def told(*others: tuple) -> None:
        monkeypatch.setattr(run_folder, "from_all", lambda mine: [mine, *others])
        run_folder.check_ranks(folder / "together", mine, resuming=True)

    mine = {"train_data": "aa", "model": "bb", "torch": "2.13"}
    told(("b", mine, ""), ("c", mine, ""))
    with pytest.raises(ValueError, match=r"rank 2 on c and rank 0 on .* differ in train_data \(ee, not aa\)"):
        told(("b", mine, ""), ("c", {**mine, "train_data": "ee"}, ""))
    with pytest.raises(ValueError, match="step-00000004 is on b .rank 1., but not on .* start from scratch"):
        told(("b", mine, "step-00000004"))
    assert not (folder / "together").exists()


def test_ranks_with_other_data_end_with_one_line_and_no_folder(folder):
    """Through torchrun: rank 1 reads a file with a record less."""
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "fewer.jsonl").write_text("".join(lines[1:]))
    code = ("import os, sys, train\n"
            "argv = sys.argv[1:]\n"
            "if os.environ['RANK'] == '1':\n"
            "    argv[argv.index('--train-data') + 1] = argv.pop()\n"
            "else:\n"
            "    argv.pop()\n"
            "sys.exit(train.run(argv))\n")
    done = forks.run(["-c", code, *arguments(folder, "differ"), str(folder / "fewer.jsonl")], ranks=2)
    assert done.returncode != 0 and done.stderr.count("error: rank 1 on ") == 1
    assert "differ in train_data" in done.stderr and not (folder / "differ").exists()
