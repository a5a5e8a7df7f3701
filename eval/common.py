"""What the evaluation commands share: models, files of objects, ranks, errors as one line."""
import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import UnionType

import torch
from tqdm import tqdm

from chat import Template, check_vocabulary, load_template, render, tokenize
from runtime.tokenizer import Tokenizer
from eval.engine import Engine
from runtime.files import write_text
from runtime.report import output_faults
from runtime.machine import (Crowding, keep_freed_memory, resolve_dtype, sleep_while_crowded,
                             warn_of_emulation)
from model import Llama, load_model, stored_weights
from records import raw_records
from runtime.model_config import read_config
from runtime.model_folder import resolve_model
from runtime.weights import model_fingerprint
from runtime.start import raise_interrupts
from runtime.distributed import from_all, is_main, join_ranks, leave, report_error, shows_progress, wait


@dataclass
class Loaded:
    """A checkpoint folder, ready to evaluate."""
    name: str               # as the user gave it
    model: Llama
    tokenizer: Tokenizer
    template: Template | None       # none was asked for, or none is needed
    device: torch.device
    autocast: torch.autocast

    @cached_property
    def engine(self) -> Engine:
        """Made once: it holds a copy of the linear layers."""
        return Engine(self.model)

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation that the model is to continue."""
        return tokenize(render(messages, self.template, add_generation_prompt=True), self.tokenizer)[0]

    def answer(self, ids: list[int]) -> str:
        """A generated answer's text, as a message's content."""
        text = self.tokenizer.decode(ids)
        return self.template.content(text) if self.template else text

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that end an answer."""
        special, ends = self.tokenizer.special, [self.tokenizer.eos_token]
        if self.template:
            ends.append(self.template.end_of_turn)
        return {special[token] for token in ends if token in special}


def open_checkpoint(name: str, args: argparse.Namespace, chat: bool = True
                    ) -> tuple[Path, Tokenizer, Template | None]:
    """The folder, tokenizer and template of a checkpoint, given as a folder or a hub id. chat: whether a
    template is needed, so that --template auto must find one. ValueError for what is wrong with the folder,
    except for the weights' values, of which only the files' headers are read: so a command finds out about
    its last checkpoint before it works on the first."""
    folder = resolve_model(name)
    tokenizer, config = Tokenizer(folder), read_config(folder)
    has_none = args.template == "auto" and tokenizer.chat_template is None and not chat
    template = load_template(args.template, tokenizer, args.date) if args.template and not has_none else None
    stored_weights(folder, config)
    if template:
        check_vocabulary(config.vocab_size, tokenizer, template)
    return folder, tokenizer, template


def load(name: str, args: argparse.Namespace, device: torch.device, cast: bool = False, chat: bool = True
         ) -> Loaded:
    """open_checkpoint() with the weights. cast: get bf16 by casting the weights, as generation needs, instead
    of by autocast over fp32 weights, as in training."""
    folder, tokenizer, template = open_checkpoint(name, args, chat)
    model = load_model(folder, device).requires_grad_(False).eval()
    bf16 = args.dtype == "bf16"
    if cast and bf16:
        model.to(torch.bfloat16)
    model.choose_attention(torch.bfloat16 if bf16 else torch.float32)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16 and not cast)
    return Loaded(name, model, tokenizer, template, device, autocast)


def read_objects(file: str, fields: dict[str, type | UnionType], what: str, limit: int | None = None
                 ) -> list[dict]:
    """The first `limit` objects of a file of JSON, one after the other or in a list. ValueError names the
    file and the line (in a list the number) of one that is not `what`, because one of `fields` is missing or
    not of its type, or says it is empty."""
    objects = []
    for value, _, place in islice(raw_records(file), limit):
        faults = (f"{name} must be of type {getattr(kind, '__name__', kind)}" for name, kind in fields.items()
                  if name not in value or not isinstance(value[name], kind)
                  or kind is int and isinstance(value[name], bool))
        if wrong := next(faults, "") if isinstance(value, dict) else "it is not a JSON object":
            having = f" with {', '.join(fields)}" if fields else ""
            raise ValueError(f"{file}{place}: not {what}{having} ({wrong})")
        objects.append(value)
    if not objects:
        raise ValueError(f"{file}: is empty")
    return objects


def start_ranks(args: argparse.Namespace) -> torch.device:
    """The device of this rank; under torchrun all ranks meet first. args.dtype becomes the one for it.
    ValueError if there is no CUDA."""
    keep_freed_memory(shapes=1024)      # generation has a new one with almost every step
    device = join_ranks(args.device)
    args.dtype = resolve_dtype(args.dtype, device)
    warn_of_emulation(args.dtype, device)
    return device


def gather(items: list) -> list:
    """The ranks' lists one after the other, on every rank."""
    return [item for part in from_all(items) for item in part]


def progress(items: Iterable, total: int, unit: str) -> Iterable:
    """items with a bar, where somebody can see it."""
    return tqdm(items, total=total, unit=unit, dynamic_ncols=True, leave=False,
                disable=not shows_progress())


def mean_and_error(groups: list[list[float]]) -> tuple[float, float | None]:
    """The mean of all values and its standard error, None for a single group; values of one group may depend
    on each other."""
    count = sum(map(len, groups))
    mean = sum(map(sum, groups)) / count
    squares = sum((sum(group) - mean * len(group)) ** 2 for group in groups)
    n = len(groups)
    return mean, math.sqrt(squares * n / (n - 1)) / count if n > 1 else None


def write_json(file: str | Path | None, result: dict) -> None:
    """On rank 0, if a file was asked for; by renaming, so that no reader sees half of it."""
    if file and is_main():
        write_text(file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def write_result(file: str | Path | None, result: dict, models: list[str]) -> None:
    """write_json() of what was found of these checkpoints, with a hash of their weights."""
    if file and is_main():
        weights = {name: model_fingerprint(resolve_model(name)) for name in models}
        write_json(file, result | {"weights": weights})


def run(main: Callable[[list[str]], int | None]) -> None:
    """main(argv) as a program: one line for what a user can mend, from one rank; exit status 1 then, and if
    say() could not print what was found. main may also return an exit status."""
    raise_interrupts()
    sleep_while_crowded()
    status, crowding = 0, Crowding()
    try:
        status = main(sys.argv[1:]) or int(bool(output_faults))
        if warning := crowding.warning():
            print(warning, file=sys.stderr)
        wait()
    except KeyboardInterrupt:
        if is_main():
            print("error: interrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        report_error(error)
        status = 1
    leave(status)
