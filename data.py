"""Token cache -> step plan -> packed batches.

    dataset = load_dataset(files, tokenizer, template, max_length=2048, overlong="truncate", cache_dir=...)
    steps = Steps(dataset, usable, coefficients, seed=0, batch_size=128, capacity=4096)
    micro_batches, counts = steps[17]           # this rank's; targets by kind in each of the step's examples
    batch = collate(dataset, *micro_batches[0])

What differs from the usual way: a step is a set of *examples*. Packing happens inside it, so packing can
change the speed of a run and nothing else. And nothing has to be saved to resume: a step's batches are a
function of its number.

Shapes: E examples, N packed tokens of a micro-batch, K kinds of span.
"""
import hashlib
import heapq
import itertools
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import chat
import records
import runtime.foreign
import runtime.jinja
import runtime.tokenizer
from chat import (COMPLETION, INSTRUCTION, KINDS, ROLES, Piece, Template, has_empty_answer, matches_serving,
                  render, tokenize, tokenize_batch)
from records import data_files, naming, read_records
from runtime.files import check_writable, checksum, commit, delete_left, hash_file, writing
from runtime.foreign import check_file, parse_json
from runtime.machine import to_device
from runtime.report import ending
from runtime.start import print_message
from runtime.tokenizer import Tokenizer, check_rows

# The tokenizer gets so many records or characters at once.
BATCH, BATCH_CHARACTERS = 512, 2**22


# ---------------------------------------------------------------- tokens -> cache on disk


@dataclass
class Dataset:
    """Tokenized examples in memory-mapped files. Targets are shifted per example: target t is ids[t + 1]."""
    files: list[str]        # of records, as messages name them
    ids: np.ndarray         # (all tokens,) int32
    kinds: np.ndarray       # (all tokens,) uint8
    offsets: np.ndarray     # (E + 1,) int64: example e is ids[offsets[e]:offsets[e + 1]]
    origins: np.ndarray     # (E, 2) int32: which file, which line
    counts: np.ndarray      # (E, K) int32: targets of each kind
    groups: np.ndarray      # (E,) uint64: instruction_hash() of the record
    report: dict            # what was read, cut and dropped
    key: str                # hash of all that these arrays depend on, cache_parts()
    content: str            # hash of the arrays themselves
    names: np.ndarray       # (files,) which of the names that were given each file belongs to

    def __post_init__(self) -> None:
        # (E,) inputs of each example, one less than its tokens
        self.lengths = np.diff(self.offsets) - 1

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def without_completion(self) -> int:
        """How many examples have no completion target."""
        return int((self.counts[:, COMPLETION] == 0).sum())

    def where(self, example: int) -> str:
        """FILE:LINE of an example's record."""
        file, line = self.origins[example]
        return f"{self.files[file]}:{line}"

    def subset(self, examples: np.ndarray) -> "Dataset":
        """These examples alone, in memory. The report stays that of all."""
        ids, kinds = (np.concatenate([values[self.offsets[e]:self.offsets[e + 1]] for e in examples])
                      for values in (self.ids, self.kinds))
        content = _hash(f"{self.content} {examples.tolist()}")[:32]
        return replace(self, ids=ids, kinds=kinds, offsets=np.cumsum([0, *(self.lengths[examples] + 1)]),
                       origins=self.origins[examples], counts=self.counts[examples],
                       groups=self.groups[examples], content=content)

    def names_of(self, examples: np.ndarray) -> np.ndarray:
        """(examples,) which of the names that were given each of these examples is from."""
        return self.names[self.origins[examples, 0]]

    def trainable(self, weights: Iterable[float], require_completion: bool = True) -> np.ndarray:
        """(examples,) indices of those with at least one target of non-zero weight. weights: (K,);
        require_completion: only those that have a completion target, too, whatever its weight, so that every
        loss that weighs completions has the same examples."""
        usable = (self.counts[:, np.asarray(list(weights)) != 0] > 0).any(axis=1)
        if require_completion:
            usable &= self.counts[:, COMPLETION] > 0
        return np.flatnonzero(usable)


# A cache's files, and how they are mapped. Those with .bin are the columns of a Dataset, by name.
CACHE_FILES = {"ids.bin": (np.int32, (-1,)), "kinds.bin": (np.uint8, (-1,)), "offsets.bin": (np.int64, (-1,)),
               "origins.bin": (np.int32, (-1, 2)), "counts.bin": (np.int32, (-1, len(KINDS))),
               "groups.bin": (np.uint64, (-1,)), "report.json": (np.uint8, (-1,))}
# What report.json counts.
NO_RECORDS = {"records": 0, "empty_answers": 0, "truncated": 0, "dropped_overlong": 0, "dropped_empty": 0}
# The code that turns records into tokens.
CODE = tuple(map(Path, (chat.__file__, records.__file__, runtime.foreign.__file__, runtime.jinja.__file__,
                        runtime.tokenizer.__file__, __file__)))


def cache_parts(names: list[str], tokenizer: Tokenizer, template: Template, max_length: int, overlong: str,
                columns: Iterable[str] = ()) -> dict[str, object]:
    """All that decides what is in a token cache, by name, as JSON can hold it: hashes of the files' contents,
    wherever they are, of tokenizer, template and code; versions of libraries; flags. names, columns: as for
    load_dataset(). Reads and hashes files, nothing more. ValueError for a file that cannot be read."""
    marks = [template.tokens, sorted(template.special), tokenizer.named_tokens, tokenizer.added_tokens]
    return {
        "data": [hash_file(file) for file in data_files(names)],
        "columns": sorted(columns),
        "tokenizer": hash_file(tokenizer.folder / "tokenizer.json"),
        "special_tokens": _hash(json.dumps(marks, sort_keys=True)),
        "template": _hash(template.source),
        "date": template.date if template.uses_date else None,
        "max_length": max_length,
        "overlong": overlong,
        "code": _hash("".join(hash_file(file) for file in CODE)),
        "libraries": " ".join(f"{name} {version(name)}" for name in ("tokenizers", "jinja2")),
    }


def load_dataset(names: list[str], tokenizer: Tokenizer, template: Template, max_length: int, overlong: str,
                 cache_dir: str | Path, progress: bool = False, columns: Iterable[str] = ()) -> Dataset:
    """Tokenize records into cache_dir, or map what an earlier run has tokenized.

    names: of files, or what records.data_files() finds files by; max_length: most tokens an example may have;
    overlong: truncate, drop or error for longer ones; columns: as for read_records(). ValueError for bad
    records, and for a damaged cache that cannot be replaced. A cache is written under another name and then
    renamed, so a killed writer leaves nothing that another run would read.
    """
    files_of_names = [data_files([name]) for name in names]
    files = [file for found in files_of_names for file in found]
    parts = cache_parts(files, tokenizer, template, max_length, overlong, columns)
    key = _hash(json.dumps(parts, sort_keys=True))[:32]
    folder = Path(os.path.expanduser(cache_dir)) / key
    unfinished = folder.with_name(f"{key}.{socket.gethostname()}.{os.getpid()}.part")
    opened = None
    if os.path.lexists(folder):
        try:
            opened = _open_cache(folder, len(files))
        except ValueError as error:
            _move_away(folder, unfinished.with_suffix(".old.part"), str(error))
            print_message(f"warning: {error}; tokenizing again")
    if opened is None:
        delete_left(folder.parent.glob(f"{key}.*.part"))
        check_writable("--cache-dir", folder.parent, folder=True)
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            with writing(unfinished):
                _write_cache(unfinished, files, tokenizer, template, max_length, overlong, progress, columns)
                if [hash_file(file) for file in files] != parts["data"]:
                    raise ValueError(f"{', '.join(map(str, files))}: changed while being read; start again")
                commit(unfinished, folder)
        except OSError:
            # If the folder exists, another process was first, with the same bytes.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        opened = _open_cache(folder, len(files))
    arrays, report, content = opened
    names_of_files = np.repeat(np.arange(len(files_of_names)), list(map(len, files_of_names)))
    return Dataset(list(map(str, files)), **arrays, report=report, key=key, content=content,
                   names=names_of_files)


def _open_cache(folder: Path, files: int) -> tuple[dict[str, np.ndarray], dict, str]:
    """The columns of a token cache of so many files, memory-mapped; its report; and a hash of its contents.
    Each file is opened once, checked and mapped, so that no other file can take its place in between.
    ValueError names a file that has changed since it was written or cannot be read."""
    arrays, file = {}, folder / "crc32.json"
    try:
        sums = parse_json(file.read_text())
        for name, (dtype, shape) in CACHE_FILES.items():
            file = folder / name
            # Not to wait for a pipe.
            if file.exists():
                check_file(file)
            with open(file, "rb") as opened:
                if checksum(opened) != sums[name]:
                    raise ValueError
                arrays[file.stem] = np.memmap(opened, np.uint8, "r").view(dtype).reshape(shape)
        report = parse_json(arrays.pop("report").tobytes().decode())
        file = folder
        if not _consistent(files, **arrays) or not report.keys() >= NO_RECORDS.keys():
            raise ValueError
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{file}: is damaged") from None
    return arrays, report, _hash(json.dumps(sums))[:32]


def _consistent(files: int, ids: np.ndarray, kinds: np.ndarray, offsets: np.ndarray, origins: np.ndarray,
                counts: np.ndarray, groups: np.ndarray) -> bool:
    """Whether these columns of a Dataset belong together, and to records of so many files."""
    return (len(ids) == len(kinds) == offsets[-1] and offsets[0] == 0 and bool((np.diff(offsets) > 1).all())
            and len(origins) == len(counts) == len(groups) == len(offsets) - 1
            and int(kinds.max()) < len(KINDS) and int(ids.min()) >= 0
            and 0 <= int(origins[:, 0].min()) and int(origins[:, 0].max()) < files)


def _move_away(folder: Path, old: Path, fault: str) -> None:
    """Rename a token cache that cannot be used, and delete it as far as possible. ValueError, which begins
    with `fault`, if it cannot be renamed."""
    try:
        os.rename(folder, old)
    except FileNotFoundError:
        # Another process was first.
        pass
    except OSError as error:
        raise ValueError(f"{fault}, and the folder cannot be replaced ({error.strerror}): delete it, or give "
                         "another --cache-dir") from None
    shutil.rmtree(old, ignore_errors=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _write_cache(folder: Path, files: list[str | os.PathLike], tokenizer: Tokenizer, template: Template,
                 max_length: int, overlong: str, progress: bool, columns: Iterable[str]) -> None:
    """Tokenize files into the cache's files; as load_dataset()."""
    offsets, origins, counts, groups = [0], [], [], []
    report = Counter(NO_RECORDS)
    with open(folder / "ids.bin", "wb") as ids_file, open(folder / "kinds.bin", "wb") as kinds_file:
        for ids, kinds, file, line, group, empty in _tokenized(files, tokenizer, template, progress, columns):
            report["records"] += 1
            report["empty_answers"] += empty
            if len(ids) > max_length:
                if overlong == "error":
                    raise ValueError(f"{files[file]}:{line}: {len(ids)} tokens, more than --max-length "
                                     f"{max_length}; raise it, or choose --overlong truncate or drop")
                report["truncated" if overlong == "truncate" else "dropped_overlong"] += 1
                if overlong == "drop":
                    continue
                ids, kinds = ids[:max_length], kinds[:max_length]
            # Without a second token there is no target.
            if len(ids) < 2:
                report["dropped_empty"] += 1
                continue
            ids_file.write(np.asarray(ids, np.int32).tobytes())
            kinds_file.write(np.asarray(kinds, np.uint8).tobytes())
            offsets.append(offsets[-1] + len(ids))
            origins.append((file, line))
            counts.append(np.bincount(kinds[1:], minlength=len(KINDS)))
            groups.append(group)
    if not origins:
        raise ValueError(f"{', '.join(map(str, files))}: no example left of {report['records']} records "
                         f"({report['dropped_overlong']} longer than --max-length {max_length}, "
                         f"{report['dropped_empty']} empty)")
    for name, values in (("offsets.bin", offsets), ("origins.bin", origins), ("counts.bin", counts),
                         ("groups.bin", groups)):
        (folder / name).write_bytes(np.asarray(values, CACHE_FILES[name][0]).tobytes())
    (folder / "report.json").write_text(json.dumps(report))
    sums = {name: checksum(folder / name) for name in CACHE_FILES}
    (folder / "crc32.json").write_text(json.dumps(sums))


def _tokenized(files: list[str | os.PathLike], tokenizer: Tokenizer, template: Template, progress: bool,
               columns: Iterable[str]) -> Iterator[tuple[list[int], list[int], int, int, int, bool]]:
    """Yields each record's ids and kinds, and the rest of what _rendered() yields."""
    rendered, checked = _rendered(files, template, progress, columns), 0
    # The tokenizer uses all cores on a batch.
    while batch := _batch(rendered):
        try:
            examples = tokenize_batch([pieces for pieces, *_ in batch], tokenizer)
        except ValueError:
            # Again one by one, to name the record.
            for pieces, file, line, *_ in batch:
                with naming(f"{files[file]}:{line}"):
                    tokenize(pieces, tokenizer)
            raise
        for (pieces, file, line, *rest), (ids, kinds) in zip(batch, examples):
            # The first records show whether the ids are those that serving gives.
            if checked < 64:
                with naming(f"{files[file]}:{line}"):
                    checked += matches_serving(pieces, ids, tokenizer)
            yield ids, kinds, file, line, *rest


def _batch(rendered: Iterator[tuple]) -> list[tuple]:
    """The next BATCH records, or fewer with BATCH_CHARACTERS, so that memory is bounded."""
    batch, characters = [], 0
    for record in itertools.islice(rendered, BATCH):
        batch.append(record)
        characters += sum(len(piece.text) for piece in record[0])
        if characters > BATCH_CHARACTERS:
            break
    return batch


def _rendered(files: list[str | os.PathLike], template: Template, progress: bool, columns: Iterable[str]
              ) -> Iterator[tuple[list[Piece], int, int, int, bool]]:
    """Yields each record's pieces, the number of its file, its line, its instruction_hash(), and whether an
    answer that is trained is empty."""
    for number, file in enumerate(files):
        bar = tqdm(read_records(file, columns), f"tokenizing {ending(str(file), 24)}", unit=" records",
                   leave=False, dynamic_ncols=True, disable=not progress)
        for messages, line in bar:
            with naming(f"{file}:{line}"):
                pieces = render(messages, template)
            yield pieces, number, line, instruction_hash(messages), has_empty_answer(messages)


def check_embedding(dataset: Dataset, rows: int, tokenizer: Tokenizer) -> None:
    """ValueError unless every token of the dataset has one of the embedding's `rows`; it names the record."""
    if dataset.ids.max() >= rows:
        place = int(np.argmax(dataset.ids >= rows))
        example = int(np.searchsorted(dataset.offsets, place, side="right")) - 1
        index = int(dataset.ids[place])
        text = tokenizer.reference.id_to_token(index)
        check_rows([index], rows, f"{dataset.where(example)}: holds {text!r},", tokenizer.folder)


# ---------------------------------------------------------------- which examples


def instruction_hash(messages: list[dict]) -> int:
    """A number of 64 bits for what a record asks: its first user message, whatever its white space or, where
    there is none, all its text. Records with the same one are never divided between training and
    evaluation: a loss may train the instruction itself, and who has learnt one answer to it knows more about
    another."""
    texts = [" ".join(message["content"].split()) for message in messages]
    asked = (text for message, text in zip(messages, texts) if ROLES[message["role"]] == INSTRUCTION)
    first = next(filter(None, asked), "\n".join(texts))
    return int.from_bytes(hashlib.sha256(first.encode()).digest()[:8], "little")


def hold_out(groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(E,) bool: the records to evaluate on, round(fraction * E) of them, or fewer where whole groups do not
    add up to that. groups: (E,) uint64, instruction_hash() of each; records of a group stay together.

    A group's place in the draw depends only on its hash and the seed. So the order of the records and their
    files do not matter, and few records change sides when others are added."""
    names, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    room = round(fraction * len(groups))
    chosen = np.zeros(len(names), bool)
    # Modulo 2^64, an odd factor maps no two hashes to the same number.
    factor = np.random.default_rng(seed).integers(2**63, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    for i in np.argsort(names * factor):
        if sizes[i] <= room:
            chosen[i] = True
            room -= sizes[i]
    return chosen[members]


def mixed_examples(files: np.ndarray, draws: list[int], seed: int, epoch: int) -> np.ndarray:
    """The examples of an epoch that has draws[f] of file f, for plan() to put in order. files: (E,)
    the file of each.

    A file's examples come pass after pass, each pass in another order, and every epoch continues where the
    last one ended. So a file with a large share is repeated, and of one with a small share all examples are
    used equally often in the end.

        file of a b c, 2 draws:     pass 0 is b a c, pass 1 is c a b     epoch 0: b a   epoch 1: c c   ...
    """
    parts = []
    for file, count in enumerate(draws):
        members = np.flatnonzero(files == file)
        first, start = divmod(epoch * count, len(members))
        last = -(-(start + count) // len(members)) + first
        passes = [members[np.random.default_rng([seed, number, file + 1]).permutation(len(members))]
                  for number in range(first, last)]
        parts.append(np.concatenate(passes)[start:start + count])
    return np.concatenate(parts)


# ---------------------------------------------------------------- step plan

# The length of a document whose attention costs as much as its matrix products.
ATTENTION_TOKENS = 4096


def plan(lengths: np.ndarray, seed: int, epoch: int, batch_size: int, capacity: int, world_size: int,
         examples: np.ndarray | None = None) -> list[list[list[np.ndarray]]]:
    """Every step of an epoch: plan[step][rank][micro-batch] is an array of example indices. A pure function.

    lengths: (E,) inputs of each example; batch_size: examples in a step; capacity: most tokens of a
    micro-batch; examples: those of the epoch (mixed_examples()), by default all. A step is `batch_size`
    examples of a seeded permutation (an epoch's last step may be smaller). Capacity and number of ranks
    decide only how these are packed. ValueError if an example exceeds capacity.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths) if examples is None else examples)
    return [pack(order[i:i + batch_size], lengths, capacity, world_size)
            for i in range(0, len(order), batch_size)]


def pack(examples: np.ndarray, lengths: np.ndarray, capacity: int, world_size: int) -> list[list[np.ndarray]]:
    """Examples of one step -> [rank][micro-batch], in few micro-batches, the same number on every rank, of
    about the same cost. lengths: (E,) of all examples. ValueError if one exceeds capacity."""
    sizes = lengths[examples]
    check_capacity(sizes, capacity)
    per_rank = max(1, -(-int(sizes.sum()) // (capacity * world_size)))
    while (bins := _fill(sizes, capacity, per_rank * world_size)) is None:
        per_rank += 1
    ranks: list[list[np.ndarray]] = [[] for _ in range(world_size)]
    # Dealt out to ranks 0 1 | 1 0 | 0 1, the most expensive first, so that all have about the same cost.
    for turn in range(per_rank):
        dealt = bins[turn * world_size:(turn + 1) * world_size]
        for rank, members in enumerate(dealt if turn % 2 == 0 else reversed(dealt)):
            ranks[rank].append(examples[np.asarray(members, np.int64)])
    return ranks


def check_capacity(sizes: np.ndarray, capacity: int) -> None:
    """ValueError if an example has more tokens than a micro-batch may have. sizes: (examples,)."""
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"--micro-batch-tokens {capacity} is less than an example of {sizes.max()} tokens: "
                         "raise it, or lower --max-length")


def _fill(sizes: np.ndarray, capacity: int, count: int) -> list[list[int]] | None:
    """Indices of sizes in `count` bins, the most expensive bin first; None if one finds no room. Longest
    first, each goes to the cheapest bin that has room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    # (cost, bin, tokens)
    heap = [(0.0, b, 0) for b in range(count)]
    for i in np.argsort(-sizes, kind="stable").tolist():
        tokens, full = int(sizes[i]), []
        while heap and heap[0][2] + tokens > capacity:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, b, used = heap[0]
        heapq.heapreplace(heap, (cost + tokens + tokens ** 2 / ATTENTION_TOKENS, b, used + tokens))
        bins[b].append(i)
        for entry in full:
            heapq.heappush(heap, entry)
    return [bins[b] for cost, b, _ in sorted(heap, key=lambda entry: (-entry[0], entry[1]))]


class Steps:
    """What every step consists of, a pure function of the step's number.

        micro_batches, counts = steps[step]
        batch = collate(dataset, *micro_batches[0])

    micro_batches: this rank's, as (examples, table) for collate(); counts: (E, K) targets by kind of all the
    step's examples, over all ranks.

    dataset: with usable, (examples,) the indices to train on; coefficients: (E, K) counts of a step -> (E, K)
    what one target counts in its loss (loss.coefficients); batch_size, capacity: as for plan(); draws: of
    each name that load_dataset() was given, how many examples of an epoch come from it (mixed_examples()), by
    default every example once. first_epoch: the examples of that epoch. ValueError if an example exceeds
    capacity.
    """

    def __init__(self, dataset: Dataset, usable: np.ndarray,
                 coefficients: Callable[[np.ndarray], np.ndarray], seed: int, batch_size: int, capacity: int,
                 rank: int = 0, world_size: int = 1, draws: list[int] | None = None):
        self.dataset, self.usable, self.coefficients = dataset, usable, coefficients
        self.seed, self.batch_size, self.capacity = seed, batch_size, capacity
        self.rank, self.world_size, self.draws = rank, world_size, draws
        # Now: with draws, the first epoch need not have the longest example.
        check_capacity(dataset.lengths[usable], capacity)
        self.epoch, self.plan = 0, self._plan(0)
        self.per_epoch = len(self.plan)
        self.first_epoch = usable[np.concatenate([m for step in self.plan for of_rank in step
                                                  for m in of_rank])]

    def _plan(self, epoch: int) -> list[list[list[np.ndarray]]]:
        examples = None
        if self.draws:
            examples = mixed_examples(self.dataset.names_of(self.usable), self.draws, self.seed, epoch)
        return plan(self.dataset.lengths[self.usable], self.seed, epoch, self.batch_size, self.capacity,
                    self.world_size, examples)

    def __getitem__(self, step: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.plan = epoch, self._plan(epoch)
        # The coefficients need the counts of all ranks' examples, rank after rank.
        micro_batches = [self.usable[examples] for of_rank in self.plan[index] for examples in of_rank]
        counts = self.dataset.counts[np.concatenate(micro_batches)]
        tables = np.split(self.coefficients(counts), np.cumsum([len(m) for m in micro_batches])[:-1])
        per_rank = len(micro_batches) // self.world_size
        own = slice(self.rank * per_rank, (self.rank + 1) * per_rank)
        return list(zip(micro_batches[own], tables[own])), counts


# ---------------------------------------------------------------- packed batches


@dataclass
class Batch:
    """One micro-batch as a flat row of documents, each with its targets shifted within itself.

        documents  a b c | d e        ids        a  b | d
                                      targets    b  c | e
                                      positions  0  1 | 0
                                      cu_seqlens 0 2 3
    """
    ids: torch.Tensor           # (N,) int64
    targets: torch.Tensor       # (N,) int64
    kinds: torch.Tensor         # (N,) int64, kind of the target
    positions: torch.Tensor     # (N,) int64, from each document's start
    cu_seqlens: torch.Tensor    # (documents + 1,) int32, on the CPU: where documents begin and end
    documents: torch.Tensor     # (N,) int64, which document of the row
    coefficients: torch.Tensor  # (N,) float32, what the target's NLL counts in the step's loss
    trained: torch.Tensor       # (R,) int64, the targets whose coefficient is not zero
    untrained: torch.Tensor     # (N - R,) int64, the other targets
    examples: np.ndarray        # (documents,) which example of the dataset

    def to(self, device: torch.device) -> "Batch":
        """The batch on the device, except cu_seqlens: lengths decide what is run, so the host needs them."""
        moved = {name: to_device(x, device) for name, x in vars(self).items()
                 if name not in ("cu_seqlens", "examples")}
        return Batch(**moved, cu_seqlens=self.cu_seqlens, examples=self.examples)


def collate(dataset: Dataset, examples: np.ndarray, table: np.ndarray) -> Batch:
    """The examples as one packed row on the CPU. table: (documents, K) the coefficient of a target of each
    kind in each of them (loss.coefficients). No examples make an empty row."""
    starts, lengths = dataset.offsets[examples], dataset.lengths[examples]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    documents = np.repeat(np.arange(len(examples)), lengths)
    positions = np.arange(cu_seqlens[-1]) - cu_seqlens[documents]
    source = starts[documents] + positions  # (N,) places in the dataset's flat arrays
    kinds = dataset.kinds[source + 1].astype(np.int64)
    coefficients = table[documents, kinds].astype(np.float32)
    arrays = {
        "ids": dataset.ids[source].astype(np.int64),
        "targets": dataset.ids[source + 1].astype(np.int64),
        "kinds": kinds,
        "positions": positions,
        "cu_seqlens": cu_seqlens.astype(np.int32),
        "documents": documents,
        "coefficients": coefficients,
        "trained": np.flatnonzero(coefficients),
        "untrained": np.flatnonzero(coefficients == 0),
    }
    return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()}, examples=examples)

