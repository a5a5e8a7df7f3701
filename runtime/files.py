"""Files that a kill or a full disk leaves whole or absent, whose damage shows, and that one process owns.

What is written gets a temporary name first, is flushed to disk and then renamed. Checksums are CRC-32: they
reveal cut files and flipped bits, not forgery.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO, TextIO

from runtime.foreign import check_file, parse_json, read_text

# POSIX releases a lock when its process closes any descriptor of the file: never open these a second time.
_held: dict[Path, TextIO] = {}


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Makes an operating system's error in here name the file, which those of write() and fsync() do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def check_writable(flag: str, path: str | Path, folder: bool = False) -> None:
    """ValueError that names the flag unless a file can be written at this path; folder: unless a folder can
    be made there, or written to. By writing a file without a name, which leaves nothing behind: permissions
    alone do not tell, since root may do everything and nobody can write to a full or read-only disk."""
    path = Path(path)
    if not folder and path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device or a pipe"
        raise ValueError(f"{flag} {path}: is a {kind}; give a file")
    if not folder and not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: give a file in a folder that exists")
    whole, above = path.absolute(), path.absolute().parents
    place = next(each for each in (whole, *above) if os.path.lexists(each)) if folder else above[0]
    try:
        # A name may be too long.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ValueError(f"{flag} {path}: {place} is not a writable folder ({error.strerror}); give "
                         "another") from None


def write_text(path: str | Path, text: str) -> None:
    """Replace a file's contents with this text, completely or not at all."""
    part = Path(f"{path}.part")
    with writing(path):
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def read_json(path: Path) -> dict:
    """The object in a JSON file, an empty one if the file does not exist. ValueError names a broken file."""
    if not os.path.lexists(path):
        return {}
    text = read_text(path)
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON, or is cut off: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, not an object")
    return content


def distinct_endings(files: list[str]) -> list[str]:
    """The shortest end of each path that no other one has, so that short names tell files apart:
    ["x/a/test.jsonl", "x/b/test.jsonl", "c.jsonl"] -> ["a/test.jsonl", "b/test.jsonl", "c.jsonl"]"""
    endings, every = [], [Path(file).parts for file in files]
    for own in every:
        others = [parts for parts in every if parts != own]
        length = 1
        while length < len(own) and any(parts[-length:] == own[-length:] for parts in others):
            length += 1
        endings.append(str(Path(*own[-length:])))
    return endings


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's list of names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with writing(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def commit(part: Path, folder: Path) -> None:
    """Rename the folder `part` to its final name, once everything in it is on disk."""
    for file in part.iterdir():
        sync(file)
    sync(part)
    os.rename(part, folder)
    sync(folder.parent)


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's contents, in hex. ValueError for a file that cannot be read."""
    check_file(path)
    try:
        state = os.stat(path)
        return _hash_once(os.fspath(path), state.st_ino, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


# A run asks before and after it reads a file. Keyed by inode, size and time, a changed file is hashed again.
@cache
def _hash_once(path: str, *state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(file: str | Path | BinaryIO) -> int:
    """CRC-32 of a file, given by name or already open."""
    crc = 0
    with open(file, "rb") if isinstance(file, str | Path) else contextlib.nullcontext(file) as opened:
        while data := opened.read(2**24):
            crc = zlib.crc32(data, crc)
    return crc


def delete_left(parts: Iterable[Path]) -> None:
    """Delete folders in which nothing has been written for an hour: their writers were killed."""
    for part in parts:
        # Another process may be deleting it at the same time.
        with contextlib.suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (part, *part.iterdir())) > 3600:
                shutil.rmtree(part)


def lock(path: Path, owner: str) -> bool:
    """Lock a file for as long as this process lives, and write the owner into it. The system releases the
    lock when the process ends, however it ends: a file left behind locks nothing. Returns False where the
    file system has no locks. ValueError with the owner's name if another process holds it."""
    path = path.resolve()
    if path in _held:
        return True
    file = open(path, "a+", encoding="utf-8")
    try:
        # Works on NFS, too, unlike flock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        # The rest of it is for programs to compare.
        holder = file.read().partition(" of ")[0]
        raise ValueError(f"another process is writing there ({holder or 'that just started'})") from None
    except OSError:
        return False
    _held[path] = file
    with writing(path):
        file.truncate(0)
        file.write(owner)
        file.flush()
    return True
