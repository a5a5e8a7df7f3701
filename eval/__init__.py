"""The evaluation commands: `python -m eval` lists them."""
import sys

from runtime.start import answer_interrupts

# Python imports this package on its way to the module of `python -m eval.NAME`, and until it has found the
# module, the program's name is "-m".
if sys.argv[0] == "-m":
    answer_interrupts()
