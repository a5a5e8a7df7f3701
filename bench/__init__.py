"""The benchmarks: python -m bench.NAME."""
from runtime.start import answer_interrupts_of_modules

answer_interrupts_of_modules()
