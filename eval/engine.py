"""Token by token: a key/value cache, slots that are filled again as answers end, greedy or sampled.

    for number, ids, stopped in Engine(model).answers(prompts, stop, max_new_tokens): ...

A fixed number of slots runs at once; when an answer ends, the next prompt takes its slot while the others go
on. Prompts go through the model as a packed row, as in training. Steps of one token a slot have a way of
their own (Engine.step): there the weights' way from memory and the number of kernels are what takes time.

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

from model import Llama, compute_dtype

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


# ---------------------------------------------------------------- steps with a cache


class Cache:
    """Keys and values of the slots' documents, (layers, 2, B, G, T, D) in the dtype to compute in. Values
    behind a document's end are finite leftovers that nobody looks at."""

    def __init__(self, model: Llama, slots: int):
        config, weight = model.config, model.head_weight
        self.data = torch.zeros(config.num_hidden_layers, 2, slots, config.num_key_value_heads, 0,
                                config.head_dim, dtype=compute_dtype(weight), device=weight.device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=weight.device)     # (B,)
        self.seen: list[tuple[Tensor, Tensor]] = []     # each layer's keys and values, (B * G, T, D), views

    def fit(self, places: int) -> None:
        """Make T `places`, rounded up to 64, or leave it up to a third larger. No larger: a product of
        matrices that are not dense copies them, which in every step takes longer than this now and then."""
        now, wanted = self.data.shape[4], -(-places // 64) * 64
        if not wanted <= now <= wanted * 4 // 3:
            more = self.data.new_zeros(*self.data.shape[:4], max(0, wanted - now), self.data.shape[5])
            self.hold(torch.cat([self.data[..., :wanted, :], more], 4))

    def keep(self, slots: list[int]) -> None:
        kept = torch.tensor(slots, device=self.lengths.device)
        self.lengths = self.lengths[kept]
        self.hold(self.data.index_select(2, kept))

    def hold(self, data: Tensor) -> None:
        self.data, self.seen = data, [layer.unbind() for layer in data.flatten(2, 3)]

    def rows(self, slots: Tensor, places: Tensor) -> Tensor:
        """slots, places: (N,). Returns (N * G,): where their keys are in (B * G * T, D)."""
        heads, size = self.data.shape[3:5]
        heads = slots[:, None] * heads + torch.arange(heads, device=slots.device)
        return (heads * size + places[:, None]).flatten()

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v: (N, G, D)."""
        for cached, new in zip(self.seen[layer], (k, v)):
            cached.view(-1, cached.shape[-1]).index_copy_(0, rows, new.reshape(-1, new.shape[-1]).to(cached))


def packed(dtype: torch.dtype, *linears: nn.Module) -> Callable[[Tensor], Tensor]:
    """x (B, in) -> what the linears make of it, side by side. Their weights are cast and put together once;
    in bf16 on the CPU also laid out as oneDNN's product wants them, which else every call does again: with
    16 rows all of SmolLM2-135M's products take 10 ms a step then, not 14 (two cores)."""
    weight, bias = linears[0].weight, getattr(linears[0], "bias", None)
    if len(linears) > 1:
        weight = torch.cat([linear.weight for linear in linears])
        bias = None if bias is None else torch.cat([linear.bias for linear in linears])
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    ops = torch.ops.mkldnn
    if (weight.device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
            and ops._is_mkldnn_bf16_supported()):
        weight = ops._reorder_linear_weight(weight.detach())
        return lambda x: ops._linear_pointwise(x, weight, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


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

    def fill(self, cache: Cache, slots: list[int], prompts: list[list[int]], longest: int = 0) -> Tensor:
        """Run the prompts, as one packed row, into the slots. Returns their last hidden states. longest: of
        the documents that are in other slots."""
        device, lengths = cache.lengths.device, [len(prompt) for prompt in prompts]
        cache.fit(max(longest, *lengths))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        places = torch.cat([torch.arange(n) for n in lengths]).to(device)
        slots, counts = torch.tensor(slots, device=device), torch.tensor(lengths, device=device)
        rows = cache.rows(slots.repeat_interleave(counts), places)
        attend = self.model.attention_over(cu_seqlens, device)

        def attend_and_keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, rows, k, v)
            return attend(layer, q, k, v)

        cache.lengths[slots] = counts
        hidden = self.model(ids, places, cu_seqlens, attend=attend_and_keep)
        return hidden[counts.cumsum(0) - 1]                                     # (prompts, C)

    def step(self, cache: Cache, tokens: Tensor, longest: int) -> Tensor:
        """What the model computes for one more token in every slot: ids (B,) -> hidden states (B, C).
        longest: of the documents in use, with this token; leftovers of others may be longer."""
        config, model = self.model.config, self.model.model
        queries, keys, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        cache.fit(longest)
        total = cache.data.shape[4]
        places = cache.lengths.clamp(max=total - 1)
        rows = cache.rows(torch.arange(len(tokens), device=tokens.device), places)
        unseen = torch.arange(total, device=tokens.device) > places[:, None]    # (B, T)
        mask = torch.where(unseen, -math.inf, 0.0)[:, None, None]               # (B, 1, 1, T), fp32
        angles = places[:, None, None].float() * self.model.frequencies.to(tokens.device)
        cos, sin = angles.cos(), angles.sin()                                   # (B, 1, D / 2)
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        x = model.embed_tokens(tokens)
        for i, (layer, qkv, o, gate_up, down) in enumerate(self.layers):
            own = layer.self_attn
            qkv = qkv(layer.input_layernorm(x)).unflatten(-1, (-1, size))       # (B, H + 2 G, D)
            qk = qkv[:, :queries + keys]
            if config.qk_norm:
                qk = torch.cat([own.q_norm(qk[:, :queries]), own.k_norm(qk[:, queries:])], 1)
            qk = qk.float()
            qk = (qk * cos).addcmul_(qk.roll(size // 2, -1), sin).to(self.dtype)
            cache.write(i, rows, qk[:, queries:], qkv[:, queries + keys:])
            q = qk[:, :queries].reshape(-1, queries // keys, size)              # (B * G, H / G, D)
            k, v = cache.seen[i]                                                # (B * G, T, D)
            # keys times queries: the other way round the keys would be copied, which takes twice the time
            scores = torch.bmm(k, q.transpose(1, 2)).transpose(1, 2).contiguous()   # (B * G, H / G, T)
            weights = torch.add(mask, scores.unflatten(0, (-1, keys)), alpha=size ** -0.5).softmax(-1)
            x = x + o(torch.bmm(weights.flatten(0, 1).to(self.dtype), v).view(len(tokens), -1))
            gate, up = gate_up(layer.post_attention_layernorm(x)).chunk(2, -1)
            x = x + down(F.silu(gate) * up)
        cache.lengths += 1
        return model.norm(x)

    @torch.no_grad()
    def answers(self, prompts: list[list[int]], stop: set[int], max_new_tokens: int, batch_size: int = 64,
                sampling: Sampling = Sampling(), keys: Sequence[tuple[int, ...]] | None = None,
                on_token: Callable[[int, int], None] | None = None,
                done: Callable[[int, list[int]], bool] | None = None
                ) -> Iterator[tuple[int, list[int], bool]]:
        """Yields (number of the prompt, ids up to and without the first of `stop`, whether there was one) as
        answers end, longest prompts first. keys: names each prompt for Sampling.draws, default its number;
        on_token(number, id) is called as tokens come; done(number, ids) then says whether to end here too."""
        waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        cache = Cache(self.model, min(batch_size, len(prompts)))
        device, running = cache.lengths.device, [-1] * len(cache.lengths)       # each slot's prompt; -1: free
        outputs: list[list[int]] = [[] for _ in prompts]
        hidden = self.model.head_weight.new_zeros(len(running), self.model.config.hidden_size)
        draws = torch.zeros(len(running), max_new_tokens if sampling.temperature else 1, device=device)
        made = torch.zeros_like(cache.lengths)                                  # (B,) tokens of the answers
        longest = 0                                                             # of those that run on
        while waiting or max(running, default=-1) >= 0:
            free = [slot for slot, i in enumerate(running) if i < 0]
            if waiting and free:
                filled: dict[int, list[int]] = {}
                while waiting and len(filled) < len(free) and sum(map(len, filled.values())) < ROW:
                    slot, i = free[len(filled)], waiting.pop()
                    running[slot], filled[slot] = i, prompts[i]
                    if sampling.temperature:
                        draws[slot] = sampling.draws(keys[i] if keys else (i,), max_new_tokens)
                slots = list(filled)
                hidden[slots] = self.fill(cache, slots, list(filled.values()), longest).to(hidden)
                made[slots] = 0
            elif len(free) * 2 >= len(running):     # nothing waits any more: go on with those that run
                kept = [slot for slot, i in enumerate(running) if i >= 0]
                cache.keep(kept)
                running = [running[slot] for slot in kept]
                hidden, draws, made = hidden[kept], draws[kept], made[kept]
            draw = draws.gather(1, made.clamp(max=draws.shape[1] - 1)[:, None])[:, 0]
            tokens = sampling.choose(self.head(hidden.to(self.dtype)), draw)    # (B,)
            made += 1
            longest = 0
            for slot, (i, token) in enumerate(zip(running, tokens.tolist())):
                if i < 0:
                    continue
                ended = token in stop
                if not ended:
                    outputs[i].append(token)
                    if on_token:
                        on_token(i, token)
                if ended or len(outputs[i]) == max_new_tokens or (done and done(i, outputs[i])):
                    running[slot] = -1
                    yield i, outputs[i], ended
                else:
                    longest = max(longest, len(prompts[i]) + len(outputs[i]))
            if longest:
                hidden = self.step(cache, tokens, longest)
