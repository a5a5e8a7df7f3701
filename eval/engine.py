"""Token by token: a key/value cache, slots that are filled again as answers end, greedy or sampled.

    for number, ids, stopped in Engine(model).answers(prompts, stop, max_new_tokens): ...

The model's own layers run; attention over the cache is passed in. A fixed number of slots runs at once, and
when an answer ends, the next prompt takes its slot. A step is one packed row, as in training: new prompts
whole, and of each running document its last token with the guesses of what follows (Document.guess). A token
counts only if all guesses before it were right, so answers are the same as token by token, but for rounding,
and come faster.

Shapes: B slots, T places in the cache, H query heads, G key/value heads, D head size, C width,
N packed tokens, V vocabulary.
"""
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.flags import LOOKUP
from kernels.layers import compute_dtype
from model import Llama
from runtime.machine import to_device
from runtime.model_config import ModelConfig
from runtime.start import print_message
from runtime.tokenizer import check_rows

ROW = 8192      # tokens of prompts in a step, or one prompt more; other free slots wait for the next


# ---------------------------------------------------------------- choosing a token


def highest(logits: Tensor) -> Tensor:
    """(B,) logits.argmax(-1), the first of equals. logits: (B, V). argmax itself takes ten times as long in
    bf16 on a CPU, and more than twice as long on a copy in fp32."""
    parts = logits.unflatten(-1, (math.gcd(64, logits.shape[-1]), -1))          # (B, parts, V / parts)
    best = parts.amax(-1).float().argmax(-1)
    first = parts[torch.arange(len(best), device=best.device), best].float().argmax(-1)
    return best * parts.shape[-1] + first


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. temperature 0: greedily; top_k 0 and top_p 1: from the whole vocabulary."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def draws(self, key: tuple[int, ...], count: int) -> Tensor:
        """(count,) random numbers in [0, 1) that depend on the prompt alone, not on what runs with it. key:
        identifies the prompt."""
        state = np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)[0]
        return torch.rand(count, generator=torch.Generator().manual_seed(int(state) >> 1))

    def choose(self, logits: Tensor, draw: Tensor) -> Tensor:
        """(B,) ids. logits: (B, V); draw: (B,) random numbers in [0, 1). Temperature, then top-k, then top-p,
        as in transformers; then the id at which the cumulative probability passes draw."""
        if not self.temperature:
            return highest(logits)
        logits, ids = (logits.float() - logits.amax(-1, keepdim=True)) / self.temperature, None
        if self.top_k:
            logits, ids = logits.topk(min(self.top_k, logits.shape[-1]))
        mass = logits.softmax(-1)
        if self.top_p < 1:
            likeliest = None
            if mass.device.type == "cpu":
                # Sorting is slow there, and a few ids usually hold all of top_p.
                likeliest = mass.topk(min(1024, mass.shape[-1]))
                if bool((likeliest.values.sum(-1) < self.top_p).any()):
                    likeliest = None
            likeliest = likeliest or mass.sort(-1, descending=True)
            ids = likeliest.indices if ids is None else ids.gather(-1, likeliest.indices)
            # Left out where the probability of all ids that are more likely is top_p or more.
            units = in_units(likeliest.values)
            units = units.masked_fill(units.cumsum(-1) - units >= round(self.top_p * UNITS), 0)
        else:
            units = in_units(mass)
        total = units.cumsum(-1)
        # In fp64 draw * total is less than the total, so no id without probability is ever taken.
        chosen = torch.searchsorted(total, (draw.double()[:, None] * total[:, -1:]).long(), right=True)
        return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


UNITS = 2**52


def in_units(mass: Tensor) -> Tensor:
    """Probabilities as whole numbers of 1 / UNITS. Their cumulative sums are exact. (In deterministic
    mode CUDA refuses those of floating-point numbers.)"""
    return (mass.double() * UNITS).long()


# ---------------------------------------------------------------- guessing tokens


class Document:
    """A prompt and its answer so far. If its last two tokens have occurred in it before, what followed then
    is guessed to follow now, and one step of the model checks several tokens (prompt lookup decoding, Saxena
    2023)."""

    def __init__(self, number: int, prompt: list[int], room: int, draws: Tensor):
        """room: the most tokens of the answer; draws: (room,) a random number for each (Sampling.choose)."""
        self.number, self.start, self.room, self.draws = number, len(prompt), room, draws
        self.ids: list[int] = []
        # Two tokens -> the place after their last occurrence.
        self.follows: dict[tuple[int, int], int] = {}
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
        """At most one token more than were right the last time. A repetition is guessed to continue."""
        place, guess = self.follows.get(tuple(self.ids[-2:])), []
        if place:
            for j in range(place, place + min(most, self.trust, self.room - self.made - 1)):
                guess.append(self.ids[j] if j < len(self.ids) else guess[j - len(self.ids)])
        return guess

    def take(self, chosen: list[int], guess: list[int], stop: set[int],
             done: Callable[[int, list[int]], bool] | None = None) -> None:
        """Append chosen tokens. chosen: what the model chose after the last token and after each guess; they
        count up to and including the first that was not guessed. stop, done: as for Engine.answers."""
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
    """Keys and values of the slots' documents, (2, B, G, T, D) for each layer. Beyond a document's end they
    are finite, and never attended to."""

    def __init__(self, config: ModelConfig, slots: int, dtype: torch.dtype, device: torch.device):
        self.layers = [torch.zeros(2, slots, config.num_key_value_heads, 0, config.head_dim, dtype=dtype,
                                   device=device) for _ in range(config.num_hidden_layers)]

    def fit(self, places: int) -> None:
        """Make T `places`, rounded up to 32, unless it is up to a third larger already. Resizing now and then
        takes less time than every step's products over places that nobody needs."""
        now, wanted = self.layers[0].shape[3], -(-places // 32) * 32
        if not wanted <= now <= wanted * 4 // 3:
            self.layers = [F.pad(layer, (0, 0, 0, wanted - now)) for layer in self.layers]     # or cuts

    def keep(self, slots: list[int]) -> None:
        which = to_device(torch.tensor(slots), self.layers[0].device)
        self.layers = [layer.index_select(1, which) for layer in self.layers]

    def rows(self, slots: Tensor, places: Tensor) -> Tensor:
        """(N * 2 * G,) the indices of keys and values in a layer seen as (2 * B * G * T, D). slots, places:
        (N,)."""
        both, count, heads, size = self.layers[0].shape[:4]
        which = torch.arange(both * heads, device=slots.device)                 # (2 * G,)
        first = which // heads * count * heads + which % heads
        return ((slots[:, None] * heads + first) * size + places[:, None]).flatten()

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v, (N, G, D), to these rows of a layer (rows())."""
        keys_and_values = torch.cat([k, v], 1).flatten(0, 1)                    # (N * 2 * G, D)
        stored = self.layers[layer]
        stored.view(-1, stored.shape[-1]).index_copy_(0, rows, keys_and_values.to(stored.dtype))

    def attention(self, slots: Tensor, nth: Tensor, places: Tensor, queries: int, longest: int
                  ) -> Callable[[int, Tensor], Tensor]:
        """The attention of new tokens over the cache, (layer, q (N, H, D)) -> (N, H, D). slots, nth, places:
        (N,) each token's slot, its number among the slot's new tokens, its place in the document; queries: H;
        longest: the most new tokens of a slot.

        All queries that share keys are lines of one product, S lines for each of B * G. Slots with fewer new
        tokens than others leave some lines unused; only the two products are computed for those."""
        device, (_, count, keys, total, size) = slots.device, self.layers[0].shape      # -, B, G, T, D
        head, group = torch.arange(queries, device=device), queries // keys
        most = longest * group                                                          # S
        product = slots[:, None] * keys + head // group                                 # (N, H)
        line = nth[:, None] * group + head % group                                      # (N, H)
        line_of_query = (product * most + line).flatten()
        query_of_line = torch.zeros(count * keys * most, dtype=torch.int64, device=device)
        query_of_line[line_of_query] = torch.arange(len(line_of_query), device=device)
        unseen = torch.arange(total, device=device) > places[:, None]
        mask = torch.where(unseen, -math.inf, 0.0)[:, None]                             # (N, 1, T), fp32

        def attend(layer: int, q: Tensor) -> Tensor:
            k, v = self.layers[layer].flatten(1, 2)                                     # (B * G, T, D)
            lines = q.to(k.dtype).flatten(0, 1).index_select(0, query_of_line).view(-1, most, size)
            # Keys first: the other way round they would be copied, which takes as long again.
            scores = torch.bmm(k, lines.transpose(1, 2)).transpose(1, 2)[product, line]     # (N, H, T)
            probabilities = torch.add(mask, scores, alpha=size ** -0.5).softmax(-1).to(k.dtype)
            weights = k.new_empty(len(query_of_line), total)
            weights.index_copy_(0, line_of_query, probabilities.flatten(0, 1))
            out = torch.bmm(weights.view(-1, most, total), v)
            return out.view(-1, size).index_select(0, line_of_query).view(-1, queries, size)

        return attend


class PackedLinear(nn.Module):
    """A linear layer whose bf16 weights are laid out once as oneDNN's product on the CPU wants them, which
    else every call does again: with 16 rows all of SmolLM2-135M's products take 10 ms a step instead of 14
    (two cores)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach()), bias

    @staticmethod
    def supported(weight: Tensor) -> bool:
        return (weight.device.type == "cpu" and weight.dtype == torch.bfloat16
                and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def copy_for_generation(model: Llama, dtype: torch.dtype) -> Llama:
    """A copy whose linear layers are cast once, not in every step; all other tensors are the model's."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        if type(module) is nn.Linear:
            shared |= {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in module.parameters()}
    copied = copy.deepcopy(model, shared)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and PackedLinear.supported(child.weight):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    return copied


class Engine:
    """A model made ready to generate; it must not be trained while this is in use."""

    @torch.no_grad()
    def __init__(self, model: Llama):
        head_weight = model.head_weight
        self.dtype, self.device = compute_dtype(head_weight), head_weight.device
        self.model = copy_for_generation(model, self.dtype)
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        head_weight = head_weight.to(self.dtype)
        self.head = (PackedLinear(head_weight) if PackedLinear.supported(head_weight)
                     else lambda hidden: F.linear(hidden, head_weight))

    def step(self, cache: Cache, running: dict[int, tuple[int, list[int]]], new: dict[int, list[int]]
             ) -> Tensor:
        """Continue in some slots, {slot: (place, ids from there)}, and begin prompts in others, {slot: ids},
        as one packed row. They are written to the cache, over whatever is there. Returns hidden states,
        (N, C): of all of the running tokens, then of each prompt's last one."""
        device, queries = cache.layers[0].device, self.model.config.num_attention_heads
        documents = [(slot, place, ids) for slot, (place, ids) in running.items()]
        documents += [(slot, 0, prompt) for slot, prompt in new.items()]
        cache.fit(max(place + len(ids) for _, place, ids in documents))
        # One copy to the device.
        tokens = torch.tensor([(slot, j, place + j, token) for slot, place, ids in documents
                               for j, token in enumerate(ids)])
        slots, nth, places, ids = to_device(tokens, device).unbind(1)
        rows, old = cache.rows(slots, places), sum(len(ids) for _, ids in running.values())
        cu_seqlens = torch.tensor([0, *map(len, new.values())]).cumsum(0).int()
        among_new = self.model.attention_over(cu_seqlens, device)
        if old:
            longest = max(len(ids) for _, ids in running.values())
            in_cache = cache.attention(slots[:old], nth[:old], places[:old], queries, longest)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, rows, k, v)
            out = [in_cache(layer, q[:old])] if old else []
            if new:
                out.append(among_new(q[old:], k[old:], v[old:]))
            return out[0] if len(out) == 1 else torch.cat(out)

        with self.autocast:
            hidden = self.model(ids, places, cu_seqlens, attend=attend)
        last = to_device(cu_seqlens[1:].long() - 1, device)
        return torch.cat([hidden[:old], hidden[old:].index_select(0, last)])

    @torch.inference_mode()
    def answers(self, prompts: list[list[int]], stop: set[int], max_new_tokens: int, batch_size: int = 64,
                sampling: Sampling = Sampling(), keys: Sequence[tuple[int, ...]] | None = None,
                on_token: Callable[[int, int], None] | None = None,
                done: Callable[[int, list[int]], bool] | None = None, lookup: int = LOOKUP
                ) -> Iterator[tuple[int, list[int], bool]]:
        """Yields (number of the prompt, ids up to and without the first of `stop`, whether there was one) as
        answers end. Short prompts come first: then documents of similar length run together, which matters
        because a step computes over the longest one's places for all. keys: identifies each prompt for
        Sampling.draws, by default its number; on_token(number, id) is called as tokens come; done(number,
        ids) may end an answer after any token; lookup: the most tokens to guess (Document.guess). ValueError
        for a prompt without tokens, and for an id beyond the embedding."""
        if not all(prompts):
            raise ValueError(f"prompt {prompts.index([]) + 1} of {len(prompts)} has no token: its messages "
                             "are empty, and the chat template writes nothing around them; leave the record "
                             "out")
        check_rows(chain.from_iterable(prompts), self.model.config.vocab_size, "a prompt holds")
        positions = self.model.config.max_position_embeddings
        if positions and (longer := [len(ids) for ids in prompts if len(ids) > positions]):
            print_message(f"warning: {len(longer)} of {len(prompts)} prompt(s) longer than the model's "
                          f"max_position_embeddings, {positions}, the longest {max(longer)} tokens; the "
                          "answers may be empty or senseless: shorten them")
        waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        running: list[Document | None] = [None] * min(batch_size, len(prompts))     # each slot's
        cache = Cache(self.model.config, len(running), self.dtype, self.device)
        greedy = torch.zeros(max_new_tokens)
        while waiting or any(running):
            guesses = {slot: document.guess(lookup) for slot, document in enumerate(running) if document}
            free, new = [slot for slot in range(len(running)) if slot not in guesses], {}
            while waiting and free and sum(map(len, new.values())) < ROW:
                slot, i = free.pop(0), waiting.pop()
                draws = (sampling.draws(keys[i] if keys else (i,), max_new_tokens)
                         if sampling.temperature else greedy)
                running[slot], new[slot] = Document(i, prompts[i], max_new_tokens, draws), prompts[i]
            # Nothing is waiting: drop slots that are no longer used.
            if len(free) * 4 >= len(running) and not new:
                cache.keep(list(guesses))
                running = [running[slot] for slot in guesses]
                guesses = dict(enumerate(guesses.values()))
            hidden = self.step(cache, {slot: (len(running[slot].ids) - 1, [running[slot].ids[-1], *guess])
                                       for slot, guess in guesses.items()}, new)
            guesses |= {slot: [] for slot in new}
            draw = torch.cat([running[slot].draws[running[slot].made:][:len(guess) + 1]
                              for slot, guess in guesses.items()])
            chosen = sampling.choose(self.head(hidden.to(self.dtype)), to_device(draw, self.device))
            # The host waits for the device here, once a step.
            chosen = iter(chosen.tolist())
            for slot, guess in guesses.items():
                document, before = running[slot], len(running[slot].ids)
                document.take([next(chosen) for _ in range(len(guess) + 1)], guess, stop, done)
                for token in document.ids[before:] if on_token else ():
                    on_token(document.number, token)
                if document.ended:
                    running[slot] = None
                    yield document.number, document.ids[document.start:], document.stopped
