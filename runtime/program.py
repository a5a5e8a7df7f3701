"""The start and the end of the programs in bench/, studies/ and quickstart/: one line at Ctrl-C, and one for
what a user can fix. And how wide the lines of all programs are. Nothing here imports PyTorch. train.run() and
eval.common.run() end the other programs, whose ranks have to end together.

    answer_interrupts_of_modules()      # in the package's __init__.py
    if __name__ == "__main__":          # in each module
        run_program(main)
"""
import signal
import sys
from collections.abc import Callable

from runtime.start import answer_interrupts, is_main, print_error, raise_interrupts

WIDTH = 79      # columns of what programs print; a terminal has at least 80


def answer_interrupts_of_modules() -> None:
    """answer_interrupts() if Python imports a package on the way to the module of `python -m`: until then the
    program is called "-m"."""
    if sys.argv[0] == "-m":
        answer_interrupts()


def run_program(main: Callable[[list[str]], int | None]) -> None:
    """main(argv) as a program, which exits with the status that it returns: one line and status 1 for a
    ValueError, one line and status 130 at Ctrl-C. Of several ranks, rank 0 prints."""
    raise_interrupts()
    line, status = "", 0
    try:
        status = main(sys.argv[1:])
    except KeyboardInterrupt:
        line, status = "interrupted", 128 + signal.SIGINT
    except ValueError as error:
        line, status = str(error), 1
    if line and is_main():
        print_error(line)
    sys.exit(status)
