"""A few records seen closely: a checkpoint's own answers, and its NLL of every token of what stands there."""
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from chat import Tokenizer, read_records, render, tokenize
from eval.common import Loaded, gather, progress
from eval.generate import Text, generate
from kernels.head import nll
from runtime.distributed import rank, world_size


@dataclass
class Example:
    where: str                  # file and line
    messages: list[dict]
    question: list[dict]        # what is to be answered: all but the last message, if that is an assistant's
    expected: str | None        # that one's text


@dataclass
class Seen:
    """What one checkpoint makes of an example. Token t has the NLL nll[t - 1]; nothing predicts the first."""
    answer: str | None          # None: there is nothing to answer
    cut: bool                   # it had not ended after --max-new-tokens
    ids: list[int]
    kinds: list[int]
    texts: list[str]            # of each token; empty where it is not the last one of a character
    nll: list[float]            # nats


def read_examples(file: str, count: int) -> list[Example]:
    """The first `count` records of a file; ValueError if there is none."""
    examples = []
    for messages, line in islice(read_records(file), count):
        answered = messages[-1]["role"] == "assistant"
        question = messages[:-1] if answered else messages
        examples.append(Example(f"{file}:{line}", messages, question,
                                messages[-1]["content"] if answered else None))
    if count and not examples:
        raise ValueError(f"{file}: holds no record")
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
    """The text that each token adds, special tokens too."""
    text = Text(tokenizer)
    text.decode = partial(tokenizer.decode, skip_special_tokens=False)
    return [text.add(token) for token in ids]


def look(loaded: Loaded, examples: list[Example], args: Namespace) -> list[Seen]:
    """One for each example; the ranks share the work. ValueError where the template refuses a record."""
    mine, prompts, seen = range(rank(), len(examples), world_size()), {}, []
    for i in mine:
        example = examples[i]
        try:
            ids, kinds = tokenize(render(example.messages, loaded.template), loaded.tokenizer)
            if example.question:
                prompts[i] = tokenize(render(example.question, loaded.template, add_generation_prompt=True),
                                      loaded.tokenizer)[0]
        except ValueError as error:
            raise ValueError(f"{example.where}: {error}") from None
        ids, kinds = ids[:args.max_length], kinds[:args.max_length]
        seen.append(Seen(None, False, ids, kinds, token_texts(loaded.tokenizer, ids),
                         token_nll(loaded, ids) if len(ids) > 1 else []))
    bar = partial(progress, total=len(prompts), unit="answer")
    with loaded.autocast:
        outputs = dict(zip(prompts, generate(loaded.engine, list(prompts.values()), loaded.stop_ids,
                                             args.max_new_tokens, progress=bar))) if prompts else {}
    for i, one in zip(mine, seen):
        if i in outputs:
            one.answer = loaded.answer(outputs[i])
            one.cut = len(outputs[i]) == args.max_new_tokens
    gathered = gather(list(zip(mine, seen)))
    return [one for _, one in sorted(gathered, key=lambda each: each[0])]
