"""The studies of the paper's claims: python -m studies.NAME."""
from runtime.program import answer_interrupts_of_modules

answer_interrupts_of_modules()
