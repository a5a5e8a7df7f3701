"""What a checkpoint makes of a few records: its own answers, and its NLL of every token of the record."""
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from chat import read_records, render, tokenize
from runtime.tokenizer import Tokenizer
from eval.common import Loaded, gather, progress
from eval.generate import Text, generate
from kernels.head import nll
from runtime.distributed import rank, world_size


@dataclass
class Example:
    where: str                  # file and line
    messages: list[dict]
    question: list[dict]        # all messages, without the last one if that is an answer
    expected: str | None        # that answer


@dataclass
class Response:
    """What one checkpoint makes of an example. Token t has the NLL nll[t - 1]; nothing predicts the first."""
    answer: str | None          # None if the example has no question
    cut: bool                   # the answer had not ended after --max-new-tokens
    ids: list[int]
    kinds: list[int]
    texts: list[str]            # the text that each token adds: "" until a character is complete
    nll: list[float]            # nats


def read_examples(file: str, count: int) -> list[Example]:
    """The first `count` records of a file. ValueError if it has none."""
    examples = []
    for messages, line in islice(read_records(file), count):
        answered = messages[-1]["role"] == "assistant"
        question = messages[:-1] if answered else messages
        expected = messages[-1]["content"] if answered else None
        examples.append(Example(f"{file}:{line}", messages, question, expected))
    if count and not examples:
        raise ValueError(f"{file}: has no records")
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
    """The text that each token adds, including special tokens."""
    text = Text(tokenizer)
    text.decode = partial(tokenizer.decode, skip_special_tokens=False)
    return [text.add(token) for token in ids]


def respond(loaded: Loaded, examples: list[Example], args: Namespace) -> list[Response]:
    """A response to each example; the ranks share the work. ValueError if the template refuses a record."""
    indices, prompts, responses = range(rank(), len(examples), world_size()), {}, []
    for i in indices:
        example = examples[i]
        try:
            ids, kinds = tokenize(render(example.messages, loaded.template), loaded.tokenizer)
            if example.question:
                prompts[i] = tokenize(render(example.question, loaded.template, add_generation_prompt=True),
                                      loaded.tokenizer)[0]
        except ValueError as error:
            raise ValueError(f"{example.where}: {error}") from None
        ids, kinds = ids[:args.max_length], kinds[:args.max_length]
        losses = token_nll(loaded, ids) if len(ids) > 1 else []
        responses.append(Response(None, False, ids, kinds, token_texts(loaded.tokenizer, ids), losses))
    bar = partial(progress, total=len(prompts), unit="answer")
    outputs = {}
    if prompts:
        with loaded.autocast:
            generated = generate(loaded.engine, list(prompts.values()), loaded.stop_ids, args.max_new_tokens,
                                 progress=bar)
        outputs = dict(zip(prompts, generated))
    for i, response in zip(indices, responses):
        if i in outputs:
            response.answer = loaded.answer(outputs[i])
            response.cut = len(outputs[i]) == args.max_new_tokens
    gathered = gather(list(zip(indices, responses)))
    return [response for _, response in sorted(gathered, key=lambda pair: pair[0])]
