"""Token by token: a key/value cache, slots that are filled again as answers end, greedy or sampled.

    for number, ids, stopped in Engine(model).answers(prompts, stop, max_new_tokens): ...

A fixed number of slots runs at once; when an answer ends, the next prompt takes its slot while the others go
on. Prompts go through the model as a packed row, as in training. In a step every slot computes its last token
and those that Document.guess expects to follow it. What is chosen behind a token counts only if all guesses
up to there were right: answers are the same as token by token, but for rounding, and come faster.

Shapes: B slots, T places in the cache, H query heads, G key/value heads, D head size, C width,
N packed tokens, V vocabulary.
"""
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Llama, RMSNorm, compute_dtype

LOOKUP = 3      # the most tokens that are guessed for a document in a step
ROW = 8192      # tokens of prompts that are run at once, or one prompt more; other free slots wait a step

# ---------------------------------------------------------------- choosing a token


@dataclass(frozen=True)
class Sampling:
    """temperature 0: greedy. top_k 0 and top_p 1: from the whole vocabulary."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def draws(self, key: tuple[int, ...], count: int) -> Tensor:
        """(count,) numbers in [0, 1), a prompt's own, whatever runs beside it; key: which prompt."""
        state = np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)[0]
        return torch.rand(count, generator=torch.Generator().manual_seed(int(state) >> 1))

    def choose(self, logits: Tensor, draw: Tensor) -> Tensor:
        """logits: (B, V); draw: (B,) in [0, 1). Returns ids, (B,). Temperature, then top-k, then top-p, as
        transformers does; then where the running sum of the probabilities left passes draw."""
        if not self.temperature:
            return logits.float().argmax(-1)    # of bf16 it takes five times as long
        logits, ids = (logits.float() - logits.amax(-1, keepdim=True)) / self.temperature, None
        if self.top_k:
            logits, ids = logits.topk(min(self.top_k, logits.shape[-1]))        # falling
        if self.top_p < 1:
            few = min(1024, logits.shape[-1]) if logits.device.type == "cpu" else logits.shape[-1]
            mass = logits.softmax(-1)
            most = mass.topk(few)
            if bool((most.values.sum(-1) < self.top_p).any()):                  # flat: sort it all
                most = mass.sort(-1, descending=True)
            ids = most.indices if ids is None else ids.gather(-1, most.indices)
            before = most.values.double().cumsum(-1) - most.values              # of what is more probable
            mass = most.values.masked_fill(before >= self.top_p, 0)
        else:
            mass = logits.softmax(-1)
        total = mass.double().cumsum(-1)
        # In fp64 draw * total is less than the total, so no id without probability is ever taken.
        chosen = torch.searchsorted(total, draw.double()[:, None] * total[:, -1:], right=True)
        return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


# ---------------------------------------------------------------- guessing tokens


class Document:
    """A prompt and its answer so far. Two tokens that stood in it before are followed by the same as then
    often enough to guess so, and to let one step of the model check several tokens (prompt lookup decoding,
    Saxena 2023)."""

    def __init__(self, number: int, prompt: list[int], room: int, draws: Tensor):
        """room: the most tokens of an answer; draws: (room,), what Sampling.choose takes for each."""
        self.number, self.start, self.room, self.draws = number, len(prompt), room, draws
        self.ids: list[int] = []
        self.follows: dict[tuple[int, int], int] = {}   # two tokens -> the place behind their last occurrence
        self.trust, self.stopped, self.ended = 2, False, False
        for token in prompt:
            self.add(token)

    def add(self, token: int) -> None:
        if len(self.ids) > 1:
            self.follows[self.ids[-2], self.ids[-1]] = len(self.ids)
        self.ids.append(token)

    @property
    def made(self) -> int:
        return len(self.ids) - self.start

    def guess(self, most: int) -> list[int]:
        """One token more than were right the last time, at the most; a loop is guessed to go on."""
        place, guess = self.follows.get(tuple(self.ids[-2:])), []
        if place:
            for j in range(place, place + min(most, self.trust, self.room - self.made - 1)):
                guess.append(self.ids[j] if j < len(self.ids) else guess[j - len(self.ids)])
        return guess

    def take(self, chosen: list[int], guess: list[int], stop: set[int],
             done: Callable[[int, list[int]], bool] | None = None) -> None:
        """chosen: what the model chose behind the last token and behind each guessed one. They count up to
        the first that was not guessed, which still does. stop, done: as Engine.answers takes them."""
        before = self.made
        for token, guessed in zip(chosen, [*guess, None]):
            if token in stop:
                self.stopped = True
            else:
                self.add(token)
            self.ended = self.stopped or self.made == self.room or bool(
                done and done(self.number, self.ids[self.start:]))
            if self.ended or token != guessed:
                break
        if guess:
            self.trust = max(1, self.made - before)


# ---------------------------------------------------------------- steps with a cache


class Cache:
    """Keys and values of the slots' documents, (layers, 2, B, G, T, D) in the dtype to compute in. What is
    behind a document's end is finite, and nobody looks at it."""

    def __init__(self, model: Llama, slots: int):
        config, weight = model.config, model.head_weight
        self.data = torch.zeros(config.num_hidden_layers, 2, slots, config.num_key_value_heads, 0,
                                config.head_dim, dtype=compute_dtype(weight), device=weight.device)
        self.seen: list[tuple[Tensor, Tensor]] = []     # each layer's keys and values, (B * G, T, D), views

    def fit(self, places: int) -> None:
        """Make T `places`, rounded up to 64, or leave it up to a third larger. No larger: a product of
        matrices that are not dense copies them, which in every step takes longer than this now and then."""
        now, wanted = self.data.shape[4], -(-places // 64) * 64
        if not wanted <= now <= wanted * 4 // 3:
            more = self.data.new_zeros(*self.data.shape[:4], max(0, wanted - now), self.data.shape[5])
            self.hold(torch.cat([self.data[..., :wanted, :], more], 4))

    def keep(self, slots: list[int]) -> None:
        self.hold(self.data.index_select(2, torch.tensor(slots, device=self.data.device)))

    def hold(self, data: Tensor) -> None:
        self.data, self.seen = data, [layer.unbind() for layer in data.flatten(2, 3)]

    def rows(self, slots: Tensor, places: Tensor) -> Tensor:
        """slots, places: (N,). Returns (N * 2 * G,): where their keys and values are in a layer, seen as
        (2 * B * G * T, D)."""
        both, count, heads, size = self.data.shape[1:5]
        which = torch.arange(both * heads, device=slots.device)                 # (2 * G,)
        first = which // heads * count * heads + which % heads
        return ((slots[:, None] * heads + first) * size + places[:, None]).flatten()

    def write(self, layer: int, rows: Tensor, kv: Tensor) -> None:
        """kv: (N, 2 * G, D), keys and values."""
        self.data[layer].view(-1, kv.shape[-1]).index_copy_(0, rows, kv.reshape(-1, kv.shape[-1]))


def packed(dtype: torch.dtype, *linears: nn.Module) -> Callable[..., Tensor]:
    """(x (N, in), residual (N, out) or None) -> what the linears make of x, side by side, with the residual
    added. Their weights are cast and put together once; in bf16 on the CPU also laid out as oneDNN's product
    wants them, which else every call does again: with 16 rows all of SmolLM2-135M's products take 10 ms a
    step then, not 14 (two cores)."""
    weight, bias = linears[0].weight, getattr(linears[0], "bias", None)
    if len(linears) > 1:
        weight = torch.cat([linear.weight for linear in linears])
        bias = None if bias is None else torch.cat([linear.bias for linear in linears])
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    ops = torch.ops.mkldnn
    if not (weight.device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
            and ops._is_mkldnn_bf16_supported()):
        return lambda x, residual=None: (F.linear(x, weight, bias) if residual is None else
                                         residual + F.linear(x, weight, bias))
    weight = ops._reorder_linear_weight(weight.detach())

    def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None and residual.dtype == dtype:
            return ops._linear_pointwise.binary(x, residual, weight, bias, "add")
        out = ops._linear_pointwise(x, weight, bias, "none", [], "")
        return out if residual is None else residual + out

    return product


def normed(norm: RMSNorm, x: Tensor) -> Tensor:
    """norm(x) by PyTorch's one kernel: without the way through autograd, and in fewer steps, which take longer
    than a few rows' norm."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps).to(compute_dtype(x))


class Engine:
    """A model made ready to generate; it must not be trained while this is in use."""

    @torch.no_grad()
    def __init__(self, model: Llama):
        self.model, self.dtype = model, compute_dtype(model.head_weight)
        self.layers = []
        for layer in model.model.layers:
            own, mlp = layer.self_attn, layer.mlp
            self.layers.append((layer, packed(self.dtype, own.q_proj, own.k_proj, own.v_proj),
                                packed(self.dtype, own.o_proj),
                                packed(self.dtype, mlp.gate_proj, mlp.up_proj),
                                packed(self.dtype, mlp.down_proj)))
        self.head = packed(self.dtype, model.lm_head or model.model.embed_tokens)

    def forward(self, ids: Tensor, places: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """What the model computes, from the packed weights: ids, places (N,) -> hidden states (N, C).
        attend: (layer, heads (N, H + 2 G, D)) -> (N, H * D); heads are queries, keys and values, in place."""
        config, model = self.model.config, self.model.model
        size, turned = config.head_dim, config.num_attention_heads + config.num_key_value_heads
        angles = places[:, None, None].float() * self.model.frequencies.to(ids.device)
        cos, sin = angles.cos(), angles.sin()                                   # (N, 1, D / 2)
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        x = model.embed_tokens(ids)
        for i, (layer, qkv, o, gate_up, down) in enumerate(self.layers):
            heads = qkv(normed(layer.input_layernorm, x)).unflatten(-1, (-1, size))
            qk, own = heads[:, :turned], layer.self_attn
            if config.qk_norm:
                queries = config.num_attention_heads
                qk = torch.cat([own.q_norm(qk[:, :queries]), own.k_norm(qk[:, queries:])], 1)
            qk = qk.float()
            heads[:, :turned] = (qk * cos).addcmul_(qk.roll(size // 2, -1), sin)
            x = o(attend(i, heads), x)
            gate, up = gate_up(normed(layer.post_attention_layernorm, x)).chunk(2, -1)
            x = down(F.silu(gate).mul_(up), x)
        return normed(model.norm, x)

    def fill(self, cache: Cache, prompts: dict[int, list[int]], longest: int = 0) -> Tensor:
        """Run the prompts, {slot: ids}, as one packed row into their slots. Returns their last hidden states,
        (prompts, C). longest: of the documents that are in other slots."""
        device, lengths = cache.data.device, [len(prompt) for prompt in prompts.values()]
        queries, keys = self.model.config.num_attention_heads, self.model.config.num_key_value_heads
        cache.fit(max(longest, *lengths))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        ids = torch.tensor([token for prompt in prompts.values() for token in prompt], device=device)
        places = torch.cat([torch.arange(n) for n in lengths]).to(device)
        slots = torch.tensor(list(prompts)).repeat_interleave(torch.tensor(lengths)).to(device)
        rows, over = cache.rows(slots, places), self.model.attention_over(cu_seqlens, device)

        def attend(layer: int, heads: Tensor) -> Tensor:
            cache.write(layer, rows, heads[:, queries:])
            return over(layer, *heads.split([queries, keys, keys], 1)).flatten(1)

        return self.forward(ids, places, attend)[cu_seqlens[1:].to(device) - 1]

    def step(self, cache: Cache, tokens: list[list[int]], starts: list[int]) -> Tensor:
        """What the model computes for the next tokens of the slots' documents, none, one or more of each,
        that begin at the places `starts`: hidden states (N, C), slot by slot. They are written to the cache,
        over whatever is there."""
        config, device = self.model.config, cache.data.device
        queries, keys, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        cache.fit(max(start + len(some) for start, some in zip(starts, tokens)))
        slots, total, most = len(tokens), cache.data.shape[4], max(map(len, tokens))
        slot, which, ids = torch.tensor([(i, j, token) for i, some in enumerate(tokens)
                                         for j, token in enumerate(some)], device=device).unbind(1)     # (N,)
        places = torch.tensor(starts, device=device)[:, None] + torch.arange(most, device=device)  # (B, most)
        unseen = torch.arange(total, device=device) > places[..., None]         # (B, most, T)
        mask = torch.where(unseen, -math.inf, 0.0)[:, None, :, None]            # (B, 1, most, 1, T), fp32
        places, even = places[slot, which], len(ids) == slots * most    # else queries are padded with zeros
        rows = cache.rows(slot, places)

        def attend(layer: int, heads: Tensor) -> Tensor:
            cache.write(layer, rows, heads[:, queries:])
            q, (k, v) = heads[:, :queries], cache.seen[layer]                   # k, v: (B * G, T, D)
            if even:
                q = q.unflatten(0, (slots, most))
            else:
                q = q.new_zeros(slots, most, queries, size).index_put_((slot, which), q)
            q = q.unflatten(2, (keys, -1)).transpose(1, 2)                      # (B, G, most, H / G, D)
            scores = torch.bmm(q.reshape(len(k), -1, size), k.transpose(1, 2)).view(*q.shape[:-1], total)
            weights = torch.add(mask, scores, alpha=size ** -0.5).softmax(-1).to(self.dtype)
            out = torch.bmm(weights.view(len(k), -1, total), v)
            out = out.view(q.shape).transpose(1, 2)                             # (B, most, G, H / G, D)
            return (out.flatten(0, 1) if even else out[slot, which]).flatten(1)

        return self.forward(ids, places, attend)

    @torch.no_grad()
    def answers(self, prompts: list[list[int]], stop: set[int], max_new_tokens: int, batch_size: int = 64,
                sampling: Sampling = Sampling(), keys: Sequence[tuple[int, ...]] | None = None,
                on_token: Callable[[int, int], None] | None = None,
                done: Callable[[int, list[int]], bool] | None = None, lookup: int = LOOKUP
                ) -> Iterator[tuple[int, list[int], bool]]:
        """Yields (number of the prompt, ids up to and without the first of `stop`, whether there was one) as
        answers end, short prompts first: documents of like length then run together, and a step computes
        over the longest one's places for all. keys: names each prompt for Sampling.draws, default its number;
        on_token(number, id) is called as tokens come; done(number, ids) says behind each whether to end there
        too; lookup: the most tokens to guess (Document.guess)."""
        waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        running: list[Document | None] = [None] * min(batch_size, len(prompts))     # each slot's
        cache, greedy = Cache(self.model, len(running)), torch.zeros(max_new_tokens)
        while waiting or any(running):
            free = [slot for slot, document in enumerate(running) if not document]
            if waiting and free:
                new: dict[int, list[int]] = {}
                while waiting and free and sum(map(len, new.values())) < ROW:
                    slot, i = free.pop(0), waiting.pop()
                    draws = (sampling.draws(keys[i] if keys else (i,), max_new_tokens)
                             if sampling.temperature else greedy)
                    running[slot], new[slot] = Document(i, prompts[i], max_new_tokens, draws), prompts[i]
                hidden = self.fill(cache, new, max(len(document.ids) for document in running if document))
                guesses: dict[int, list[int]] = {slot: [] for slot in new}
            else:
                if len(free) * 2 >= len(running):       # nothing waits any more: go on with those that run
                    cache.keep([slot for slot, document in enumerate(running) if document])
                    running = [document for document in running if document]
                guesses = {slot: document.guess(lookup) for slot, document in enumerate(running) if document}
                hidden = self.step(cache, [[document.ids[-1], *guesses[slot]] if document else []
                                           for slot, document in enumerate(running)],
                                   [len(document.ids) - 1 if document else 0 for document in running])
            draw = torch.cat([running[slot].draws[running[slot].made:][:len(guess) + 1]
                              for slot, guess in guesses.items()])
            chosen = iter(sampling.choose(self.head(hidden.to(self.dtype)), draw.to(hidden.device)).tolist())
            for slot, guess in guesses.items():
                document, before = running[slot], len(running[slot].ids)
                document.take([next(chosen) for _ in range(len(guess) + 1)], guess, stop, done)
                for token in document.ids[before:] if on_token else ():
                    on_token(document.number, token)
                if document.ended:
                    running[slot] = None
                    yield document.number, document.ids[document.start:], document.stopped
