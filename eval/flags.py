"""Flags of the evaluation commands, and their errors before PyTorch is imported, which takes seconds.

    args = parse_args(argv)                 # with a Parser; each command has its own
    answer_command(__name__, parse_args)    # and only then the imports that need PyTorch
"""
import argparse
import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from config import CACHE_DIR, COMPUTE_DTYPES, RECORDS, Config, check_files, local_files
from runtime import flags
from runtime.files import check_writable
from runtime.foreign import shorten
from runtime.model_folder import HUB_FILES, INDEX
from runtime.start import answer_flags, is_main

# Of the flags of a run, some of which the commands have too.
HELP = {field.name: field.metadata["help"] for field in dataclasses.fields(Config)}
LOOKUP = 3      # the most tokens that are guessed for a document in a step of generation
# Numbers that cost memory or time as such, and what they may be at most. Other numbers end at flags.BELOW.
MOST = {"answers": 10**4, "batch_size": 10**5, "bootstrap": 10**6, "judge_workers": 10**4, "k": 10**4,
        "max_new_tokens": 10**6, "samples": 10**4}


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

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        """ValueError for a number that no flag may have; check_values() has each flag's own limits."""
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float):
                    most = MOST.get(name, flags.BELOW.get(type(number), 1))
                    # Written so that NaN fails.
                    if not abs(number) <= most:
                        raise ValueError(f"{flags.flag_name(name)} {shorten(str(number), 100)}: must be a "
                                         f"number up to {most:,.15g}")
        return args

    def add_model_flags(self, several: bool = False) -> None:
        self.add_argument("--model", required=True, nargs="+" if several else None, metavar="DIR",
                          help="checkpoint folder" + ("s" if several else "") + " or hub id, e.g. RUN/final")
        self.add_common_flags()

    def add_columns_flag(self) -> None:
        self.add_argument("--columns", nargs="+", default=[], metavar="KNOWN=NAME", help=HELP["columns"])

    def add_common_flags(self) -> None:
        self.add_argument("--template", default="auto", help=HELP["template"])
        self.add_argument("--date", default="", help="YYYY-MM-DD for templates that print the date")
        self.add_argument("--dtype", choices=COMPUTE_DTYPES, default="auto", help=HELP["dtype"])
        self.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        self.add_argument("--json", metavar="FILE", help="write the result there too")


# What is read in the folder of a model, a checkpoint or a run that a flag names.
READ_IN_FOLDERS = (*HUB_FILES, INDEX, "*.safetensors", "state.json", "identity.json", "run_config.json",
                   "metrics.jsonl", "eval.jsonl")


def files_read(name: str, value: str) -> list[str | Path]:
    """The files on this disk that a flag's value stands for, as far as a program reads them. name: of the
    flag. ValueError if there are none of the records that it names."""
    if name in RECORDS:
        try:
            return local_files(value)
        except ValueError as error:
            raise ValueError(f"{flags.flag_name(name)} {error}") from None
    if name == "local":
        value = value.partition("=")[2]
    if not os.path.isdir(value):
        return [value]
    # Results are eval.compare's only.
    patterns = (*READ_IN_FOLDERS, *["eval/*.json"] * (name == "runs"))
    return [file for pattern in patterns for file in Path(value).glob(pattern)]


def check_values(args: argparse.Namespace, files: Iterable[str], **limits: float | tuple[float, float]
                 ) -> None:
    """ValueError that names the flag: a number outside its limits, `least` or (least, most); an output file
    that could not be written, or that another flag's value stands for and that would be lost."""
    for name, limit in limits.items():
        value = getattr(args, name)
        least, most = limit if isinstance(limit, tuple) else (limit, math.inf)
        # Written so that NaN fails.
        if value is not None and not least <= value <= most:
            raise ValueError(f"{flags.flag_name(name)} {value}: must be {flags.bounds(least, most)}")
    # Now, not when all has been computed.
    outputs = {name: os.path.realpath(file) for name in files if (file := getattr(args, name))}
    for name in outputs if is_main() else ():
        check_writable(flags.flag_name(name), getattr(args, name))
    for other, value in vars(args).items() if outputs else ():
        given = [each for each in (value if isinstance(value, list) else [value])
                 if isinstance(each, str) and each]
        taken = {os.path.realpath(file) for each in given for file in files_read(other, each)}
        for name, file in outputs.items():
            if other != name and file in taken:
                # The only one without a flag.
                by = "RUN" if other == "runs" else flags.flag_name(other)
                raise ValueError(f"{flags.flag_name(name)} {getattr(args, name)}: {by} names this file, too; "
                                 "give another")


def add_data_flags(parser: Parser) -> None:
    """The flags that load_data, evaluate and compare need, other than --data."""
    parser.add_columns_flag()
    parser.add_argument("--max-length", type=int, default=2048, help="tokens an example may have")
    parser.add_argument("--overlong", choices=("truncate", "drop", "error"), default="truncate",
                        help="what to do with longer ones")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096,
                        help="tokens of one forward pass; changes memory and speed only")
    parser.add_argument("--cache-dir", default=CACHE_DIR, help=HELP["cache_dir"])
    add_bootstrap_flags(parser)


def add_bootstrap_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bootstrap", type=int, default=2000, help="resamples for the intervals; 0: none")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")


def check_flags(args: argparse.Namespace, files: tuple[str, ...], **least: int) -> None:
    """check_values(), also for --data and the flags of add_bootstrap_flags()."""
    if len({os.path.realpath(file) for file in args.data}) < len(args.data):
        raise ValueError(f"--data {' '.join(args.data)}: a file is given twice; give each once")
    check_values(args, files, bootstrap=0, seed=0, **least)
    if not 0 < args.confidence < 1:
        raise ValueError(f"--confidence {args.confidence}: must be above 0 and below 1")
