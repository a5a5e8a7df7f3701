"""Flags of a program from a dataclass: a field is a flag, with its help, choices and limits.

    @dataclass
    class Config:
        lr: float = flag(2e-5, "peak learning rate", above=0)

    given_flags(Config, ["--lr", "1e-4"], "train.py", "Train a model.")     -> {"lr": 0.0001}

The values of a --config file go through the same checks as those of the command line. Flags of other trainers
are answered with what does the same here (runtime/habits.py).
"""
import argparse
import dataclasses
import datetime
import math
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import get_origin

from runtime.foreign import parse_json, read_text, shorten, shown
from runtime.habits import answer
from runtime.start import warn_once

LARGEST = 2**20     # characters of a --config file
# What a number may be at most where a flag does not say: far beyond any use, and nothing overflows.
BELOW = {int: 2**31, float: 1e9}
NEGATIVE = re.compile(r"-([0-9]|\.[0-9]|inf(inity)?$|nan$)", re.IGNORECASE)


def flag(default: object, help: str, *, choices: tuple[str, ...] = (), least: float | None = None,
         above: float | None = None, below: float | None = None, free: bool = False, in_file: bool = True,
         **more: object) -> object:
    """A field of a dataclass of flags.

    choices, least, above, below: what the value may be (by default below BELOW); free: whether it may change
    on resume, because it decides where results go, how fast or what is shown, but not, rounding apart, the
    weights; in_file: whether a --config file may set it; more: as for argparse's add_argument().
    """
    make = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**make, metadata={
        "help": help, "choices": choices, "limits": (least, above, below), "free": free, "in_file": in_file,
        "more": more})


def flag_name(field: str) -> str:
    """max_length -> --max-length"""
    return "--" + field.replace("_", "-")


def is_boolean(field: dataclasses.Field) -> bool:
    return field.type in (bool, bool | None)


def is_list(field: dataclasses.Field) -> bool:
    return get_origin(field.type) is list


def check_flag(field: dataclasses.Field, value: object, kind: object = None) -> object:
    """A flag's value from a command line (text) or from JSON, converted to the flag's type, or to kind.
    ValueError names the flag, the value and what it may be."""
    kind = kind or field.type
    if kind == list[float]:
        return [check_flag(field, item, float) for item in (value if isinstance(value, list) else [value])]

    def refuse(limit: str) -> None:
        plain = isinstance(value, str) and value and not is_boolean(field)
        raise ValueError(f"{flag_name(field.name)} {shorten(value, 200) if plain else shown(value)}: must be "
                         f"{limit}")

    if kind == list[str]:
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            refuse(f"one {field.metadata['more'].get('metavar') or 'name'} or a list of them")
        return value
    if is_boolean(field):
        if not isinstance(value, bool):
            refuse("true or false")
        return value
    choices, (least, above, below) = field.metadata["choices"], field.metadata["limits"]
    if kind is str:
        if choices and value not in choices:
            refuse(f"one of {', '.join(choices)}")
        if not isinstance(value, str) or not value:
            refuse("text, and not empty")
        return value
    kind = int if kind is int else float
    limit = "a whole number" if kind is int else "a finite number"
    limit += (f", {least} or more" if least is not None else f" above {above}" if above is not None else "")
    if below is not None:
        limit += f" and below {below:,.15g}"
    # From its text, because int(True) and int(1.5) are 1. Python also reads 1_0, and any script's digits.
    text = str(value)
    if not re.fullmatch(r"[-+]?([0-9.]+(e[-+]?[0-9]+)?|nan|inf|infinity)", text, re.IGNORECASE):
        refuse(limit)
    try:
        # Other trainers write 3.0 for 3.
        number = kind(re.sub(r"\.0*$", "", text) if kind is int else text)
    except ValueError:
        refuse(limit)
    # Written so that NaN fails.
    if not ((least is None or number >= least) and (above is None or number > above)):
        refuse(limit)
    if not number < (BELOW[kind] if below is None else below):
        refuse(limit if below is not None or number == math.inf else f"{limit} and below {BELOW[kind]:,.15g}")
    return number


def at_home(value: object) -> object:
    """A text or a list of texts with the home folder in place of a ~ at the start, as a shell puts it there,
    but not behind "=" and not in a file."""
    if isinstance(value, list):
        return [*map(at_home, value)]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def number(kind: type, least: float, most: float | None = None) -> Callable[[str], float]:
    """The type of an argument of Parser: a number of this kind within these limits; most: None for BELOW."""
    highest = BELOW[kind] if most is None else most

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        # Written so that NaN fails.
        if not least <= value <= highest:
            what = "a whole number" if kind is int else "a number"
            far = most is not None or value > highest
            limits = f" from {least:,} to {highest:,.15g}" if far else f", {least:,} or more"
            raise argparse.ArgumentTypeError(f"{shorten(text, 100)}: must be {what}{limits}")
        return value
    return read


class Parser(argparse.ArgumentParser):
    """Raises ValueError instead of ending the program, so that one place prints all errors. fields: of those
    flags that check_flag() checks, by their names."""
    fields: dict[str, dataclasses.Field] = {}

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        # argparse takes -5 for a value, but -1e-5 and -inf for flags.
        self._negative_number_matcher = NEGATIVE

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """Every flag of the program, --no-NAME too."""
        return self._option_string_actions

    def error(self, message: str) -> None:
        # argparse's words become those of check_flag().
        message = re.sub(r"^argument (\S+): ", r"\1 ", message)
        message = re.sub(r"invalid \w+ value: '(.*)'$", r"\1: must be a number", message)
        message = re.sub(r"invalid choice: '(.*)' \(choose from (.+)\)$",
                         lambda match: f"{match[1]}: must be one of {match[2]}".replace("'", ""), message)
        raise ValueError(f"{shorten(message)} ({self.prog} --help lists the flags)")

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        # Before argparse, which would first complain about a required flag that was given under another name.
        known = self.flags
        answers = []
        for word, after in zip(argv, [*argv[1:], "--"]):
            name, equals, value = word.partition("=")
            if name == "--":
                break
            if name.startswith("--") and " " not in name and name not in known:
                following = None if after.startswith("--") else after
                answers.append(answer(name, value if equals else following, known, self.limit))
        if answers:
            raise ValueError("\n  ".join(answers) + f"\n({self.prog} --help lists the flags)")
        argv = [name + equals + at_home(value) if name.startswith("--") else name + equals + value
                for name, equals, value in (word.partition("=") for word in argv)]
        self._refuse_repeated(argv)
        args, others = self.parse_known_args(argv)
        if others and "--config" in known and Path(others[0]).suffix in (".json", ".toml", ".yaml", ".yml"):
            raise ValueError(f"{shorten(others[0], 200)}: a file of flags is given as --config FILE")
        for other in others:
            # What stands behind a flag that is only named, such as "--recompute true".
            before = argv[argv.index(other) - 1]
            if before in known and known[before].nargs == 0:
                raise ValueError(f"{before} {shorten(other, 100)}: must be {self.limit(before, other)}")
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return args

    def limit(self, name: str, value: str) -> str:
        """What a flag of this program must be, if it cannot have this value; "" if it can, as far as that is
        known here."""
        action = self.flags[name]
        if action.nargs == 0:
            off = f"--no-{name[2:]}"
            return f"given without a value: {name}" + f" or {off}" * (off in self.flags)
        try:
            if action.dest in self.fields:
                check_flag(self.fields[action.dest], value)
            elif action.choices and value not in action.choices:
                return f"one of {', '.join(action.choices)}"
            elif action.type:
                action.type(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            return str(error).rpartition(": must be ")[2] if ": must be " in str(error) else "a number"
        return ""

    def _refuse_repeated(self, argv: list[str]) -> None:
        """ValueError for --config, and for a flag that takes several values, if it is given more than once:
        argparse would keep the last only, and a run would silently train on the last file."""
        given = [word.partition("=")[0] for word in argv]
        for name, action in self.flags.items():
            several = action.nargs == "+"
            if given.count(name) > 1 and (several or name == "--config"):
                fix = f"write all its values behind one {name}" if several else "write all flags in one file"
                raise ValueError(f"{name} is given more than once; {fix}")


def given_flags(flags: type, argv: list[str], prog: str, description: str,
                either: tuple[str, ...] = ()) -> dict[str, object]:
    """The flags that are given, checked: those on the command line override those in --config's file. flags:
    the dataclass; either: flags that exclude each other, so that one of them overrides all in the file.
    ValueError for unknown or abbreviated flags and for values that a flag may not have."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    parser.fields = fields = {field.name: field for field in dataclasses.fields(flags)}
    own = [flag_name(name) for name, field in fields.items() if not field.metadata["in_file"]]
    parser.add_argument("--config", metavar="FILE",
                        help="flags in a .json, .toml or .yaml file, such as a run's run_config.json, which "
                        "repeats it; flags on the command line override it"
                        + (f"; {' and '.join(own)} count there only" if own else ""))
    for field in fields.values():
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        help = field.metadata["help"]
        if default is not False and default not in ("", None, []):
            help += f" (default {default})"
        more = dict(field.metadata["more"])
        if is_boolean(field):
            more["action"] = argparse.BooleanOptionalAction
        elif is_list(field):
            more["nargs"] = "+"
        if field.metadata["choices"]:
            more["metavar"] = "{" + ",".join(field.metadata["choices"]) + "}"
        parser.add_argument(flag_name(field.name), help=help.replace("%", "%%"), **more)
    given = vars(parser.parse_args(argv))
    saved = _saved_flags(given.pop("config"), parser) if "config" in given else {}
    if given.keys() & {*either}:
        saved = {name: value for name, value in saved.items() if name not in either}
    return saved | {name: check_flag(fields[name], value) for name, value in given.items()}


def _saved_flags(file: str, parser: Parser) -> dict[str, object]:
    """The flags in a --config file. null and an empty list mean absent; flags that only a command line may
    give (to delete a run, say) are ignored, with a warning if they are not what they are by default."""
    fields = parser.fields
    if not file:
        raise ValueError('--config "": is empty; give a file, such as run_config.json in the folder of a run')
    try:
        saved: dict[str, object] = {}
        unknown = []
        for given, value in _pairs_in(file):
            name = given.removeprefix("--").replace("-", "_")
            if name in saved:
                raise ValueError(f"{name} is given more than once")
            # A date, which JSON writes as text.
            saved[name] = value.isoformat() if isinstance(value, datetime.date) else value
            if name == "config":
                unknown.append(f"{given}: a file of flags cannot name another one")
            elif name not in fields and isinstance(value, dict):
                unknown.append(f"{given}: a table; write the flags without one")
            elif name not in fields:
                text = str(value) if isinstance(value, str | int | float) else None
                unknown.append(answer(given, text, parser.flags, parser.limit))
        if unknown:
            raise ValueError("unknown flags:\n  " + "\n  ".join(unknown))
        for name, value in saved.items():
            if not fields[name].metadata["in_file"] and value not in (None, fields[name].default):
                warn_once(f"--config {file}: {flag_name(name)} counts on the command line only; the "
                          "file's is ignored")
        return {name: check_flag(fields[name], value) for name, value in saved.items()
                if fields[name].metadata["in_file"] and value is not None and not (
                    value == [] and is_list(fields[name]))}
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{file}: ")
        raise ValueError(f"--config {file}: {reason}") from None


def _pairs_in(file: str) -> list[tuple[str, object]]:
    """The names and values in a file, also of names that it has twice. The name's ending tells the format:
    all but .toml, .yaml and .yml are read as JSON. ValueError if it is not of this format."""
    if Path(file).is_dir():
        raise ValueError("is a folder; give a file, such as run_config.json in the folder of a run")
    text = read_text(file, "utf-8-sig", LARGEST)
    if not text.strip():
        raise ValueError("is empty")
    ending = Path(file).suffix.lower()
    if ending in (".yaml", ".yml"):
        return _pairs_in_yaml(text)
    try:
        if ending == ".toml":
            return list(tomllib.loads(text).items())
        pairs = parse_json(text, object_pairs_hook=_Pairs)
    except ValueError as error:
        format = {".toml": "TOML", ".json": "JSON"}.get(ending, "JSON (nor .toml or .yaml by its name)")
        raise ValueError(f"is not {format}, or is cut off: {error}") from None
    if not isinstance(pairs, _Pairs):
        raise ValueError("must be one JSON object, {\"flag\": value, ...}")
    return [(name, dict(value) if isinstance(value, _Pairs) else value) for name, value in pairs]


class _Pairs(list):
    """A JSON object's names and values, so that a name that it has twice is noticed."""


def _pairs_in_yaml(text: str) -> list[tuple[str, object]]:
    try:
        import yaml
    except ImportError:
        raise ValueError("YAML needs PyYAML: pip install pyyaml; or write it as JSON or TOML") from None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode)
                                                             for key, _ in node.value):
            raise ValueError("must be one mapping, flag: value, in which every flag is text")
        pairs = []
        for key, value in node.value:
            try:
                pairs.append((str(key.value), loader.construct_object(value, deep=True)))
            except (ValueError, LookupError, AttributeError) as error:
                # What PyYAML raises for 2024-99-01, !!bool x and !!timestamp x.
                name = flag_name(str(key.value).removeprefix("--"))
                written = shorten(text[value.start_mark.index:value.end_mark.index], 200)
                raise ValueError(f"{name} {written}: cannot be read ({error}); put text in quotes") from None
        return pairs
    except yaml.YAMLError as error:
        raise ValueError("is not YAML: " + " ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("is nested too deep") from None
