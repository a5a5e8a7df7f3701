"""A file of answers, one JSON object per line, written as they come and resumed after an interruption.

    answers = Answers(file, key, settings)      # reads what the file holds
    for name in answers.missing(names): ...; answers.add(line)
    answers.merge()                             # now the file is complete and sorted

Under torchrun rank 0 appends to FILE and the other ranks to FILE.rankN. merge() joins them; if the run is
killed before, the next one does, with any number of ranks. The settings that produced the answers are kept
in FILE.settings.json: a file with answers of two settings would be worthless.
"""
import glob
import json
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

from chat import Template
from eval.common import gather, write_json
from records import data_files
from runtime.distributed import is_main, rank, world_size
from runtime.files import hash_file, read_json, write_text
from runtime.foreign import parse_line
from runtime.tokenizer import Tokenizer
from runtime.weights import model_fingerprint


def hash_data(name: str) -> str:
    """The contents of the files that the name of a file or of records stands for (records.data_files())."""
    return " ".join(hash_file(file)[:32] for file in data_files([name]))


def made_with(args: Namespace, flags: Iterable[str], tokenizer: Tokenizer, template: Template | None,
              data: str) -> dict:
    """All that changes the answers of args.model to the questions in `data`: these flags, and the
    contents of what they name."""
    return {**{name: getattr(args, name) for name in flags},
            "weights": model_fingerprint(tokenizer.folder), "tokenizer": tokenizer.fingerprint,
            "template": sha256(template.source.encode()).hexdigest()[:32] if template else "",
            "date": template.date if template and template.uses_date else "",
            "contents of the data": hash_data(data)}


def as_line(answer: dict) -> str:
    return json.dumps(answer, ensure_ascii=False) + "\n"


class Answers:
    """lines: {key(line): line}. All ranks have the same ones, except those added since the last merge().

    file: None keeps the answers in memory only. ValueError, before anything is changed, if the file holds
    something else or was written with other settings."""

    def __init__(self, file: str | Path | None, key: Callable[[dict], tuple], settings: dict) -> None:
        self.file, self.key, self.new = Path(file) if file else None, key, []
        found = self._read(settings) if self.file and is_main() else []
        self.lines = {key(line): line for line in gather(found)}

    def missing(self, keys: Iterable[tuple]) -> list[tuple]:
        """This rank's share of the keys that have no line yet."""
        return [key for key in keys if key not in self.lines][rank()::world_size()]

    def add(self, line: dict) -> None:
        self.new.append(line)
        if self.file:
            with open(f"{self.file}.rank{rank()}" if rank() else self.file, "a", encoding="utf-8") as part:
                part.write(as_line(line))

    def merge(self) -> list[dict]:
        """Collect the lines of all ranks and rewrite the file. Every rank must call it. Returns the lines
        added since the last call, sorted by key."""
        new, self.new = sorted(gather(self.new), key=self.key), []
        self.lines.update((self.key(line), line) for line in new)
        self.write()
        return new

    def write(self) -> None:
        """Rewrite the file, sorted by key, and delete the files of the other ranks; on rank 0."""
        if not (self.file and is_main()):
            return
        write_text(self.file, "".join(as_line(self.lines[key]) for key in sorted(self.lines)))
        for rank_file in self._rank_files():
            rank_file.unlink()

    def _rank_files(self) -> list[Path]:
        return sorted(file for file in self.file.parent.glob(f"{glob.escape(self.file.name)}.rank*")
                      if re.fullmatch(r"\.rank\d+", file.suffix))

    def _read(self, settings: dict) -> list[dict]:
        """The lines of the file and of the files that ranks left. Cuts off half-written last lines."""
        raw = {part: part.read_bytes() for part in (self.file, *self._rank_files()) if part.is_file()}
        whole = {part: text[:text.rfind(b"\n") + 1] for part, text in raw.items()}
        settings_file = Path(f"{self.file}.settings.json")
        old = read_json(settings_file)
        try:
            lines = [parse_line(line) for text in whole.values() for line in text.splitlines()]
            lines = list({self.key(line): line for line in lines}.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"--output {self.file}: is not an output of this command, it holds lines that "
                             "are not answers; name another file") from None
        if any(raw.values()) and (differ := [f"{name} was {old.get(name)}, is {value}"
                                             for name, value in settings.items() if old.get(name) != value]):
            raise ValueError(f"--output {self.file}: was written with other settings ({'; '.join(differ)}); "
                             "name another file, or remove it")
        write_json(settings_file, settings)
        for part, text in whole.items():
            os.truncate(part, len(text))
        return lines
