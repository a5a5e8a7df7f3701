"""SQuAD's exact match and F1 of short answers (arXiv 1606.05250), for CoQA in lm-evaluation-harness.

The harness takes them from transformers.data.metrics.squad_metrics, which recent versions of transformers no
longer have. provide() puts these two in its place where it is missing.
"""
import importlib
import re
import string
import sys
from collections import Counter
from contextlib import suppress
from types import ModuleType

NAME = "transformers.data.metrics.squad_metrics"


def words_of(answer: str) -> list[str]:
    """"The cat's  hat." -> ["cats", "hat"]: in lower case, without punctuation and articles."""
    text = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return re.sub(r"\b(?:a|an|the)\b", " ", text).split()


def compute_exact(a_gold: str, a_pred: str) -> int:
    return int(words_of(a_gold) == words_of(a_pred))


def compute_f1(a_gold: str, a_pred: str) -> float:
    """Of the words, each counted as often as it is there; an answer without any equals only another such."""
    gold, predicted = Counter(words_of(a_gold)), Counter(words_of(a_pred))
    if not gold or not predicted:
        return float(gold == predicted)
    return 2 * (gold & predicted).total() / (gold.total() + predicted.total())


def provide() -> None:
    """Nothing is done where transformers is not installed: who needs it is told so by the harness."""
    with suppress(ImportError):
        importlib.import_module("transformers")
        try:
            importlib.import_module(NAME)
        except ImportError:
            module = ModuleType(NAME)
            module.compute_exact, module.compute_f1 = compute_exact, compute_f1
            sys.modules.setdefault(NAME.rpartition(".")[0], ModuleType(NAME.rpartition(".")[0]))
            sys.modules[NAME] = module
