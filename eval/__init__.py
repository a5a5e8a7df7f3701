"""The evaluation commands: `python -m eval` lists them."""
from runtime.start import answer_interrupts_of_modules

answer_interrupts_of_modules()
