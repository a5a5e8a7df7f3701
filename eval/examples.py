"""What a checkpoint makes of a few records: its own answers, and its NLL of every token of the record."""
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from chat import KINDS, render, tokenize
from eval.common import Loaded, progress
from eval.generate import Text, generate
from kernels.head import nll
from records import naming, read_all
from runtime.tokenizer import Tokenizer


@dataclass
class Example:
    where: str                  # file and line
    messages: list[dict]
    question: list[dict]        # the messages without the last one, if that is an answer


@dataclass
class Response:
    """What one checkpoint makes of an example."""
    answer: str
    cut: bool                                       # the answer had not ended after --max-new-tokens
    ids: list[int]                                  # of the whole record
    tokens: list[tuple[str, str, float | None]]     # their kinds of span, texts and NLL in nats (the first
    #                                                 has none, since nothing predicts it)


def read_examples(name: str, count: int, columns: Iterable[str] = ()) -> list[Example]:
    """The first `count` records that have a question. name: of a file, or as for records.data_files().
    ValueError if there are none."""
    examples = []
    for messages, file, line in read_all([name], columns):
        if len(examples) == count:
            break
        question = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if question:
            examples.append(Example(f"{file}:{line}", messages, question))
    if count and not examples:
        raise ValueError(f"{name}: has no record with a question")
    return examples


@torch.no_grad()
def token_nll(loaded: Loaded, ids: list[int]) -> list[float]:
    """NLL in nats of every token of one example but the first, by the trainer's own model and loss."""
    row = torch.tensor(ids, device=loaded.device)
    count = len(ids) - 1
    with loaded.autocast:
        hidden = loaded.model(row[:-1], torch.arange(count, device=loaded.device),
                              torch.tensor([0, count], dtype=torch.int32))
        return nll(hidden, loaded.model.head_weight, row[1:]).tolist()


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds, including special tokens: "" until a character is complete."""
    text = Text(tokenizer)
    text.decode = partial(tokenizer.decode, skip_special_tokens=False)
    return [text.add(token) for token in ids]


def respond(loaded: Loaded, examples: list[Example], args: Namespace) -> list[Response]:
    """A response to each example. ValueError if the template refuses a record."""
    tokenizer, template = loaded.tokenizer, loaded.template
    records, prompts = [], []
    for example in examples:
        with naming(example.where):
            records.append(tokenize(render(example.messages, template), tokenizer))
            prompts.append(loaded.prompt(example.question))
    with loaded.autocast:
        outputs = generate(loaded.engine, prompts, loaded.stop_ids, args.max_new_tokens,
                           progress=partial(progress, total=len(prompts), unit="answer"))
    responses = []
    for (ids, kinds), output in zip(records, outputs):
        ids = ids[:args.max_length]
        losses = [None, *(token_nll(loaded, ids) if len(ids) > 1 else ())]
        tokens = list(zip([KINDS[kind] for kind in kinds], token_texts(tokenizer, ids), losses))
        responses.append(Response(loaded.answer(output), len(output) == args.max_new_tokens, ids, tokens))
    return responses
