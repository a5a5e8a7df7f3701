"""A file of answers, one JSON object a line: written as they come, and gone on from after an interruption.

    answers = Answers(file, key, settings)          # what the file has; ValueError if it is not ours
    for name in answers.missing(names): ...; answers.add(line)
    answers.merge()                                 # all of them, in order, under torchrun those of all ranks

Rank 0 appends to FILE, the others to FILE.rankN beside it; merge makes one file of them, and so does the next
run of whatever number of ranks if this one is killed. What the answers were made with is kept too, since
answers of two settings in one file would be worth nothing.
"""
import glob
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from hashlib import file_digest, sha256
from pathlib import Path

from runtime.weights import model_fingerprint
from chat import Template
from runtime.files import read_json
from eval.common import gather, write_json
from runtime.weights import resolve_model
from runtime.distributed import is_main, rank, world_size

FIRST = b'{"settings": '    # how a file begins that holds its settings itself


def hash_file(file: str | Path) -> str:
    with open(file, "rb") as raw:
        return file_digest(raw, "sha256").hexdigest()[:32]


def made_with(args: Namespace, names: Iterable[str], template: Template, data: str) -> dict:
    """All that changes the answers of args.model to what the file `data` asks: the flags called `names`, and
    what is behind the names that they give."""
    folder = resolve_model(args.model)
    return {**{name: getattr(args, name) for name in names},
            "weights": model_fingerprint(folder), "tokenizer": hash_file(folder / "tokenizer.json"),
            "template": sha256(template.source.encode()).hexdigest()[:32],
            "date": template.date if template.uses_date else "", "contents of the data": hash_file(data)}


def as_line(answer: dict) -> str:
    return json.dumps(answer, ensure_ascii=False) + "\n"


class Answers:
    """lines: {key(line): line}, the same on all ranks but for those added since the last merge.

    file: None keeps them in memory only. settings: in FILE.settings.json, or, if `header`, in the first line.
    ValueError if the file is something else, and is left as it is, or was written with other settings."""

    def __init__(self, file: str | Path | None, key: Callable[[dict], tuple], settings: dict,
                 header: bool = False) -> None:
        self.file, self.key, self.header = Path(file) if file else None, key, header
        self.settings, self.new, self.lines = settings, [], {}  # no lines: what _read begins a file with
        found = self._read() if self.file and is_main() else []
        self.lines = {key(line): line for line in gather(found)}

    def missing(self, keys: Iterable[tuple]) -> list[tuple]:
        """Those that have no line yet, of which this rank is to make its share."""
        return [key for key in keys if key not in self.lines][rank()::world_size()]

    def add(self, line: dict) -> None:
        self.new.append(line)
        if self.file:
            with open(f"{self.file}.rank{rank()}" if rank() else self.file, "a", encoding="utf-8") as part:
                part.write(as_line(line))

    def merge(self) -> list[dict]:
        """The lines added since the last time by all ranks, which must all call it; in the keys' order."""
        new, self.new = sorted(gather(self.new), key=self.key), []
        self.lines.update((self.key(line), line) for line in new)
        self.write()
        return new

    def write(self) -> None:
        """The file anew, in the order of the keys, and nothing beside it; by rank 0."""
        if not (self.file and is_main()):
            return
        part = Path(f"{self.file}.part")
        with open(part, "w", encoding="utf-8") as out:
            out.writelines([as_line({"settings": self.settings})] if self.header else [])
            out.writelines(as_line(self.lines[key]) for key in sorted(self.lines))
        part.replace(self.file)
        for rest in self._of_ranks():
            rest.unlink()

    def _of_ranks(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{glob.escape(self.file.name)}.rank[0-9]*"))

    def _read(self) -> list[dict]:
        """Whole lines of the file and of those that ranks left; half-written last ones are cut off."""
        raw = {part: part.read_bytes() for part in (self.file, *self._of_ranks()) if part.is_file()}
        whole = {part: text[:text.rfind(b"\n") + 1] for part, text in raw.items()}
        beside, begin = Path(f"{self.file}.settings.json"), raw.get(self.file, b"")[:len(FIRST)]
        known = {} if self.header else read_json(beside)
        try:
            lines = [json.loads(line) for text in whole.values() for line in text.splitlines()]
            if self.header and lines:
                known = lines.pop(0)["settings"]
            elif self.header and not FIRST.startswith(begin):
                raise ValueError
            lines = list({self.key(line): line for line in lines}.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"--output {self.file}: is no output of this command, it holds lines that are "
                             "no answers; name another file") from None
        if begin and not known and not self.header:
            raise ValueError(f"--output {self.file}: was written with unknown settings, there is no "
                             f"{beside.name}; name another file")
        if lines and (differ := [f"{name} was {known.get(name)}, is {value}"
                                 for name, value in self.settings.items() if known.get(name) != value]):
            raise ValueError(f"--output {self.file}: was written with other settings ({'; '.join(differ)}); "
                             "name another file, or remove it")
        if not self.header:
            write_json(beside, self.settings)
        if not lines:
            self.write()
        for part, text in whole.items() if lines else ():
            os.truncate(part, len(text))
        return lines
