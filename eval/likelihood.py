"""Log-likelihoods of many continuations. Tokens that requests share at their start are computed once.

    for number, total, greedy in log_likelihoods(model, [(inputs, targets), ...], capacity=4096): ...

The inputs are sorted, so requests that begin alike follow each other: the choices of a question, questions
behind the same header. One key/value cache holds the inputs of the current request. The next request keeps
what both begin with, overwrites the rest, and only its new tokens go through the model. Many requests' new
tokens share a row, so that the linear layers work on large matrices; attention takes one request at a time.

Shapes: N tokens of a row, n of them of one request, L tokens of that request up to there, H query heads,
G key/value heads, D head size, C width, T targets.
"""
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layers import compute_dtype
from model import Attend, Llama
from runtime.machine import to_device
from runtime.tokenizer import check_rows

# The most queries in one attention call. It bounds the memory of masks and scores.
TILE = 128
# The most logits in memory at once: 64 MB in fp32.
CHUNK_LOGITS = 2**24

# Token ids of the inputs and of the targets. The last len(targets) inputs predict the targets.
Request = tuple[Sequence[int], Sequence[int]]


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens a and b have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def make_rows(requests: list[Request], capacity: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yields rows of at most `capacity` tokens as lists of (request, first, last): compute tokens first to
    last of the request's inputs. Where first == last, earlier requests have computed all of them."""
    row, free, previous = [], capacity, []
    for i in sorted(range(len(requests)), key=lambda i: list(requests[i][0])):
        inputs = requests[i][0]
        first, end = shared_prefix(previous, inputs), len(inputs)
        while True:
            if first < end and not free:
                yield row
                row, free = [], capacity
            last = min(end, first + min(free, TILE))
            row.append((i, first, last))
            free -= last - first
            first = last
            if first == end:
                break
        previous = inputs
    if row:
        yield row


def attend_to_own_request(row: list[tuple[int, int, int]], cache: Tensor) -> Attend:
    """Causal attention of each token to the inputs of its own request.

    cache: (layers, 2, G, longest inputs, D), keys and values of the current request; the row's are added."""
    masks = [torch.ones(last - first, last, dtype=torch.bool, device=cache.device).tril(first)
             for _, first, last in row]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, end = torch.empty_like(q), 0
        for (_, first, last), mask in zip(row, masks):
            start, end = end, end + last - first
            cache[layer, :, :, first:last] = torch.stack((k[start:end], v[start:end])).transpose(1, 2)
            keys, values = cache[layer, :, None, :, :last]              # (1, G, L, D)
            queries = q[start:end].transpose(0, 1)[None]                # (1, H, n, D)
            result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
            out[start:end] = result[0].transpose(0, 1)
        return out

    return attend


def score(model: Llama, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden: (T, C); targets: (T,). Returns the targets' log-probabilities, (T,) fp32, and whether each is
    the most likely token, (T,) bool."""
    weight = model.head_weight.to(compute_dtype(model.head_weight))
    chunk = max(1, CHUNK_LOGITS // len(weight))
    log_p, greedy = [], []
    for states, ids in zip(hidden.to(weight.dtype).split(chunk), targets.split(chunk)):
        logits = F.linear(states, weight).float()
        log_p.append(logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1))
        greedy.append(logits.argmax(-1) == ids)
    return torch.cat(log_p), torch.cat(greedy)


@torch.no_grad()
def log_likelihoods(model: Llama, requests: list[Request], capacity: int = 4096
                    ) -> Iterator[tuple[int, float, bool]]:
    """Yields (index of the request, log-likelihood of its targets in nats, whether greedy decoding would give
    them) as requests finish, in another order than theirs.

    Each request needs at least one target and at least as many inputs as targets. capacity: tokens of a row.
    ValueError for an id beyond the embedding."""
    if not requests:
        return
    tokens = chain.from_iterable(ids for request in requests for ids in request)
    check_rows(tokens, model.config.vocab_size, "a text holds")
    config, device = model.config, model.head_weight.device
    longest = max(len(inputs) for inputs, _ in requests)
    cache = torch.zeros(config.num_hidden_layers, 2, config.num_key_value_heads, longest, config.head_dim,
                        dtype=compute_dtype(model.head_weight), device=device)
    # Final hidden states of the current request. Its targets may be predicted by tokens of earlier rows.
    states = torch.zeros(longest, config.hidden_size, device=device)
    for row in make_rows(requests, capacity):
        ids = [token for i, first, last in row for token in requests[i][0][first:last]]
        places = [place for _, first, last in row for place in range(first, last)]
        ids_and_places = to_device(torch.tensor([ids, places], dtype=torch.int64), device)
        hidden = model(*ids_and_places, None, attend=attend_to_own_request(row, cache))
        # The states that predict the targets of the requests that end in this row.
        ended, predicting, start = [], [], 0
        for i, first, last in row:
            inputs, targets = requests[i]
            states[first:last] = hidden[start:start + last - first]
            start += last - first
            if last == len(inputs):
                ended.append(i)
                predicting.append(states[last - len(targets):last].clone())
        if not ended:
            continue
        wanted = to_device(torch.tensor([token for i in ended for token in requests[i][1]]), device)
        # One copy of both, for which the host waits.
        log_p, greedy = torch.stack([x.double() for x in score(model, torch.cat(predicting), wanted)]).cpu()
        sizes = [len(requests[i][1]) for i in ended]
        for i, values, right in zip(ended, log_p.split(sizes), greedy.split(sizes)):
            yield i, values.sum().item(), bool(right.all())
