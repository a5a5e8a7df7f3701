"""Files that are whole or absent: on the disk before they have their name; errors that name their file."""
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import data
from runtime import checkpoint, distributed, files
from tiny import arguments, run_here, setup


def test_files_are_told_apart_by_the_shortest_ends_of_their_paths():
    ends = files.distinct_endings
    assert ends(["x/a/test.jsonl", "/y/b/test.jsonl", "c.jsonl"]) == [
        "a/test.jsonl", "b/test.jsonl", "c.jsonl"]
    assert ends(["/x/a/test.jsonl", "/y/a/test.jsonl"]) == ["x/a/test.jsonl", "y/a/test.jsonl"]
    # One path may be the end of another.
    assert ends(["test.jsonl", "a/test.jsonl"]) == ["test.jsonl", "a/test.jsonl"]
    assert ends(["a/near.jsonl", "a/near.json"]) == ["near.jsonl", "near.json"] and ends([]) == []


# ---------------------------------------------------------------- power cuts


def watch_disk(monkeypatch) -> list[tuple[str, Path]]:
    """What is flushed and what is renamed, in order. A file that is renamed before it is flushed may be empty
    under its new name after a power cut."""
    events, fsync, rename, replace = [], os.fsync, os.rename, os.replace

    def note(what: str, then: Callable) -> Callable:
        def call(first: object, *rest: object) -> None:
            path = os.readlink(f"/proc/self/fd/{first}") if what == "flush" else first
            events.append((what, Path(path)))
            then(first, *rest)
        return call
    monkeypatch.setattr(os, "fsync", note("flush", fsync))
    monkeypatch.setattr(os, "rename", note("rename", rename))
    monkeypatch.setattr(os, "replace", note("rename", replace))
    return events


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are read from Linux's /proc")
def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    part, done = tmp_path / "x.part", tmp_path / "x"
    part.mkdir()
    for name in ("a", "b"):
        (part / name).write_text(name)
    events = watch_disk(monkeypatch)
    files.commit(part, done)
    assert sorted(events[:2]) == [("flush", part / "a"), ("flush", part / "b")]
    assert events[2:] == [("flush", part), ("rename", part), ("flush", tmp_path)]
    assert sorted(path.name for path in done.iterdir()) == ["a", "b"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are read from Linux's /proc")
def test_nothing_of_a_run_gets_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """Of the token cache, identity, checkpoints and final/ alike."""
    original = os.scandir
    events = watch_disk(monkeypatch)
    inside: dict[Path, set[Path]] = {}

    def commit(part: Path, done: Path) -> None:
        inside[part] = {Path(entry.path) for entry in original(part)}
        real(part, done)
    real = files.commit
    for module in (data, checkpoint):
        monkeypatch.setattr(module, "commit", commit)
    assert run_here(arguments(setup(tmp_path), "flushed", save_every=2)) == 0
    renamed = [path for what, path in events if what == "rename"]
    assert {path.name.split(".part")[0] for path in renamed} >= {
        *(f"step-{n:08d}" for n in (2, 4, 6, 8)), "final", "identity.json", "run_config.json"}
    assert len(inside) == 6 and all(len(names) > 2 for names in inside.values())
    for path in renamed:
        before = {other for what, other in events[:events.index(("rename", path))] if what == "flush"}
        assert {path} | inside.get(path, set()) <= before


# ---------------------------------------------------------------- what is said


def test_a_file_that_cannot_be_written_is_refused_with_the_reason(tmp_path):
    for path, says in (("/dev/full", "is a device or a pipe; give a file"),
                       (tmp_path, "is a folder; give a file"),
                       (tmp_path / "no" / "x", "give a file in a folder that exists")):
        with pytest.raises(ValueError, match=f"--json {path}: {says}"):
            files.check_writable("--json", path)


def test_errors_of_the_system_name_their_file():
    with pytest.raises(OSError) as error, files.writing("runs/a"):
        raise OSError(errno.EIO, "Input/output error")
    assert distributed.message(error.value) == "runs/a: Input/output error"
    with pytest.raises(FileNotFoundError) as error, files.writing("runs/a"):
        open("no/such/file")
    assert distributed.message(error.value) == "no/such/file: No such file or directory"
    lost = distributed.message(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert lost.startswith("rank 0 lost another one") and "Connection closed by peer" in lost
    for full in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
                 RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate")):
        text = distributed.message(full)
        assert "has no memory left (" in text and "--micro-batch-tokens" in text and "\n" not in text
    assert distributed.message(RuntimeError("shape mismatch")) is None
    assert distributed.message(ValueError("--lr 0")) == "--lr 0"
