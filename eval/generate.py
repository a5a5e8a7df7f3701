"""Greedy generation with a key/value cache, and how often it answers held-out prompts exactly.

Shapes: B prompts at once, T places in the cache, H query heads, G key/value heads, D head size,
N packed tokens.
"""
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Template, Tokenizer, read_records, render, tokenize
from model import Llama, attention


class Cache:
    """Keys and values of B documents. Prompts come in as one packed row,
    after that every document by one token."""

    def __init__(self, model: Llama, lengths: list[int], places: int, device: torch.device):
        config = model.config
        self.shape = (len(lengths), places, config.num_key_value_heads, config.head_dim)
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.lengths = torch.tensor(lengths, device=device)                     # (B,)
        self.documents = torch.repeat_interleave(torch.arange(len(lengths), device=device), self.lengths)
        self.positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()           # on the CPU, as in a Batch

    def prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (N, H, D); k, v: (N, G, D), the packed prompts."""
        self.layers.append((k.new_zeros(self.shape), v.new_zeros(self.shape)))
        for cached, new in zip(self.layers[layer], (k, v)):
            cached[self.documents, self.positions] = new
        return attention(q, k, v, self.cu_seqlens)

    def step(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (B, H, D); k, v: (B, G, D), one token a document, at the places self.lengths."""
        rows = torch.arange(len(q), device=q.device)
        for cached, new in zip(self.layers[layer], (k, v)):
            cached[rows, self.lengths] = new
        keys, values = (x.transpose(1, 2) for x in self.layers[layer])          # (B, G, T, D)
        seen = torch.arange(self.shape[1], device=q.device) <= self.lengths[:, None]    # (B, T)
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, seen[:, None, None],
                                             enable_gqa=True)
        return out[:, :, 0]                                                     # (B, H, D)


@torch.no_grad()
def generate(model: Llama, prompts: list[list[int]], stop: set[int], max_new_tokens: int,
             batch_size: int = 64, progress: Callable = iter) -> list[list[int]]:
    """Greedy continuation of each prompt, in order, up to and without the first id of `stop`."""
    device = model.head_weight.device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))          # like lengths share a cache
    outputs: list[list[int]] = [[] for _ in prompts]
    for start in progress(range(0, len(order), batch_size)):
        group = order[start:start + batch_size]
        lengths = [len(prompts[i]) for i in group]
        cache = Cache(model, lengths, max(lengths) + max_new_tokens, device)
        ids = torch.tensor([token for i in group for token in prompts[i]], device=device)
        hidden = model(ids, cache.positions, cache.cu_seqlens, attend=cache.prompt)
        hidden = hidden[cache.lengths.cumsum(0) - 1]                            # (B, C), each prompt's last
        running = set(group)
        for _ in range(max_new_tokens):
            tokens = F.linear(hidden, model.head_weight).argmax(-1)             # (B,)
            for i, token in zip(group, tokens.tolist()):
                if i in running and token in stop:
                    running.discard(i)
                elif i in running:
                    outputs[i].append(token)
            if not running:
                break
            hidden = model(tokens, cache.lengths, None, attend=cache.step)
            cache.lengths += 1
    return outputs


def answer_records(model: Llama, tokenizer: Tokenizer, template: Template, files: list[str], limit: int,
                   progress: Callable = iter) -> list[dict]:
    """Let the model answer the last turn of the first `limit` records that end with an assistant's message.
    Returns [{"prompt", "expected", "output", "correct"}]; correct: equal but for space around it."""
    answers, prompts, longest = [], [], 1
    for file in files:
        for messages, _ in read_records(file):
            if len(answers) == limit or messages[-1]["role"] != "assistant" or len(messages) < 2:
                continue
            pieces = render(messages[:-1], template, add_generation_prompt=True)
            prompts.append(tokenize(pieces, tokenizer)[0])
            whole = tokenize(render(messages, template), tokenizer)[0]
            longest = max(longest, len(whole) - len(prompts[-1]))       # no longer answer can be right
            answers.append({"prompt": messages[-2]["content"], "expected": messages[-1]["content"].strip()})
    outputs = generate(model, prompts, {tokenizer.special[template.end_of_turn]}, longest, progress=progress)
    for answer, ids in zip(answers, outputs):
        answer["output"] = tokenizer.decode(ids).strip()
        answer["correct"] = answer["output"] == answer["expected"]
    return answers
