"""Records -> messages: the files that people have, the ways in which they hold records, and their layouts.

    for messages, file, line in read_all(["shards/", "more.jsonl.gz", "owner/name:train"]):
        ...         # messages: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

Three steps: data_files() finds the files that a name stands for, read_records() reads one of them a record at
a time, and to_messages() recognizes a record's layout (LAYOUTS). Nothing is read into memory as a whole.
"""
import ast
import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Container, Iterable, Iterator
from functools import cache, partial
from itertools import chain
from types import ModuleType
from typing import BinaryIO, NoReturn

from chat import ROLES
from runtime.foreign import (MAX_LINE, TOO_DEEP, about_pointer, check_depth, check_file, is_file, parse_json,
                             shorten, shown)
from runtime.model_folder import download
from runtime.start import warn_once, world_size

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant",
                  "observation": "tool"}

# The layouts of a record, by their fields: those of the question, joined with a blank line, then that of the
# answer; "?" marks a field that may be missing. A single field holds the whole conversation. Another layout
# is another row.
LAYOUTS = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "input?", "output"),        # Alpaca
    ("instruction", "context?", "response"),    # Dolly
    ("prompt", "response"),
    ("question", "answer"),
    ("input", "output"),
)
# What --columns may name: the fields of all layouts, and the system prompt.
FIELDS = *dict.fromkeys(field.removesuffix("?") for layout in LAYOUTS for field in layout), "system"
# Other fields whose text belongs to the conversation. ("answer" is not among them: next to another layout it
# is usually the short form of an answer, to check it by.)
CONVERSATION_FIELDS = ("prompt", "completion", "instruction", "input", "output", "context", "question",
                       "response", "suffix", "system_message", "developer")

# A message's switches in other trainers that decide whether it is trained, with the value that says yes.
TRAINS = {"weight": 1, "train": 1, "training": 1, "trainable": 1, "loss": 1, "mask": 0, "masked": 0}
# These and other switches, with the value that changes nothing here.
NEUTRAL = TRAINS | {"label": 1, "prefix": 0, "add_generation_prompt": 0, "continue_final_message": 0,
                    "supervise": 1, "include": 1, "ignore": 0, "skip": 0}
# Values that say nothing: an empty list may have become text in a table.
EMPTY = ("", [], {}, "[]", "{}", "null")
# Fields of a pair of preferences.
PREFERENCE = r"(chosen|rejected)(_\w+)?"
# Other fields that change what is trained or served elsewhere: {pattern of the name: why it is refused}.
REFUSED = {
    r"""(reasoning|thinking|thoughts?)(_\w+)?
      | (tool|function)_calls?
    """: "which this trainer does not render: write what the model should say into the 'content', "
         "'reasoning_content' or 'tool_calls' of an assistant's message",
    r"""(\w+_)?tools
      | tool_choice | functions | documents | history
      | (image|audio|video)s?(_urls?|_paths?)?
      | chat_template | (chat_)?template_kwargs | (enable|disable)_thinking
      | prefix | prefill | add_generation_prompt | continue_final_message
    """: "which would not be trained as it is served: write it into the messages as text, or remove it",
    rf"""(train|training|trainable|loss|masks?|masked)(_\w+)?
      | (\w+_)?loss_(mask|scale|weight)s?
      | ((sample|example|token|turn)_)?weights?
      | labels? | {PREFERENCE}
      | (is|do|no|to|should|compute|with)_?(train\w*|loss)
      | supervised? | include | ignored? | skip(ped)? | channel
    """: "which would change here what is trained: mark messages that are not to be trained with "
         "\"weight\": 0, leave out records that are not, and remove the field",
}

KINDS_OF_FILE = "jsonl", "ndjson", "json", "csv", "tsv", "parquet"
RECORDS_FILE = re.compile(rf".+\.({'|'.join(KINDS_OF_FILE)})(\.gz|\.zst)?", re.IGNORECASE | re.DOTALL)
READ = "JSON, JSON Lines, .csv and .parquet files, plain or as .gz or .zst"
# owner/name:split@revision
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?(?:@([\w./-]+))?")
# What dataset tools write next to records.
METADATA = "dataset_info.json", "dataset_infos.json"
# Files that are taken for records, by their first characters, and what to do.
OTHER_FILES = {"PK": "a zip archive: unpack it, or, if it is a workbook, save it as CSV in UTF-8",
               "ARROW1": "an Arrow file: write it with to_parquet() or to_json()",
               "<": "a web page or XML, not what the link promised: download it again"}
# Splits by their names in a path: those that are not trained on, and train_sft and the like.
OTHER_SPLIT = re.compile(r"(?<![a-z])(test|valid|validation|dev|eval)(?![a-z])", re.IGNORECASE)
PART_OF_TRAIN = re.compile(r"(?<![a-z])train(_[a-z]+)+", re.IGNORECASE)
WHITESPACE = re.compile(r"[ \t\r\n]*")
CHUNK = 2**20
BATCH_BYTES = 2**24     # of a Parquet file's rows, decoded at once


@contextlib.contextmanager
def naming(place: str) -> Iterator[None]:
    """Puts the place, such as FILE:LINE, in front of a ValueError's message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


# ---------------------------------------------------------------- names -> files


class _StandardInput(os.PathLike):
    """A copy of standard input: a path for whoever opens it, and a name in messages."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
            file.flush()
            # The file has no name, so it is freed when this process ends, however it ends.
            self.path = f"/dev/fd/{os.dup(file.fileno())}"

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return "standard input"


def data_files(names: Iterable[str | os.PathLike]) -> list[str | os.PathLike]:
    """The files that these names of --train-data, --eval-data or --data stand for, in a fixed order. A name
    is, in the order in which it is tried:

        -                               standard input, as one file
        part.jsonl                      a file
        shards/                         the files of records in a folder, but not in folders within it
        shards/*.jsonl.gz               what matches; ** for folders within folders
        owner/name:split@revision       a split (default: train) of a dataset on the Hugging Face Hub

    The files of a folder and matches are sorted. ValueError if a name stands for nothing, or for files of
    several kinds.
    """
    return [file for name in names for file in _files_of(os.fspath(name))]


def _files_of(name: str) -> list[str | os.PathLike]:
    if name == "-":
        return [_standard_input()]
    if is_file(name):
        return [name]
    if os.path.isdir(name):
        return _files_in(name)
    if os.path.lexists(name):
        # Raises: it is neither.
        check_file(name)
    if glob.has_magic(name):
        found = sorted(filter(is_file, glob.glob(name, recursive=True)))
        if not found:
            raise ValueError(f"{name}: no file matches")
        return found
    if is_on_hub(name):
        return list(_files_on_hub(name))
    raise ValueError(f"{name}: no such file or folder")


def is_on_hub(name: str) -> bool:
    """Whether a name stands for a dataset on the hub, which only a download would tell more of."""
    # The name of a file, and a path into a folder that exists, are only misspelled.
    misspelled = RECORDS_FILE.fullmatch(name) or os.path.isdir(name.partition("/")[0])
    return HUB_NAME.fullmatch(name) is not None and not misspelled and not os.path.lexists(name)


def _files_in(folder: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if not name.startswith((".", "_")))
    if any(name.endswith(".arrow") for name in names) or "dataset_dict.json" in names:
        raise ValueError(f"{folder}: was written by save_to_disk(), whose files are not read here; write it "
                         "with load_from_disk(...).to_parquet(FILE) or to_json(FILE)")
    files = [os.path.join(folder, name) for name in names if _holds_records(name)]
    files = _of_one_kind(list(filter(is_file, files)), folder)
    with_folders_within = f"'{folder.rstrip('/')}/**/*.jsonl'"
    if not files:
        raise ValueError(f"{folder}: this folder holds no {READ}; for files in folders within it give "
                         f"{with_folders_within}")
    below = sorted(glob.glob(os.path.join(glob.escape(folder), "*", "*")))
    if left_out := next((file for file in below if _holds_records(os.path.basename(file))), None):
        warn_once(f"{folder}: folders within it are not read, such as {os.path.dirname(left_out)}; for their "
                  f"files, too, give {with_folders_within}")
    return files


def _holds_records(name: str) -> bool:
    """Whether a file of this name is one of records."""
    return RECORDS_FILE.fullmatch(name) is not None and name not in METADATA


def _of_one_kind(files: list[str], name: str) -> list[str]:
    """The files. ValueError if they are of several kinds, since these may be the same records twice."""
    kinds = sorted({RECORDS_FILE.fullmatch(file)[1].lower() for file in files})
    if len(kinds) > 1:
        raise ValueError(f"{name}: holds .{' and .'.join(kinds)} files, which may be the same records twice; "
                         "name the files to read")
    return files


@cache
def _standard_input() -> os.PathLike:
    """Standard input as a file that can be read more than once."""
    if world_size() > 1:
        raise ValueError("-: standard input reaches only one rank; write it to a file that all can read")
    return _StandardInput()


# Within a process a name stands for the same files, even if the repository changes.
@cache
def _files_on_hub(name: str) -> tuple[str, ...]:
    """The files of owner/name:split@revision. The split's name must be a word in their paths, as in
    data/train-00000-of-00002.parquet; :folder/split asks for a folder, too. Without a split in the name, and
    where no path has the word train, all files are train but those of other splits, such as test_sft."""
    repository, split, revision = HUB_NAME.fullmatch(name).groups()

    def files_like(pattern: str) -> dict[str, str]:
        """The files of records that were downloaded, by their paths within the repository."""
        patterns = [f"{pattern}.{kind}{end}" for kind in KINDS_OF_FILE for end in ("", ".gz", ".zst")]
        folder = download(name, repository, revision, patterns, repo_type="dataset")
        return {path.relative_to(folder).as_posix(): str(path) for path in sorted(folder.rglob("*"))
                if path.is_file() and _holds_records(path.name)}

    def has(path: str, word: str) -> bool:
        return re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z]|_[a-z])", path, re.IGNORECASE) is not None

    words = (split or "train").split("/")
    found = files_like(f"*{words[-1]}*")
    files = [path for path in found if all(has(path, word) for word in words)]
    if not files and not split:
        found = files_like("*")
        files = [path for path in found if not OTHER_SPLIT.search(path)]
        # train_sft and train_gen may be the same records for two purposes.
        if len({match[0].lower() for path in files for match in PART_OF_TRAIN.finditer(path)}) > 1:
            files = []
    if not files:
        known = ""
        if found:
            word = re.match(r"\w*", os.path.basename([*found][-1]))[0]
            known = f"; its files are {', '.join([*found][:8])}; give the split, as in {repository}:{word}"
        raise ValueError(f"{name}: holds no {'/'.join(words)} split in {READ}{known}")
    if len(parents := sorted({os.path.dirname(path) for path in files})) > 1:
        raise ValueError(f"{name}: the split is in several folders ({', '.join(parents)}); give one, as in "
                         f"{repository}:{parents[-1]}/{words[-1]}")
    return tuple(found[path] for path in _of_one_kind(files, name))


# ---------------------------------------------------------------- files -> records


def read_all(names: Iterable[str], columns: Iterable[str] = ()) -> Iterator[tuple[list[dict], str, int]]:
    """Yield (messages, file, line) for every record of the files that these names stand for (data_files());
    columns, errors: as for read_records()."""
    for file in data_files(names):
        for messages, line in read_records(file, columns):
            yield messages, str(file), line


def read_records(path: str | os.PathLike, columns: Iterable[str] = ()) -> Iterator[tuple[list[dict], int]]:
    """Yield (messages, line) for every record of a file. line counts from 1; in a list and in a Parquet file
    it is the record's number. messages is [{"role", "content"}, ...], with "weight": 0 on messages that are
    not to be trained, and with the other fields of the record's messages, which the template may read.

        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        {"prompt": "Hi", "completion": "Hello"}
        {"instruction": "Translate.", "input": "Hi", "output": "Salut"}      user: "Translate.\\n\\nHi"

    LAYOUTS has all of them. JSON may be one record after the other or a list of them, whatever the file's
    name; .csv and .tsv have a header; Parquet needs pyarrow. All may be compressed with gzip or Zstandard
    (which needs pyarrow, too), except Parquet, which compresses itself.

    "tools", definitions of functions as JSON Schema, may stand in the record or in its first message, where
    they are given back. An assistant's message may have "tool_calls" and "reasoning_content"; role "tool"
    answers a call. "from": "function_call" is a call as JSON text, "observation" its answer.

    columns: KNOWN=NAME gives the record's field NAME the name of a known one (--columns). "train",
    "training", "trainable" or "loss": false and "mask" or "masked": true mean "weight": 0. Other fields that
    would change what is trained or served are refused (REFUSED). A field that is null or NaN is absent, at
    any depth, as is an empty cell of .csv; only the JSON text of tools and of a call's arguments keeps its
    nulls. A bad record is a ValueError with file, line and what is wrong with it.
    """
    names = parse_columns(columns)
    line = None
    for record, line, place in raw_records(path):
        with naming(f"{path}{place}"):
            messages = to_messages(_renamed(record, names))
        yield messages, line
    if line is None:
        raise ValueError(f"{path}: holds no records")


def parse_columns(columns: Iterable[str]) -> dict[str, str]:
    """--columns as {known name: name in the file}. ValueError for a name that is not known."""
    names: dict[str, str] = {}
    for text in columns:
        known, equals, name = text.partition("=")
        if not (equals and name):
            raise ValueError(f"--columns {text}: write KNOWN=NAME, such as prompt=query, with the name that "
                             "the field has in the file")
        if known not in FIELDS:
            raise ValueError(f"--columns {text}: {known!r} must be one of {', '.join(FIELDS)}")
        if re.search(rf",({'|'.join(FIELDS)})=", name):
            raise ValueError(f"--columns {text}: write KNOWN=NAME KNOWN=NAME, with spaces and no commas")
        if known in names:
            raise ValueError(f"--columns {text}: {known!r} is given twice; give it once")
        names[known] = name
    return names


def _renamed(record: object, names: dict[str, str]) -> object:
    """The record with the fields that --columns names under their known names."""
    if not isinstance(record, dict) or not names:
        return record
    given = {known: record[name] for known, name in names.items() if name in record}
    others = {field: value for field, value in record.items() if field not in names.values()}
    if "chosen" in names.values():
        # The other answer of a pair of preferences, and what is said about both answers.
        others = {field: value for field, value in others.items() if not re.fullmatch(PREFERENCE, field)}
    return others | given


def raw_records(path: str | os.PathLike) -> Iterator[tuple[object, int, str]]:
    """Yield a file's records as JSON values, each with its line or number, and that as the end of a place.
    What a file is shows in its first bytes; only .csv and .tsv are told by the name. ValueError with the
    place for what cannot be read."""
    try:
        yield from _values_in(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read, or is damaged or cut short: {reason}") from None


def _values_in(path: str | os.PathLike) -> Iterator[tuple[object, int, str]]:
    check_file(path)
    if problem := about_pointer(path):
        raise ValueError(problem)
    with open(path, "rb") as raw:
        start = raw.read(4)
        raw.seek(0)
        plain_name = re.sub(r"\.(gz|zst)$", "", str(path).lower())
        if start == b"PAR1":
            yield from _from_parquet(path)
            return
        if plain_name.endswith(".parquet") and start:
            raise ValueError(f"{path}: is not a Parquet file: it does not begin with PAR1")
        if start[:2] == b"\x1f\x8b":
            raw = gzip.open(raw)
        elif start == b"\x28\xb5\x2f\xfd":
            raw = _pyarrow(path).input_stream(os.fspath(path), compression="zstd")
        if plain_name.endswith((".csv", ".tsv")):
            yield from _from_csv(path, raw, "\t" if plain_name.endswith(".tsv") else ",")
        else:
            yield from _from_json(_JsonStream(path, raw))


def _pyarrow(path: str | os.PathLike) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: pyarrow is not installed, and Parquet and Zstandard files need it: "
                         "pip install pyarrow") from None
    return pyarrow


def _from_parquet(path: str | os.PathLike) -> Iterator[tuple[dict, int, str]]:
    pyarrow, number = _pyarrow(path), 0
    try:
        with pyarrow.parquet.ParquetFile(os.fspath(path), memory_map=True,
                                         page_checksum_verification=True) as file:
            _check_names(file.schema_arrow.names)
            for group in range(file.num_row_groups):
                # As many rows as have BATCH_BYTES on average are decoded at once.
                size = file.metadata.row_group(group)
                rows = BATCH_BYTES * size.num_rows // max(1, size.total_byte_size)
                for batch in file.iter_batches(min(max(rows, 1), 256), row_groups=[group]):
                    for record in batch.to_pylist():
                        number += 1
                        yield record, number, f": record {number}"
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: is damaged, after record {number}: {error}") from None


def _check_names(columns: list[str]) -> None:
    """ValueError if two columns of a table have the same name."""
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"the header has {', '.join(map(repr, twice))} more than once")


def _from_csv(path: str | os.PathLike, raw: BinaryIO, delimiter: str) -> Iterator[tuple[dict, int, str]]:
    """Rows without text, which spreadsheets leave, and columns without a name, such as the numbers of rows
    that pandas writes, are left out."""
    csv.field_size_limit(MAX_LINE)
    # Decoding runs ahead of the rows, so what is not UTF-8 passes as surrogates until its line is reached.
    text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
    # Never more of a line at once than a cell may have.
    lines = iter(partial(text.readline, MAX_LINE), "")
    lines = (line.encode(errors="surrogateescape").decode() for line in lines)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header, line = None, 1
    try:
        while (row := next(rows, None)) is not None:
            if header is None:
                header = [name.strip() for name in row]
                _check_names(list(filter(None, header)))
                if len(row) == 1 and any(other in row[0] for other in ";\t|"):
                    raise ValueError(f"the header is one cell, {shorten(repr(row[0]), 200)}: separate "
                                     "cells with commas, or with tabs in a file named .tsv")
            elif any(row):
                if len(row) != len(header):
                    raise ValueError(f"has {len(row)} cell{'s' * (len(row) != 1)}, and the header has "
                                     f"{len(header)}")
                yield {name: cell or None for name, cell in zip(header, row) if name}, line, f":{line}"
            # A cell may have several lines.
            line = rows.line_num + 1
    except UnicodeDecodeError as error:
        # A row may have several lines.
        raise ValueError(f"{path}:{rows.line_num + 1}: {_not_text(error)}") from None
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}:{line}: {error}") from None


def _not_text(error: UnicodeDecodeError) -> str:
    return (f"is not text in UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason}); save "
            f"it as UTF-8. Records are read from {READ}")


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. ValueError if it has a field twice, of which json.loads would take the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {shorten(repr(twice), 100)} more than once: keep one of them")
    return fields


class _JsonStream:
    """Decodes the JSON values of a file one after the other, of which it holds one and a chunk."""
    decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode

    def __init__(self, path: str | os.PathLike, raw: BinaryIO) -> None:
        self.path, self.raw, self.to_text = path, raw, codecs.getincrementaldecoder("utf-8-sig")()
        # The text that was read and not used, where it goes on, and in which line that is.
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def fail(self, at: int, reason: str) -> NoReturn:
        """ValueError for what is wrong at this place of the text."""
        line = self.line + self.text.count("\n", self.at, at)
        raise ValueError(f"{self.path}:{line}: {reason}") from None

    def other_file(self) -> str:
        """What a file that does not begin with JSON may be."""
        begins = self.text[self.at:self.at + 8]
        return next((f"; it is {what}" for start, what in OTHER_FILES.items() if begins.startswith(start)),
                    f"; {READ} are read, and .csv and .tsv are told by the name")

    def read_on(self) -> bool:
        """Read as much again as there is, and at least a chunk. False at the end of the file."""
        if not self.ended:
            self.text, self.at = self.text[self.at:], 0
            data = self.raw.read(max(CHUNK, len(self.text)))
            self.ended = not data
            try:
                self.text += self.to_text.decode(data, final=self.ended)
            except UnicodeDecodeError as error:
                self.text += error.object[:error.start].decode()
                self.fail(len(self.text), _not_text(error))
        return not self.ended

    def peek(self) -> str:
        """The next character after whitespace, "" at the end of the file."""
        while True:
            end = WHITESPACE.match(self.text, self.at).end()
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            if end < len(self.text):
                return self.text[end]
            if not self.read_on():
                return ""

    def take(self, characters: str) -> str:
        """Take the next character after whitespace, which must be one of these."""
        if not (found := self.peek()) or found not in characters:
            self.fail(self.at, f"{' or '.join(map(repr, characters))} must follow, not {found!r}" if found
                      else "the list has no end: the file is cut short")
        self.at += 1
        return found

    def value(self) -> object:
        """Take the next value."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                check_depth(value)
                break
            except json.JSONDecodeError as error:
                # What was read may end within a value, or within a word like "false".
                cut = error.pos > len(self.text) - 8 or error.msg.startswith("Unterminated string")
                length, offset = len(self.text) - self.at, error.pos - self.at
                if cut and length > MAX_LINE:
                    end = len(self.text)
                    break
                if not cut or not self.read_on():
                    # Its "... at" stands before a position.
                    reason = error.msg.removesuffix(" at").removesuffix(" starting")
                    if self.line == 1 and not offset:
                        reason += self.other_file()
                    # Not in an empty line at the end.
                    place = min(self.at + offset, len(self.text.rstrip()))
                    if self.text.count("\n", self.at, place):
                        reason += f", in the record that begins in line {self.line}"
                    self.fail(place, f"is not JSON{', or is cut short' * cut}: {reason}")
            except RecursionError:
                self.fail(self.at, TOO_DEEP)
            except ValueError as error:
                self.fail(self.at, "a number has more digits than Python reads: write it as text"
                          if "integer string conversion" in str(error) else str(error))
        if end - self.at > MAX_LINE:
            self.fail(self.at, f"a record has more than {MAX_LINE:,} characters: split it, or leave it out")
        self.line += self.text.count("\n", self.at, end)
        self.at = end
        return value

    def values_of_list(self) -> Iterator[object]:
        """Take a list, value by value. It must have one."""
        self.take("[")
        if self.peek() == "]":
            self.fail(self.at, "holds an empty list, and no records")
        yield self.value()
        while self.take(",]") == ",":
            yield self.value()


def _from_json(stream: _JsonStream) -> Iterator[tuple[object, int, str]]:
    """One record after the other, or a list of records. A list of messages is a record."""
    last_line, line = 0, 1
    while start := stream.peek():
        if stream.line == last_line:
            stream.fail(stream.at, "a record must end with its line, and more follows here")
        line = stream.line
        if start == "[" and not last_line:
            values = stream.values_of_list()
            first = next(values)
            if not _is_message(first):
                for number, record in enumerate(chain([first], values), 1):
                    yield record, number, f": record {number}"
                if stream.peek():
                    stream.fail(stream.at, "more follows after the list of records")
                return
            record = [first, *values]
        else:
            record = stream.value()
        yield record, line, f":{line}"
        last_line = stream.line


# ---------------------------------------------------------------- records -> messages


def to_messages(record: dict | list) -> list[dict]:
    """The messages of a record in any of LAYOUTS, or of a list of messages. ValueError says what is wrong
    with the record."""
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object or a list of messages, not {_kind(record)}")
    nulls = [field for field in record if _is_null(record[field])]
    record = _present(record)
    tools = record.pop("tools", None)
    if "chosen" in record:
        raise ValueError("holds a pair of preferences, 'chosen' and 'rejected', and pairs are not trained; "
                         + _chosen_alone(record))
    _refuse(record, "the record")
    layout = _layout(record, nulls)
    messages = _with_system_prompt(_turns(record, layout), record)
    if not _says_nothing(tools):
        own = messages[0].get("tools")
        if not _says_nothing(own) and own != tools:
            raise ValueError("the record's 'tools' are not those of its first message: keep one of them")
        # A message keeps its fields wherever it goes.
        messages = [{**messages[0], "tools": tools}, *messages[1:]]
    messages = [_message(message, number) for number, message in enumerate(messages, 1)]
    _check_messages(messages, record, {*layout})
    return messages


def _turns(record: dict, layout: tuple[str, ...]) -> list[dict]:
    """The messages in the fields of a layout."""
    *question, answer = layout
    if question:
        return [*_question(record, question), *_side(record, answer, "assistant")]
    return _conversation(record, answer)


def _layout(record: dict, nulls: list[str]) -> tuple[str, ...]:
    """The record's layout: those of its fields that it has. ValueError if it has none, or several that say
    different things. nulls: fields that it has without a value."""
    fits = []
    for layout in LAYOUTS:
        if _has(record, layout):
            fields = [field.removesuffix("?") for field in layout]
            fits.append(tuple(field for field in fields if field in record))
    # Of Alpaca's fields two are a layout of their own.
    fits = [layout for layout in fits if not any({*layout} < {*other} for other in fits)]
    if len(fits) > 1:
        # A table that two kinds of records were joined in may have "" for null.
        fits = [layout for layout in fits if any(record[field] not in EMPTY for field in layout)] or fits
    if not fits and [*record] == ["text"]:
        raise ValueError("has only a 'text', in which question and answer cannot be told apart; plain text "
                         "(pretraining) is not trained. Write {\"prompt\": ..., \"completion\": ...} or "
                         "{\"messages\": [...]}")
    if not fits:
        if named := [layout for layout in LAYOUTS if _has({*record, *nulls}, layout)]:
            layout = max(named, key=lambda layout: len({*record} & {*layout}))
            empty = " and ".join(repr(field) for field in layout if field in nulls)
            raise ValueError(f"{empty} holds nothing: write it, or leave the record out")
        known = ", ".join(" + ".join(map(repr, layout)).replace("?'", "' (optional)") for layout in LAYOUTS)
        raise ValueError(f"has none of the known layouts; its fields are "
                         f"{shorten(', '.join(map(repr, record)), 500) or 'none'}. Known are {known}; "
                         f"--columns {_columns_for(record)} reads others")
    if len(fits) > 1 and not _first_says_all(record, fits):
        one, other = (" + ".join(map(repr, layout)) for layout in fits[:2])
        raise ValueError(f"has two layouts, {one} and {other}: keep one of them")
    return fits[0]


def _has(fields: Container[str], layout: Iterable[str]) -> bool:
    """Whether all that a layout must have is among these fields."""
    return all(field in fields or field.endswith("?") for field in layout)


def _first_says_all(record: dict, layouts: list[tuple[str, ...]]) -> bool:
    """Whether the first of these layouts has the messages of all, as a conversation has that stands next to
    its question and answer."""
    try:
        first, *others = ([turn.items() for turn in _turns(record, layout)] for layout in layouts)
    except ValueError:
        return False
    return all(len(other) == len(first) and all(a <= b for a, b in zip(other, first)) for other in others)


def _columns_for(record: dict) -> str:
    """What --columns could be for a record of an unknown layout."""
    capitals = [f"{field.lower()}={field}" for field in record
                if field.lower() in FIELDS and field not in FIELDS]
    lists = [f"messages={field}" for field, value in record.items() if _are_messages(value)]
    return " ".join(capitals) or next(iter(lists), "prompt=NAME completion=NAME")


def _chosen_alone(record: dict) -> str:
    """How to train on the preferred answers of such records alone."""
    chosen = record["chosen"]
    if _are_messages(chosen) and _turn(chosen[0], 1)["role"] != "assistant":
        known = "messages"
    else:
        known = next((answer for *question, answer in LAYOUTS if question and _has(record, question)), "")
    if not known:
        return "write the chosen one as {\"messages\": [...]}"
    return f"--columns {known}=chosen trains on the chosen answers alone"


def _question(record: dict, fields: list[str]) -> list[dict]:
    """The messages before the answer. Of a question that is a list of messages, the answers are given, and
    not to be trained."""
    if len(fields) == 1:
        messages = _side(record, fields[0], "user")
        return [{**m, "weight": 0} if m["role"] == "assistant" and m.keys().isdisjoint(TRAINS) else m
                for m in messages]
    for field in fields:
        _check_text(record[field], field)
    return [{"role": "user", "content": "\n\n".join(record[field] for field in fields if record[field])}]


def _conversation(record: dict, field: str) -> list[dict]:
    """The messages in a field: a list of them, or a text that holds one as JSON."""
    value = record[field]
    if isinstance(value, str):
        value = _from_text(value)
        if not isinstance(value, list):
            raise ValueError(f"{field!r} must be a list of messages, or a text that holds one as JSON, not "
                             f"{record[field][:60]!r}; to_json and to_parquet write lists that can be read")
    if not isinstance(value, list):
        raise ValueError(f"{field!r} must be a list of messages, not {_kind(value)}")
    if not value:
        raise ValueError(f"{field!r} holds no messages")
    return [_turn(turn, number) for number, turn in enumerate(value, 1)]


def _side(record: dict, field: str, role: str) -> list[dict]:
    """The messages in a field for the question or the answer: a list of them, possibly as JSON in a text, or
    else the content of one message of this role."""
    value = record[field]
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        listed = _from_text(value)
        value = listed if _are_messages(listed) else value
    if not _are_messages(value):
        # A list may hold the parts of a content.
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            _check_text(value, field)
        value = [{"role": role, "content": value}]
    return [_turn(turn, number) for number, turn in enumerate(value, 1)]


def _from_text(text: str) -> object:
    """A list that a table holds as text: JSON, or as Python writes it. None if it is neither."""
    for parse in (parse_json, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = parse(text)
            check_depth(value)
            return value
    return None


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and not value.keys().isdisjoint(("role", "from"))


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(map(_is_message, value))


def _turn(turn: object, number: int) -> dict:
    """A message with role and content, which may be named "from" and "value" and be a list of parts."""
    if not isinstance(turn, dict):
        raise ValueError(f"message {number} must be an object with 'role' and 'content', not {_kind(turn)}")
    turn = _present(turn)
    role = turn.pop("from", turn.get("role"))
    role = SHAREGPT_ROLES.get(str(role), role)
    content = turn.pop("value", turn.get("content"))
    if SHAREGPT_ROLES.get(str(turn.get("role")), turn.get("role", role)) != role or turn.get(
            "content", content) != content:
        raise ValueError(f"message {number} has 'from' and 'value' in addition to another 'role' or "
                         "'content': keep one of them")
    if role == "function_call":
        return {**turn, "role": "assistant", "content": "", "tool_calls": content}
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        content = "".join(_text_of_part(part, number) for part in content)
    return {**turn, "role": role, "content": content}


def _text_of_part(part: dict, number: int) -> str:
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"message {number} has in its content the part {shown(part, 80)}, and only "
                         "{\"type\": \"text\", \"text\": \"...\"} is read: write it as text, or leave the "
                         "record out")
    return part["text"]


def _with_system_prompt(messages: list, record: dict) -> list:
    """The messages with the record's system prompt first. ValueError if they have another one."""
    for field in ("system", "system_prompt"):
        given = [m["content"] for m in messages if m["role"] == "system"]
        if record.get(field) and not given:
            messages = [{"role": "system", "content": record[field]}, *messages]
        elif record.get(field, "") not in (*EMPTY, *given):
            raise ValueError(f"the record's {field!r} is not what its system message says: keep one of them")
    return messages


def _check_messages(messages: list[dict], record: dict, used: set[str]) -> None:
    """ValueError if the record holds text that is in none of its messages. used: the fields of its layout."""
    for field in CONVERSATION_FIELDS:
        values = [] if field in used else _values(record.get(field))
        texts = [value for value in values if isinstance(value, str)]
        said = [text for text in _values(messages) if isinstance(text, str)] if values else []
        # Next to texts, numbers are their ids and scores.
        for value in texts or values:
            if not any(str(value).strip() in text for text in said):
                raise ValueError(f"the record's {field!r} has {shown(value, 80)}, which is in none of its "
                                 "messages and would not be trained: write it into them, or remove the field")


def _values(value: object) -> list:
    """The texts and numbers in a JSON value that say something, but for the roles of messages and the types
    of a content's parts: {"role": "user", "content": ["Hi", ""]} -> ["Hi"]"""
    if isinstance(value, dict):
        value = [item for field, item in value.items() if field not in ("role", "from", "type")]
    if isinstance(value, list):
        return [inner for item in value for inner in _values(item)]
    return [] if _says_nothing(value) else [value]


def _is_null(value: object) -> bool:
    """null, and NaN, which stands for it in tables."""
    return value is None or value != value


def _present(value: object) -> object:
    """The value without those fields of its objects that are null, which means absent. In a table all objects
    of a column have the same fields: {"a": 1}, {"b": 2} becomes {"a": 1, "b": null}, {"a": null, "b": 2}."""
    if isinstance(value, list):
        return [_present(item) for item in value]
    if isinstance(value, dict):
        return {field: _present(item) for field, item in value.items() if not _is_null(item)}
    return value


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    words = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return words.get(type(value)) or shorten(f"{type(value).__name__} {value}", 100)


def _check_text(value: object, field: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{field!r} must be text, not {_kind(value)}"
                         + ("; pandas writes records with to_json(orient='records', lines=True)"
                            if isinstance(value, dict) else ""))


def _refuse(fields: dict, owner: str) -> None:
    """ValueError for a field that would change what is trained or served, unless its value is empty or
    NEUTRAL."""
    for field, value in fields.items():
        if value in EMPTY or field in NEUTRAL and value == NEUTRAL[field]:
            continue
        for pattern, reason in REFUSED.items():
            if re.fullmatch(pattern, field, re.IGNORECASE | re.VERBOSE):
                raise ValueError(f"{owner} has {field!r}, {reason}")


def _message(message: dict, number: int) -> dict:
    """A message with "weight": 0 if any of its switches says that it is not trained. ValueError for what is
    wrong with it."""
    fields = {**message}
    role, content = fields.pop("role", None), fields.pop("content", None)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {number} has the unknown role {shorten(repr(role), 100)}; known are "
                         f"{', '.join(ROLES)}")
    switches = {field: fields.pop(field) for field in TRAINS if field in fields}
    for field, value in switches.items():
        if value not in (0, 1):
            raise ValueError(f"message {number} has {field!r}: {shorten(repr(value), 100)}; it must be 0 "
                             "or 1, false or true")
    weights = {int(value == TRAINS[field]) for field, value in switches.items()}
    if len(weights) > 1:
        raise ValueError(f"message {number} is to be trained and not to be trained: "
                         f"{', '.join(f'{f!r} is {v!r}' for f, v in switches.items())}; keep one of them")
    rendered = _rendered_fields(fields, role, number)
    _refuse(fields, f"message {number}")
    fields |= rendered
    if content is None and rendered.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"message {number} ({role}) has no text: 'content' is {_kind(content)}")
    try:
        (content + json.dumps(fields, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError:
        raise ValueError(f"message {number} ({role}) holds half a surrogate pair, or bytes "
                         "that are not UTF-8, which is not text") from None
    return {"role": role, "content": content, **fields, **({"weight": 0} if weights == {0} else {})}


def _rendered_fields(fields: dict, role: str, number: int) -> dict:
    """Takes the fields that templates render besides 'content' out of a message's, and returns them in the
    form in which servers give them to the template. ValueError for what is wrong with them."""
    rendered = {}
    if number == 1 and (tools := _objects(fields.pop("tools", None), "'tools'")):
        rendered["tools"] = tools
        for tool in tools:
            function = tool.get("function", tool)
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ValueError(f"'tools' has {str(tool)[:80]}, which has no \"name\"; write it as "
                                 '{"type": "function", "function": {"name", "description", "parameters"}}')
    # Llama 3's template asks only whether there are "tool_calls", of a question too.
    if _says_nothing(fields.get("tool_calls")):
        fields.pop("tool_calls", None)
    if not fields.get("reasoning_content"):
        fields.pop("reasoning_content", None)
    if role != "assistant":
        return rendered
    if calls := _objects(fields.pop("tool_calls", None), f"message {number}'s 'tool_calls'"):
        rendered["tool_calls"] = [_tool_call(call, number) for call in calls]
    if thoughts := fields.pop("reasoning_content", None):
        if not isinstance(thoughts, str):
            raise ValueError(f"message {number}'s 'reasoning_content' must be text, "
                             f"not {_kind(thoughts)}")
        rendered["reasoning_content"] = thoughts
    return rendered


def _tool_call(call: dict, number: int) -> dict:
    """A tool call in OpenAI's layout. Its arguments, which may be JSON text, are an object, as servers give
    them to the template."""
    call = _present(call)
    if "function" not in call:
        function = {field: call.pop(field) for field in [*call] if field not in ("id", "type", "index")}
        call = {"type": "function", **call, "function": function}
    function = call["function"]
    if not isinstance(function, dict) or function.keys() - {"name", "arguments"} or (
            not isinstance(function.get("name"), str)):
        raise ValueError(f"message {number} has the tool call {str(function)[:80]}; "
                         'write it as {"name": "...", "arguments": {...}}')
    given = function.get("arguments")
    arguments = {} if _says_nothing(given) else _from_text(given) if isinstance(given, str) else given
    if not isinstance(arguments, dict):
        raise ValueError(f"message {number}'s arguments of {function['name']!r} must be an object, "
                         f"or JSON text of one, not {str(given)[:80]!r}")
    return {**call, "function": {**function, "arguments": arguments}}


def _objects(given: object, owner: str) -> list[dict]:
    """A list of objects, given as one, as a single object or as text of either; [] if there are none."""
    value = [] if _says_nothing(given) else _from_text(given) if isinstance(given, str) else given
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        raise ValueError(f"{owner} must be a list of objects, or JSON text of one, not {str(given)[:80]!r}")
    return value


def _says_nothing(value: object) -> bool:
    return _is_null(value) or (value.strip() if isinstance(value, str) else value) in EMPTY
