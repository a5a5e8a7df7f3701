"""A step of ours, taken apart; bench.training starts it for --floor and --profile.

    python -m bench.step floor --model DIR --tokens 4000 --rows 2600 --result FILE
    python -m bench.step profile --model DIR --train-data FILE --loss im --batch-size 15 --result FILE

floor: the matrix products of a step and nothing else, in bf16, each layer's with its own weights: for each
linear layer x W' forward, g W and g' x backward; for the head the same over the rows that carry weight.
profile: train.py's step under torch.profiler. Every operation's own time goes to the innermost part around
it, by ranges set around modules and functions forward and by the name of the autograd node backward, so the
parts add up to the step; the profiler's own cost is the difference to the time without it, given beside.
"""
import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from kernels import head
from kernels import attention as attention_kernels
from kernels import layers
import model as model_module
import train
from chat import Tokenizer, load_template
from data import collate, load_dataset, plan
from loss import coefficients, span_weights
from runtime.machine import Reserve, keep_freed_memory
from model import activation_bytes, load_model, parameter_count, read_config
from runtime.weights import resolve_model

# ---------------------------------------------------------------- floor


def floor(args: argparse.Namespace) -> dict:
    """N tokens, R rows of the head. Outputs are allocated as the real step allocates them."""
    keep_freed_memory()
    config = read_config(resolve_model(args.model))
    with torch.device("meta"):
        shapes = [m.weight.shape for name, m in model_module.Llama(config).named_modules()
                  if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    products = [(shape, args.tokens) for shape in shapes]
    products.append((torch.Size([config.vocab_size, config.hidden_size]), args.rows))
    make = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(torch.bfloat16)

    weights = [random(*shape) * 0.02 for shape, _ in products]
    rows = {(n, width): random(n, width) for shape, n in products for width in shape}
    flops = sum(6 * n * shape.numel() for shape, n in products)

    def once() -> float:
        began = time.monotonic()
        for weight, (shape, n) in zip(weights, products):
            rows[n, shape[1]] @ weight.T
        for weight, (shape, n) in zip(reversed(weights), reversed(products)):
            grad = rows[n, shape[0]]
            grad @ weight
            grad.T @ rows[n, shape[1]]
        return time.monotonic() - began

    once()
    times = [once() for _ in range(args.repeats)]
    return {"seconds": statistics.median(times), "all_seconds": times, "flops": flops,
            "gflops": flops / statistics.median(times) / 1e9, "tokens": args.tokens, "rows": args.rows}


# ---------------------------------------------------------------- profile

ATTENTION, NORMS, PROJECTIONS = "attention kernels", "norms and RoPE", "attention projections"
MLP, HEAD = "MLP", "head and loss"
OPTIMIZER, CLIP, DATA, REST = "optimizer", "gradient clipping", "data", "residuals, embedding, rest"
PARTS = (ATTENTION, PROJECTIONS, MLP, NORMS, HEAD, OPTIMIZER, CLIP, DATA, REST)
# Autograd nodes by name. Those of matrix products go by the shapes they handle, see by_shapes().
NODES = {"TiledAttention": ATTENTION, "RMSNorm": NORMS, "Rotate": NORMS, "SwiGLU": MLP, "WeightedNLL": HEAD,
         "Index": HEAD}
NODE = "autograd::engine::evaluate_function: "


def wrapped(function: Callable, part: str) -> Callable:
    def inner(*args: object, **kwargs: object) -> object:
        with record_function("part:" + part):
            return function(*args, **kwargs)
    return inner


def mark(model: torch.nn.Module) -> None:
    """Ranges around the parts of the forward pass; inner ones win."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        part = PROJECTIONS if leaf == "o_proj" else MLP if leaf == "mlp" else (
            NORMS if isinstance(module, model_module.RMSNorm) else None)
        if part:
            module.forward = wrapped(module.forward, part)
    attention_kernels.attention = wrapped(attention_kernels.attention, ATTENTION)
    layers.rotate = wrapped(layers.rotate, NORMS)


def by_shapes(event: object, feed_forward: int, vocabulary: int) -> str | None:
    """The part that a matrix product belongs to, or a node that makes some, by all sizes it was given."""
    sizes: set[int] = set()
    below = [event]
    while below:
        one = below.pop()
        for shape in one.input_shapes or []:
            if len(shape) == 2 and all(isinstance(n, int) for n in shape):
                sizes.update(shape)
        below.extend(one.cpu_children)
    return (MLP if feed_forward in sizes else HEAD if vocabulary in sizes else PROJECTIONS) if sizes else None


def part_of(event: object, above: tuple[str, str], feed_forward: int, vocabulary: int) -> tuple[str, str]:
    """(part, direction) of this event and what is below it, unless that says otherwise; above: of what it is
    in."""
    if event.name.startswith("part:"):
        return event.name.removeprefix("part:"), "forward"
    if event.name.startswith(NODE):
        node = event.name.removeprefix(NODE).lstrip("_")
        for start, part in NODES.items():
            if node.startswith(start):
                return part, "backward"
        part = None
        if node.startswith(("Mm", "Addmm", "T", "ToCopy", "View", "torch::autograd::AccumulateGrad")):
            part = by_shapes(event, feed_forward, vocabulary)
        # a norm and its linear layers are one function: the norm's work but for the products, below
        return (NORMS if node.startswith("NormLinears") else part or REST), "backward"
    if event.name == "_NormLinears":
        return NORMS, above[1]
    if above[0] == NORMS and event.name in ("aten::linear", "aten::matmul", "aten::mm", "aten::addmm_"):
        return by_shapes(event, feed_forward, vocabulary) or NORMS, above[1]
    return above


def step_profile(args: argparse.Namespace) -> dict:
    keep_freed_memory()
    folder = resolve_model(args.model)
    config = read_config(folder)
    reserve = Reserve(8 * parameter_count(config) + activation_bytes(
        config, args.micro_batch_tokens, torch.bfloat16, False))
    tokenizer = Tokenizer(folder)
    template = load_template(args.template, tokenizer)
    dataset = load_dataset(args.train_data, tokenizer, template, args.max_length, "truncate", args.cache_dir)
    weights = span_weights(args.loss)
    usable = dataset.trainable(weights)
    model = load_model(folder)
    optimizer = train.make_optimizer(model, train.Config())
    mark(model)
    reserve.release()
    steps = iter(plan(dataset.lengths[usable], args.seed, 0, args.batch_size, args.micro_batch_tokens, 1))

    def once() -> tuple[float, int, int]:
        """What train.py's loop does for a step of one micro-batch."""
        began = time.monotonic()
        with record_function("part:" + REST):
            with record_function("part:" + DATA):
                examples = usable[np.concatenate(next(steps)[0])]
                batch = collate(dataset, examples, coefficients(dataset.counts[examples], weights, "token"))
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model(batch.ids, batch.positions, batch.cu_seqlens)
                with record_function("part:" + HEAD):
                    rows = batch.rows
                    value, _ = head.weighted_nll(hidden[rows], model.head_weight, batch.targets[rows],
                                                        batch.coefficients[rows])
            value.backward()
            with record_function("part:" + CLIP):
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                assert math.isfinite(float(norm))
            with record_function("part:" + OPTIMIZER):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return time.monotonic() - began, len(batch.ids), len(rows)

    for _ in range(args.warmup):
        once()
    plain = [once()[0] for _ in range(args.repeats)]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        seconds, tokens, rows = once()
    times: dict[tuple[str, str], float] = defaultdict(float)
    feed_forward, vocabulary = model.config.intermediate_size, model.config.vocab_size

    def walk(event: object, part: tuple[str, str]) -> None:
        part = part_of(event, part, feed_forward, vocabulary)
        times[part] += event.self_cpu_time_total / 1e6
        for below in event.cpu_children:
            walk(below, part)

    roots = [event for event in record.events() if event.cpu_parent is None and event.name == "part:" + REST]
    for root in roots:
        walk(root, (REST, "forward"))
    total = sum(times.values())
    assert roots and abs(total - seconds) < 0.05 * seconds, (total, seconds)    # nothing lost, nothing twice
    parts = [{"name": part, "forward": times[part, "forward"], "backward": times[part, "backward"],
              "share": (times[part, "forward"] + times[part, "backward"]) / total} for part in PARTS]
    return {"seconds": statistics.median(plain), "profiled_seconds": seconds, "tokens": tokens, "rows": rows,
            "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=("floor", "profile"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2600)
    parser.add_argument("--train-data", nargs="+", default=[])
    parser.add_argument("--template", default="auto")
    parser.add_argument("--loss", default="im")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--cache-dir", default="cache")
    parser.add_argument("--result", required=True, metavar="FILE")
    args = parser.parse_args()
    result = floor(args) if args.what == "floor" else step_profile(args)
    Path(args.result).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
