"""What others wrote: how much of it is read, how deep it may be nested, and how it is shown.

    text = read_text("model/tokenizer.json")
    for raw in lines_of(file): value = parse_line(raw)
    print(printable(text))

Checkpoints, records and templates come from strangers. A file may be a pipe that never ends, a line may be
larger than the memory, JSON may be nested deeper than Python's stack, and text may hold commands to the
terminal.
"""
import codecs
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_TEXT = 2**27    # characters of a file that is read whole; the largest tokenizer.json has some 2**25
MAX_LINE = 2**24    # bytes of a line, characters of a record: some four million tokens
MAX_DEPTH = 100     # lists and objects inside each other in JSON
TOO_DEEP = f"JSON nested deeper than {MAX_DEPTH} levels"
_POINTER = b"version https://git-lfs.github.com/spec/"

# Controls but for tab and line feed, what turns the direction of writing, and half surrogate pairs.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
                       "\ud800-\udfff]")


def check_file(path: str | Path) -> None:
    """ValueError unless there is a regular file, which has an end: no folder, pipe or device."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        problem = "is a link to what does not exist" if os.path.islink(path) else "no such file"
        raise ValueError(f"{path}: {problem}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:     # a null byte in the name
        raise ValueError(f"{path}: {error}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is a folder, not a file" if stat.S_ISDIR(mode) else
                         f"{path}: is a pipe or device, not a file; write what it gives to a file")


def is_file(path: str | Path) -> bool:
    """Whether there is a regular file. Unlike for os.path.isfile(), one in a folder that may not be entered
    is a PermissionError, so that nobody is told that it does not exist."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False


def about_pointer(path: str | Path) -> str:
    """What is wrong with a file that `git clone` without Git LFS left as a pointer; "" if it is none."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) != _POINTER:
            return ""
    return (f"{path}: is a Git LFS pointer, not the file itself; to get it, run git -C "
            f"{Path(path).absolute().parent} lfs pull")


def read_text(path: str | Path, encoding: str = "utf-8", limit: int = MAX_TEXT) -> str:
    """The text of a file. ValueError names the file if it is not a regular one, not UTF-8, or has more than
    `limit` characters."""
    check_file(path)
    if problem := about_pointer(path):
        raise ValueError(problem)
    try:
        with open(path, encoding=encoding) as file:
            text = file.read(limit + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}; it must be UTF-8 text") from None
    if len(text) > limit:
        raise ValueError(f"{path}: has more than {limit:,} characters, which is more than is read at once")
    return text


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """The lines of an open file, without a byte order mark. One that is too long comes in pieces, of which
    parse_line() refuses the first, so that it is never in memory as a whole."""
    line = file.readline(MAX_LINE + 1).removeprefix(codecs.BOM_UTF8)
    while line:
        yield line
        line = file.readline(MAX_LINE + 1)


def parse_line(raw: bytes) -> object:
    """The JSON value in a line. ValueError if it is longer than MAX_LINE bytes, not UTF-8 or not JSON."""
    if len(raw) > MAX_LINE:
        raise ValueError(f"the line is longer than {MAX_LINE:,} bytes: split the record, or leave it out")
    return parse_json(raw.decode("utf-8"))


def parse_json(text: str, **options: object) -> object:
    """The value of a JSON text; options: as for json.loads. ValueError if it is not JSON, or nested deeper
    than MAX_DEPTH: Python would end in a RecursionError sooner or later."""
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    check_depth(value)
    return value


def check_depth(value: object) -> None:
    """ValueError for a JSON value that is nested deeper than MAX_DEPTH."""
    level, depth = [value], 0
    while level := [inner for inner in level if isinstance(inner, dict | list | tuple)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(TOO_DEEP)
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]


def is_number(value: object) -> bool:
    """Whether a JSON value is a number to compute with: not NaN, infinite or of a thousand digits."""
    return type(value) in (int, float) and abs(value) < 1e18


def printable(text: str) -> str:
    """Text without a terminal's commands: control characters but for tab and line feed, and those that turn
    the direction of writing, are written as JSON writes them, \\u001b."""
    return _COMMANDS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def shown(value: object, limit: int = 200) -> str:
    """A value of a JSON or YAML file for a message, as JSON writes it, without what is beyond the limit. It
    may be far larger than the file: in YAML a list can hold another one many times."""
    text = ""
    for part in json.JSONEncoder(ensure_ascii=False, skipkeys=True, default=str).iterencode(value):
        text += part
        if len(text) > limit:
            return f"{text[:limit]} [...]"
    return text


def shorten(text: str, limit: int = 2000) -> str:
    """A long text without its middle."""
    return text if len(text) <= limit else f"{text[:limit // 2]} [...] {text[-limit // 2:]}"
