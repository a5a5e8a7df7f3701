"""Log-likelihoods of many continuations, with every token of the prefixes that they share computed once.

    for number, total, greedy in log_likelihoods(model, [(inputs, targets), ...], capacity=4096): ...

Sorted, the inputs are a tree of tokens, walked depth first: a context, then each of its continuations. The
walk is cut into rows of `capacity` tokens, wherever that is; the keys and values of the branch that a row
ends in are kept for the next. So four choices to one question, a header of examples that a thousand questions
have in common, and a document longer than a row are all the same case, and memory is bounded by one row and
one branch. Only positions that predict a target go through the head.

Shapes: M tokens of the tree, N of a row, H query heads, G key/value heads, D head size, C width, V
vocabulary, r tokens of a block, p of the branch before it.
"""
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from chat import check_ids
from kernels.layers import compute_dtype
from model import Attend, Llama

BLOCK = 128             # queries that are multiplied out at once, with their branch's keys
CHUNK_LOGITS = 2**24    # logits held at once: 64 MB in fp32

Request = tuple[Sequence[int], Sequence[int]]   # inputs; targets, which their last positions predict


@torch.no_grad()
def log_likelihood_reference(model: Llama, inputs: Sequence[int], targets: Sequence[int]
                             ) -> tuple[float, bool]:
    """One request alone, from all its logits: the definition that log_likelihoods() is tested against."""
    device, n = model.head_weight.device, len(inputs)
    hidden = model(torch.tensor(inputs, device=device), torch.arange(n, device=device),
                   torch.tensor([0, n], dtype=torch.int32))
    log_p = F.linear(hidden, model.head_weight.to(hidden.dtype)).float().log_softmax(-1)[n - len(targets):]
    targets = torch.tensor(targets, device=device)
    return (log_p.gather(1, targets[:, None]).double().sum().item(),
            bool((log_p.argmax(-1) == targets).all()))


# ---------------------------------------------------------------- the tree


class Tree(NamedTuple):
    """Requests laid out as a walk through the tree of their inputs, depth first.

        inputs "a b c", "a b d", "a e"  ->  ids a b c d e, depths 0 1 2 2 1
    """
    ids: np.ndarray         # (M,)
    depths: np.ndarray      # (M,) a token's position: how many tokens are before it on its branch
    # One entry for each target of each request, in the order of `places`.
    places: np.ndarray      # where in (M,) it is predicted
    targets: np.ndarray
    requests: np.ndarray    # whose it is
    order: np.ndarray       # (requests,) in which their last targets come
    ends: np.ndarray        # (requests,) where those are


def make_tree(requests: list[Request]) -> Tree:
    order = sorted(range(len(requests)), key=lambda i: list(requests[i][0]))
    branch = np.zeros(max(len(inputs) for inputs, _ in requests), np.int64)     # places of the tokens on it
    ids, depths, places, targets, owners, ends = [], [], [], [], [], []
    size, before = 0, np.zeros(0, np.int64)
    for i in order:
        inputs, wanted = np.asarray(requests[i][0], np.int64), requests[i][1]
        n = min(len(inputs), len(before))
        differ = np.flatnonzero(inputs[:n] != before[:n])
        shared = int(differ[0]) if len(differ) else n
        new = len(inputs) - shared
        branch[shared:len(inputs)] = np.arange(size, size + new)
        ids.append(inputs[shared:])
        depths.append(np.arange(shared, len(inputs)))
        places.append(branch[len(inputs) - len(wanted):len(inputs)].copy())
        targets.append(np.asarray(wanted, np.int64))
        owners.append(np.full(len(wanted), i))
        ends.append(places[-1][-1])
        size, before = size + new, inputs
    places, targets, owners = map(np.concatenate, (places, targets, owners))
    by_place = np.argsort(places, kind="stable")
    return Tree(np.concatenate(ids), np.concatenate(depths), places[by_place], targets[by_place],
                owners[by_place], np.array(order), np.array(ends))


# ---------------------------------------------------------------- rows


class Block(NamedTuple):
    """Some consecutive queries of a row, with all keys that any of them sees."""
    start: int
    end: int
    keys: Tensor            # (p + r,) where they are among the kept and the row's own
    unseen: Tensor          # (r, p + r) 0 where a query sees a key, else -inf


def own_unseen(depths: np.ndarray) -> np.ndarray:
    """(r,) -> (r, r): which tokens of a stretch of the walk are not on the branch of which others.

    Token j is on the branch of a later token i if the walk has not come back to j's depth in between.
    """
    behind = np.tri(len(depths), k=-1, dtype=bool).T                            # [j, i]: i comes after j
    between = np.where(behind, depths, depths.max() + 1)
    lowest = np.minimum.accumulate(between, 1)
    return ~((lowest > depths[:, None]) & np.tri(len(depths), dtype=bool).T).T


class Rows:
    """A tree cut into rows of at most `capacity` tokens, and what each needs of the row before it."""

    def __init__(self, tree: Tree, capacity: int, device: torch.device):
        self.tree, self.device = tree, device
        self.bounds = [(i, min(i + capacity, len(tree.ids))) for i in range(0, len(tree.ids), capacity)]
        self.branch = np.zeros(int(tree.depths.max()) + 1, np.int64)    # places of the tokens on it

    def blocks(self, start: int, end: int) -> tuple[list[Block], Tensor]:
        """Of the row's tokens; and where the keys to keep for the row behind it are, among the kept and the
        row's own. To be called row by row."""
        depths, blocks, first, kept = self.tree.depths, [], start, depths_at(self.tree, start)
        while first < end:
            last = min(first + BLOCK, end)
            # where the walk has come far back, most of the branch is of no use any more
            back = np.flatnonzero(depths[first:last] < depths[first] - BLOCK)
            last = first + int(back[0]) if len(back) else last
            mine = depths[first:last]
            seen = np.minimum.accumulate(mine)      # of the branch that is there when the block begins
            unseen = np.concatenate([np.arange(mine[0]) >= seen[:, None], own_unseen(mine)], 1)
            keys = np.concatenate([self.where(mine[0], start, kept), np.arange(first, last) - start + kept])
            mask = torch.zeros(unseen.shape).masked_fill_(torch.from_numpy(unseen), -torch.inf)
            blocks.append(Block(first - start, last - start, torch.from_numpy(keys).to(self.device),
                                mask.to(self.device)))
            self.branch[mine] = np.arange(first, last)      # of equal depths the last counts
            first = last
        return blocks, torch.from_numpy(self.where(depths_at(self.tree, end), start, kept)).to(self.device)

    def where(self, depth: int, start: int, kept: int) -> np.ndarray:
        """Of the branch's first `depth` tokens: kept ones by their depth, behind them those of the row."""
        places = self.branch[:depth]
        return np.where(places < start, np.arange(depth), places - start + kept)


def depths_at(tree: Tree, place: int) -> int:
    """How long the branch is that goes on at a place; 0 at the end of the tree."""
    return int(tree.depths[place]) if place < len(tree.depths) else 0


def attend_blocks(blocks: list[Block], keep: Tensor, kept: list[tuple[Tensor, Tensor]]) -> Attend:
    """Attention of each token to the branch that it ends. kept: each layer's keys and values (p, G, D) from
    the row before; replaced by those at `keep`."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer < len(kept):
            k, v = (torch.cat([old, new]) for old, new in zip(kept[layer], (k, v)))
        else:
            kept.append((k, v))
        kept[layer] = k.index_select(0, keep), v.index_select(0, keep)
        heads, size = k.shape[1:]
        q = (q * size ** -0.5).unflatten(1, (heads, -1))                        # (N, G, H / G, D)
        out = torch.empty_like(q)
        for start, end, keys, unseen in blocks:
            queries = q[start:end].permute(1, 2, 0, 3).flatten(1, 2)            # (G, H / G * r, D)
            mine, values = (x.index_select(0, keys).transpose(0, 1) for x in (k, v))    # (G, p + r, D)
            scores = torch.bmm(queries, mine.transpose(1, 2)).unflatten(1, (-1, end - start))
            weights = scores.add_(unseen.to(scores.dtype)).softmax(-1).flatten(1, 2)
            result = torch.bmm(weights, values).unflatten(1, (-1, end - start))     # (G, H / G, r, D)
            out[start:end] = result.permute(2, 0, 1, 3)
        return out.flatten(1, 2)

    return attend


# ---------------------------------------------------------------- requests in, sums out


@torch.no_grad()
def score(model: Llama, hidden: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden: (N, C); rows, targets: (n,), rows rising. Returns the targets' log-probabilities (n,) fp32 and
    whether each is the likeliest token (n,); a chunk of logits at a time, each row's made once."""
    dtype = compute_dtype(hidden)
    weight = model.head_weight.to(dtype)
    distinct, inverse, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
    size = max(1, CHUNK_LOGITS // len(weight))
    values, greedy, done = [], [], 0
    for i in range(0, len(distinct), size):
        logits = F.linear(hidden[distinct[i:i + size]].to(dtype), weight).float()       # (rows, V)
        mine = slice(done, done + int(counts[i:i + size].sum()))
        row, target = inverse[mine] - i, targets[mine]
        values.append(logits[row, target] - logits.logsumexp(-1)[row])
        greedy.append(logits.argmax(-1)[row] == target)
        done = mine.stop
    return torch.cat(values), torch.cat(greedy)


@torch.no_grad()
def log_likelihoods(model: Llama, requests: list[Request], capacity: int = 4096
                    ) -> Iterator[tuple[int, float, bool]]:
    """Yields (number of the request, log-likelihood of its targets in nats, whether each of them is the
    likeliest token where it stands) as requests end, not in their order. Every request has a target, and no
    fewer inputs than targets. capacity: tokens of a row."""
    if not requests:
        return
    check_ids(model.config, [ids for request in requests for ids in request])
    device, tree = model.head_weight.device, make_tree(requests)
    rows, kept = Rows(tree, capacity, device), []
    totals, greedy, ended = np.zeros(len(requests)), np.ones(len(requests), bool), 0
    for start, end in rows.bounds:
        attend = attend_blocks(*rows.blocks(start, end), kept)
        ids, depths = (torch.from_numpy(x[start:end]).to(device) for x in (tree.ids, tree.depths))
        hidden = model(ids, depths, None, attend=attend)
        mine = slice(*np.searchsorted(tree.places, (start, end)))
        if mine.start < mine.stop:
            values, right = score(model, hidden, torch.from_numpy(tree.places[mine] - start).to(device),
                                  torch.from_numpy(tree.targets[mine]).to(device))
            np.add.at(totals, tree.requests[mine], values.double().cpu().numpy())
            np.logical_and.at(greedy, tree.requests[mine], right.cpu().numpy())
        last = np.searchsorted(tree.ends, end)
        for i in tree.order[ended:last]:
            yield int(i), float(totals[i]), bool(greedy[i])
        ended = last
