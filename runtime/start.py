"""What a program does before it imports PyTorch, which takes seconds: it finds out which rank it is, ends
with one line at Ctrl-C, and answers --help and wrong flags. Also how programs print errors and end.

    from runtime.start import answer_flags, answer_interrupts
    if __name__ == "__main__":
        answer_interrupts()
    from config import parse_args           # only what the flags need
    answer_flags(__name__, parse_args)
    import torch                            # and everything else
    if __name__ == "__main__":
        run_program(main)
"""
import contextlib
import errno
import json
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TextIO

from runtime.foreign import printable, shorten

WIDTH = 79      # columns of what programs print; a terminal has at least 80

# What a program was started without (`>&-`) would else be the next file that is opened, a checkpoint, say.
for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:
        os.open(os.devnull, os.O_RDWR)      # gets the lowest number that is free
        setattr(sys, name, open(number, "r" if name == "stdin" else "w"))


def launched(name: str, default: int) -> int:
    """A number that torchrun puts into the environment; the default if it is absent or not such a number,
    which join_ranks() refuses. No error here, because errors are reported by rank."""
    text = os.environ.get(name, "")
    return max(default, int(text)) if text.isdecimal() and len(text) < 7 else default


def rank() -> int:
    return launched("RANK", 0)


def is_main() -> bool:
    return rank() == 0


def world_size() -> int:
    return launched("WORLD_SIZE", 1)


def local_rank() -> int:
    return launched("LOCAL_RANK", 0)


# ---------------------------------------------------------------- Ctrl-C


def _end(*_: object) -> None:
    # Nothing is raised: an import may swallow exceptions, or print them from a callback. Nothing is open yet
    # that would have to be closed.
    if is_main():
        os.write(2, b"error: interrupted before anything was done\n")
    os._exit(128 + signal.SIGINT)


def answer_interrupts() -> None:
    """From now on Ctrl-C ends this process with one line and status 130. A program that is to ignore Ctrl-C,
    as one that a shell started in the background, goes on ignoring it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again, because there is something to clean up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def answer_interrupts_of_modules() -> None:
    """answer_interrupts() if Python imports a package on its way to the module of `python -m`: until it has
    found the module, the program's name is "-m"."""
    if sys.argv[0] == "-m":
        answer_interrupts()


# ---------------------------------------------------------------- wrong flags


def answer_flags(name: str, check: Callable[[list[str]], object]) -> None:
    """In the program itself (name is its __name__), end with one line and status 1 if check(argv) raises
    ValueError for the flags, or OSError for a file or folder that they name."""
    if name != "__main__":
        return
    try:
        check(sys.argv[1:])
    except (ValueError, OSError) as error:
        if is_main():
            print_error(line_of(error))
        else:
            # Rank 0 has the same error; torchrun ends the others when it has reported.
            time.sleep(5)
        sys.exit(1)


# ---------------------------------------------------------------- errors and the end


def line_of(error: ValueError | OSError) -> str:
    """The line for an error that a user can fix; of the operating system's errors it names the file."""
    if not isinstance(error, OSError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        return "nobody reads the output any more"
    where = f"{error.filename}: " if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (f"{where}{error.strerror or error}"
            + ("; make room there and give the same command again" if full else ""))


def print_error(message: str) -> None:
    """Print the error that ends this process, and hand it to torchrun, if that started the process, to print
    last, below its own traceback."""
    message = print_message(f"error: {message}")
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # Whole seconds decide which rank failed first. The others fail as soon as this one is gone, often
        # within the same second.
        began = str(int(time.time()) - 1)
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {
                "message": message, "extraInfo": {"timestamp": began}}}))


def print_message(message: str) -> str:
    """Print an error or a warning, and return what was printed. On a terminal it fits 80 columns. Elsewhere
    it is one line, so that grep finds the whole message and no program has to join its lines."""
    message = printable(shorten(message, 4000))
    print(fit(message) if sys.stderr.isatty() else message, file=sys.stderr)
    return message


@cache
def warn_once(text: str) -> None:
    """Print a warning once a run, although flags and folders are read several times."""
    if is_main():
        print_message(f"warning: {text}")


def fit(message: str) -> str:
    """A message in lines of at most 79 columns, broken between words, so that a path stays whole. Only the
    first line and the items of a list, which two spaces indent, are broken: other lines are for copying."""
    wrapper = textwrap.TextWrapper(WIDTH, break_long_words=False, break_on_hyphens=False)
    lines = message.split("\n")
    for i, line in enumerate(lines):
        if i == 0 or re.match("  (?! )", line):
            wrapper.subsequent_indent = "  " if i == 0 else "    "
            lines[i] = wrapper.fill(line)
    return "\n".join(lines)


def stop_signals() -> list[int]:
    """What asks a program to stop: Ctrl-C, SIGTERM and, but not under nohup, the end of the terminal."""
    terminal_ends = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM] + [signal.SIGHUP] * terminal_ends


def silence(stream: TextIO) -> None:
    """From now on what is written to it is lost: nobody reads it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def raise_stops() -> None:
    """From now on SIGTERM and the end of the terminal (SIGHUP) raise SystemExit, so that what was started
    ends, too, and temporary folders are deleted. A program that is to ignore them, under nohup, does."""
    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)       # while it cleans up
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)


def run_program(main: Callable[[list[str]], int | None]) -> None:
    """main(argv) as a program, which exits with the status that it returns: one line and status 1 for a
    ValueError, an OSError or when nobody reads its output any more, one line and status 130 at Ctrl-C, status
    143 or 129 at SIGTERM or SIGHUP. Of several ranks, rank 0 prints."""
    raise_interrupts()
    raise_stops()
    line = ""
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        line, status = "interrupted", 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # Python would try to write the rest when it ends.
            silence(sys.stdout)
        line, status = line_of(error), 1
    if line and is_main():
        print_error(line)
    sys.exit(status)
