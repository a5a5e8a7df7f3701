"""Flags of the evaluation commands, and their errors before PyTorch is imported, which takes seconds.

    args = parse_args(argv)                 # with a Parser; each command has its own
    answer_command(__name__, parse_args)    # and only then the imports that need PyTorch
"""
import argparse
import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from config import CACHE_DIR, COMPUTE_DTYPES, OVERLONG, RECORDS, Config, check_files, check_once, local_files
from runtime import flags
from runtime.files import check_writable
from runtime.flags import number
from runtime.model_folder import HUB_FILES, INDEX
from runtime.start import answer_flags, is_main

# Of the flags of a run, some of which the commands have too.
HELP = {field.name: field.metadata["help"] for field in dataclasses.fields(Config)}
LOOKUP = 3      # the most tokens that are guessed for a document in a step of generation


def answer_command(name: str, parse_args: Callable[[list[str]], argparse.Namespace]) -> None:
    """In the command itself (name is its __name__), end with one line if parse_args() raises ValueError for
    the flags, or check_files()."""
    answer_flags(name, lambda argv: check_files(parse_args(argv)))


def need(package: str, user: str) -> None:
    """ValueError if a package of requirements-eval.txt is not installed. user: what needs it."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is not installed, and {user} needs it: "
                         "pip install -r requirements-eval.txt")


class Parser(flags.Parser):
    """Of an evaluation command."""

    def __init__(self, module: str, doc: str) -> None:
        super().__init__(prog=f"python -m eval.{module}", description=doc.split("\n\n")[0],
                         allow_abbrev=False)

    def add_model_flags(self, several: bool = False) -> None:
        self.add_argument("--model", required=True, nargs="+" if several else None, metavar="DIR",
                          help="checkpoint folder" + ("s" if several else "") + " or hub id, e.g. RUN/final")
        self.add_common_flags()

    def add_common_flags(self) -> None:
        self.add_argument("--template", default="auto", help=HELP["template"])
        self.add_argument("--date", default="", help="YYYY-MM-DD for templates that print the date")
        self.add_argument("--dtype", choices=COMPUTE_DTYPES, default="auto", help=HELP["dtype"])
        self.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        self.add_argument("--json", metavar="FILE", help="write the result there too")

    def add_columns_flag(self) -> None:
        self.add_argument("--columns", nargs="+", default=[], metavar="KNOWN=NAME", help=HELP["columns"])

    def add_max_length_flag(self) -> None:
        self.add_argument("--max-length", type=number(int, 2), default=2048, help=HELP["max_length"])

    def add_data_flags(self) -> None:
        """What spans.load_data(), evaluate() and compare() need, other than --data."""
        self.add_columns_flag()
        self.add_max_length_flag()
        self.add_argument("--overlong", choices=OVERLONG, default="truncate", help=HELP["overlong"])
        self.add_argument("--micro-batch-tokens", type=number(int, 1), default=4096,
                          help="tokens of one forward pass; changes memory and speed only")
        self.add_argument("--cache-dir", default=CACHE_DIR, help=HELP["cache_dir"])
        self.add_bootstrap_flags()

    def add_bootstrap_flags(self) -> None:
        self.add_argument("--bootstrap", type=number(int, 0, 10**6), default=2000,
                          help="resamples for the intervals; 0: none")
        self.add_argument("--confidence", type=number(float, 0.01, 0.9999), default=0.95,
                          help="of the intervals")
        self.add_seed_flag("of the resamples")

    def add_seed_flag(self, help: str) -> None:
        self.add_argument("--seed", type=number(int, 0), default=0, help=help)

    def add_batch_flag(self) -> None:
        self.add_argument("--batch-size", type=number(int, 1, 10**5), default=16,
                          help="answers generated at once")

    def add_answer_flags(self, max_new_tokens: int | None = 256, help: str = "the most tokens of an answer"
                         ) -> None:
        """Of a command that answers the prompts of a file. max_new_tokens: the default, and its help."""
        self.add_argument("--limit", type=number(int, 1), metavar="N", help="use only the first N")
        self.add_batch_flag()
        self.add_argument("--max-new-tokens", type=number(int, 1, 10**6), default=max_new_tokens, help=help)
        self.add_seed_flag("of what is sampled")

    def add_sampling_flags(self) -> None:
        self.add_argument("--samples", type=number(int, 1, 10**4), default=1, help="answers to each prompt")
        self.add_argument("--temperature", type=number(float, 0), default=0.0,
                          help="0: always the likeliest token")
        self.add_argument("--top-p", type=number(float, 1e-6, 1), default=1.0,
                          help="sample from the likeliest, of this mass")


# What is read in the folder of a model, a checkpoint or a run that a flag names.
READ_IN_FOLDERS = (*HUB_FILES, INDEX, "*.safetensors", "state.json", "identity.json", "run_config.json",
                   "metrics.jsonl", "eval.jsonl")


# What commands write next to their --output, or resume from.
BESIDE_OUTPUT = ("", ".settings.json", ".answers", ".answers.settings.json", ".judgments",
                 ".judgments.settings.json")


def files_used(name: str, value: str) -> list[str | Path]:
    """The files on this disk that a flag's value stands for, as far as a program uses them. name: of the
    flag. ValueError if there are none of the records that it names."""
    if name in RECORDS:
        try:
            return local_files(value)
        except ValueError as error:
            raise ValueError(f"{flags.flag_name(name)} {error}") from None
    if name == "local":
        value = value.partition("=")[2]
    if name == "output":
        return [value + end for end in BESIDE_OUTPUT]
    if not os.path.isdir(value):
        return [value]
    # Results are eval.compare's only.
    patterns = (*READ_IN_FOLDERS, *["eval/*.json"] * (name == "runs"))
    return [file for pattern in patterns for file in Path(value).glob(pattern)]


def check_paths(args: argparse.Namespace, *outputs: str) -> None:
    """ValueError that names the flag: a file that --data names twice; an output file, of the flags `outputs`,
    that could not be written, or that another flag's value stands for and that would be lost."""
    data = getattr(args, "data", None)
    if isinstance(data, list):
        check_once("data", data, data)
    # Now, not when all has been computed.
    files = {name: os.path.realpath(file) for name in outputs if (file := getattr(args, name))}
    for name in files if is_main() else ():
        check_writable(flags.flag_name(name), getattr(args, name))
    for other, value in vars(args).items() if files else ():
        given = [each for each in (value if isinstance(value, list) else [value])
                 if isinstance(each, str) and each]
        taken = {os.path.realpath(file) for each in given for file in files_used(other, each)}
        for name, file in files.items():
            if other != name and file in taken:
                # The only one without a flag.
                by = "RUN" if other == "runs" else flags.flag_name(other)
                raise ValueError(f"{flags.flag_name(name)} {getattr(args, name)}: {by} names this file, too; "
                                 "give another")
