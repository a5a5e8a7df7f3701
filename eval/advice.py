"""What is known about the choice of loss for data of this kind: the last lines of eval.look.

evidence.json lists settings in which IM was measured next to IT: by the paper (arXiv 2405.14394, which gives
no intervals), and here, where studies.report fills in the results. No rule is drawn from them; the nearest
ones are shown, and the command that finds out.
"""
import dataclasses
import json
import math
import shlex
import textwrap
from pathlib import Path

from config import WEIGHT_FLAGS, Config
from runtime.flags import flag_name
from runtime.report import counted
from runtime.start import WIDTH

EVIDENCE = Path(__file__).resolve().parent / "evidence.json"
# About prompt weights, which evidence.json does not have: PLW is arXiv 2401.13586, WIT arXiv 2507.07817.
WEIGHTS = ("Smaller weights on instructions (--instruction-weight): PLW found about 0.24 best for short "
           "answers and near 1 for long ones; in WIT the best was not zero in 56 % of settings.")


def nearest(settings: list[dict], ratio: float, examples: int) -> list[dict]:
    """The two settings measured here and the two of the paper that are most like these: by the logarithm of
    the ratio of instruction to completion length, and half as much by that of the number of examples."""
    def distance(setting: dict) -> float:
        return abs(math.log(setting["ratio"] / ratio)) + abs(math.log(setting["examples"] / examples)) / 2

    ranked = sorted((setting for setting in settings if setting["result"]), key=distance)
    measured = [setting for setting in ranked if "study" in setting]
    reported = [setting for setting in ranked if "study" not in setting]
    return measured[:2] + reported[:2]


def advice(ratio: float, examples: int, config: Config) -> str:
    """The lines, in 79 columns. ratio: tokens of instructions over those of completions, above 0; examples:
    to train on; config: the flags of the run."""
    def fill(text: str, indent: str = "  ") -> str:
        return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)

    lines = [fill("which loss? The settings measured so far that are nearest to "
                  f"{counted(examples, 'example')} and {ratio:.3g} tokens of instruction for each of "
                  "completion, IT -> IM or the difference:")]
    for setting in nearest(json.loads(EVIDENCE.read_text()), ratio, examples):
        lines.append(fill(f"- {setting['set']} ({setting['source']}; {setting['examples']:,} examples, "
                          f"{setting['ratio']:.3g}): {setting['result']}"))
    lines += [fill(WEIGHTS), "To find out for these data, with intervals:"]
    lines.append("  python -m eval.study " + " \\\n      ".join(map(shlex.join, study_flags(config))))
    return "\n".join(lines)


# What a study compares, and what it decides itself.
OF_A_LOSS = ("loss", "normalize", *WEIGHT_FLAGS)
OF_A_STUDY = {"model", "train_data", "lr", "eval_fraction", "require_completion", *OF_A_LOSS}


def study_flags(config: Config) -> list[list[str]]:
    """The flags of a study that compares losses for a run's records, the run's own among them, otherwise with
    the run's flags."""
    given, defaults = {}, Config()
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if value != getattr(defaults, field.name) and not field.metadata["free"]:
            words = map(str, value if isinstance(value, list) else [value])
            given[field.name] = [flag_name(field.name), *words]
    flags = [["--model", config.model], ["--train-data", *config.train_data],
             ["--eval-data", *(config.eval_data or ["TEST.jsonl"])]]
    if config.mix:
        # A study cannot hold out part of a mix.
        flags.append(["--validation-data", "VALIDATION.jsonl"])
    rates = (f"{config.lr * factor:.2g}" for factor in (1 / 3, 1, 3))
    flags += [["--losses", "it", "im", "im:span"], ["--lrs", *rates]]
    own = [word for name in OF_A_LOSS for word in given.get(name, [])]
    if own not in (["--loss", "it"], [], ["--normalize", "span"]):
        flags.append(["--variants", f"own={shlex.join(own)}"])
    flags += [words for name, words in given.items() if name not in OF_A_STUDY]
    return [*flags, ["--output-dir", "runs/study"]]
