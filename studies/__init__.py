"""The studies of the paper's claims: python -m studies.NAME."""
from runtime.start import answer_interrupts_of_modules

answer_interrupts_of_modules()
