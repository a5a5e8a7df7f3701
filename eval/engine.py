"""Token by token: a key/value cache, slots that are filled again as answers end, greedy or sampled.

    for number, ids, stopped in Engine(model).answers(prompts, stop, max_new_tokens): ...

The model's own layers run, with attention over the cache passed in. A fixed number of slots runs at once;
when an answer ends, the next prompt takes its slot. A step is one packed row, as in training: all of the
prompts that are new, and of other documents the last token and those that Document.guess expects to follow
it. What is chosen after a token counts only if all guesses up to there were right: answers are the same as
token by token, but for rounding, and come faster.

Shapes: B slots, T places in the cache, H query heads, G key/value heads, D head size, C width,
N packed tokens, V vocabulary.
"""
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layers import compute_dtype
from model import Llama, ModelConfig

LOOKUP = 3      # the most tokens that are guessed for a document in a step
ROW = 8192      # tokens of prompts in a step, or one prompt more; other free slots wait for the next


def check_ids(config: ModelConfig, sequences: Iterable[Sequence[int]]) -> None:
    """ValueError unless all token ids of the sequences, such as prompts, have a row in the embedding."""
    largest = max(map(max, filter(len, sequences)), default=0)
    if largest >= config.vocab_size:
        raise ValueError(f"a text holds token {largest}, the embedding has only {config.vocab_size} rows; "
                         "tokenizer and model do not belong together, or tokens were added without resizing "
                         "the model")


# ---------------------------------------------------------------- choosing a token


def highest(logits: Tensor) -> Tensor:
    """logits: (B, V). Returns (B,): logits.argmax(-1), of equals the first. That takes ten times as long in
    bf16, and of a copy in fp32 more than twice."""
    parts = logits.unflatten(-1, (math.gcd(64, logits.shape[-1]), -1))          # (B, parts, V / parts)
    best = parts.amax(-1).float().argmax(-1)
    first = parts[torch.arange(len(best), device=best.device), best].float().argmax(-1)
    return best * parts.shape[-1] + first


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
            return highest(logits)
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
    """Keys and values of the slots' documents, (2, B, G, T, D) for each layer, in the dtype to compute in.
    What is behind a document's end is finite, and nobody looks at it."""

    def __init__(self, config: ModelConfig, slots: int, dtype: torch.dtype, device: torch.device):
        self.layers = [torch.zeros(2, slots, config.num_key_value_heads, 0, config.head_dim, dtype=dtype,
                                   device=device) for _ in range(config.num_hidden_layers)]

    def fit(self, places: int) -> None:
        """Make T `places`, rounded up to 32, or leave it up to a third larger. No larger: a product of
        matrices that are not dense copies them, which in every step takes longer than this now and then."""
        now, wanted = self.layers[0].shape[3], -(-places // 32) * 32
        if not wanted <= now <= wanted * 4 // 3:
            self.layers = [F.pad(layer, (0, 0, 0, wanted - now)) for layer in self.layers]     # or cuts

    def keep(self, slots: list[int]) -> None:
        which = torch.tensor(slots, device=self.layers[0].device)
        self.layers = [layer.index_select(1, which) for layer in self.layers]

    def rows(self, slots: Tensor, places: Tensor) -> Tensor:
        """slots, places: (N,). Returns (N * 2 * G,): where their keys and values are in a layer, seen as
        (2 * B * G * T, D)."""
        both, count, heads, size = self.layers[0].shape[:4]
        which = torch.arange(both * heads, device=slots.device)                 # (2 * G,)
        first = which // heads * count * heads + which % heads
        return ((slots[:, None] * heads + first) * size + places[:, None]).flatten()

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v: (N, G, D), to where rows() says."""
        keys_and_values = torch.cat([k, v], 1).flatten(0, 1)                    # (N * 2 * G, D)
        stored = self.layers[layer]
        stored.view(-1, stored.shape[-1]).index_copy_(0, rows, keys_and_values.to(stored.dtype))

    def attention(self, slots: Tensor, nth: Tensor, places: Tensor, queries: int
                  ) -> Callable[[int, Tensor], Tensor]:
        """For tokens in the cache, (N,) each: the slot, the token's number among the slot's, the place.
        queries: H. Returns what they attend with: (layer, q (N, H, D)) -> (N, H, D).

        All queries that share keys are lines of one product, S lines for each of B * G. Slots with fewer
        tokens than others leave lines to chance, and nothing but the two products is done for those."""
        device, (_, count, keys, total, size) = slots.device, self.layers[0].shape      # -, B, G, T, D
        head, group = torch.arange(queries, device=device), queries // keys
        most = (int(nth.max()) + 1) * group                                             # S
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
        slots, nth, places, ids = torch.tensor([(slot, j, place + j, token) for slot, place, ids in documents
                                                for j, token in enumerate(ids)], device=device).unbind(1)
        rows, old = cache.rows(slots, places), sum(len(ids) for _, ids in running.values())
        cu_seqlens = torch.tensor([0, *map(len, new.values())]).cumsum(0).int()
        among_new = self.model.attention_over(cu_seqlens, device)
        if old:
            in_cache = cache.attention(slots[:old], nth[:old], places[:old], queries)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, rows, k, v)
            out = [in_cache(layer, q[:old])] if old else []
            if new:
                out.append(among_new(layer, q[old:], k[old:], v[old:]))
            return out[0] if len(out) == 1 else torch.cat(out)

        with self.autocast:
            hidden = self.model(ids, places, cu_seqlens, attend=attend)
        return torch.cat([hidden[:old], hidden[old:][cu_seqlens[1:].to(device) - 1]])

    @torch.inference_mode()
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
        check_ids(self.model.config, prompts)
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
            if len(free) * 4 >= len(running) and not new:   # nothing waits any more: leave free slots
                cache.keep(list(guesses))
                running = [running[slot] for slot in guesses]
                guesses = dict(enumerate(guesses.values()))
            hidden = self.step(cache, {slot: (len(running[slot].ids) - 1, [running[slot].ids[-1], *guess])
                                       for slot, guess in guesses.items()}, new)
            guesses |= {slot: [] for slot in new}
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
