"""train.py's own step without the run around it: its speed, its limit, and where its time goes.

    python -m bench.step speed --document 512 -- --model DIR --batch-size 64
    python -m bench.step limit --tokens 4000 --trained 2600 -- --model DIR
    python -m bench.step profile -- --model DIR --train-data FILE --loss im

What follows `--` are flags of train.py. With --document N the data are random tokens in documents of N, half
of them instruction, instead of records.

speed: of the steps after --warmup; under torchrun of all ranks together. limit: the matrix products of one
micro-batch and nothing else, in the dtype of the run, each layer's with its own weights: for each linear
layer x W' forward, g W and g' x backward, and for the head the same over the trained targets. profile: one
step under torch.profiler. The time of each operation, on CUDA of the kernels that it started, goes to the
innermost part around it. Forward, parts are ranges around modules and functions; backward, they follow from
the name of the autograd node. So the parts add up to the step, or to the device's time.
"""
import argparse
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import model as model_module
import train
from chat import COMPLETION, INSTRUCTION, KINDS
from data import Dataset
from runtime.distributed import data_parallel, finish, is_main, join_ranks, rank, whole, world_size
from runtime.machine import keep_freed_memory, peak_memory_mb
from runtime.model_config import ModelConfig, read_config
from runtime.weights import resolve_model

ATTENTION, NORMS, PROJECTIONS, MLP = "attention kernels", "norms and RoPE", "attention projections", "MLP"
HEAD, OPTIMIZER, CLIP = "head and loss", "optimizer", "gradient clipping"
OTHER = "residuals, embedding, packing, other"
PARTS = (ATTENTION, PROJECTIONS, MLP, NORMS, HEAD, OPTIMIZER, CLIP, OTHER)


def part(name: str) -> record_function:
    """A range of the profile."""
    return record_function(f"part:{name}")


def synthetic(documents: Sequence[int], vocabulary: int) -> Dataset:
    """Random examples whose rows have these lengths in tokens, the first half of each instruction."""
    lengths = [document + 1 for document in documents]      # the last token is a target only
    kinds = [np.where(np.arange(n) < n // 2, INSTRUCTION, COMPLETION).astype(np.uint8) for n in lengths]
    counts = [np.bincount(each[1:], minlength=len(KINDS)) for each in kinds]
    ids = np.random.default_rng(0).integers(vocabulary, size=sum(lengths), dtype=np.int32)
    return Dataset([], ids, np.concatenate(kinds), np.cumsum([0, *lengths]),
                   np.zeros((len(lengths), 2), np.int32), np.array(counts, np.int32), {}, "", "")


def training(config: train.Config, document: int = 0, raw_model: model_module.Llama | None = None
             ) -> tuple[model_module.Llama, Callable[[int], dict]]:
    """Set up a run of train.py on this rank. Returns its model, and the function that makes the step of a
    given number: {"seconds", "loss", and of all ranks together "tokens" and "trained_tokens"}. The learning
    rate stays at --lr. document: tokens of synthetic documents; 0: the records of --train-data. raw_model:
    what to train, prepared already; by default --model."""
    keep_freed_memory()
    device = join_ranks(config.device)
    model_config = raw_model.config if raw_model else read_config(resolve_model(config.model))
    config.micro_batch_tokens = config.micro_batch_tokens or train.default_micro_batch_tokens(
        config, model_config, device, world_size())
    if document:
        dataset = synthetic([document] * (4 * config.batch_size), model_config.vocab_size)
        usable = np.arange(len(dataset))
    else:
        source = train.open_source(config)
        dataset, usable, _ = train.load_data(config, source)
    steps = train.make_steps(config, dataset, usable, rank(), world_size())
    raw_model = raw_model or train.prepare_model(config, resolve_model(config.model), device)
    optimizer = train.make_optimizer(raw_model, config)
    with train.autocast(config, device):
        model = data_parallel(raw_model, device)

    def one_step(step: int) -> dict:
        began = time.monotonic()
        with part(OTHER):
            micro_batches, counts = steps[step]
            sums, _ = train.accumulate_gradients(model, None, dataset, micro_batches, config, step)
            with part(CLIP):
                limit = config.clip_grad_norm or math.inf
                norm = whole(torch.nn.utils.clip_grad_norm_(raw_model.parameters(), limit))
                if not math.isfinite(norm.item()):      # the host waits for the device here
                    raise ValueError(f"step {step}: gradient norm {norm.item()}")
            with part(OPTIMIZER):
                optimizer.step()
                raw_model.zero_grad(set_to_none=model is raw_model)
        of_kind = counts.sum(0)
        return {"seconds": time.monotonic() - began, "loss": float(sums["loss"]),
                "tokens": int(of_kind.sum()),
                "trained_tokens": int(of_kind[config.span_weights != 0].sum())}

    return raw_model, one_step


def speed(config: train.Config, args: argparse.Namespace) -> dict:
    model, one_step = training(config, args.document)
    steps = [one_step(step) for step in range(args.warmup + args.repeats)]
    later = steps[args.warmup:]
    return {"tokens_per_second": sum(x["tokens"] for x in later) / sum(x["seconds"] for x in later),
            "step_seconds": statistics.median(x["seconds"] for x in later),
            "peak_memory_gb": peak_memory_mb(model.head_weight.device) / 1024, "steps": steps}


# ---------------------------------------------------------------- limit


def limit(config: train.Config, args: argparse.Namespace) -> dict:
    """Outputs are allocated as the real step allocates them."""
    keep_freed_memory()
    device, shape = join_ranks(config.device), read_config(resolve_model(config.model))
    with torch.device("meta"):
        linears = [module.weight.shape for name, module in model_module.Llama(shape).named_modules()
                   if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    products = [(matrix, args.tokens) for matrix in linears]
    products.append((torch.Size([shape.vocab_size, shape.hidden_size]), args.trained))

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(config.compute_dtype)

    weights = [random(*matrix) * 0.02 for matrix, _ in products]
    inputs = {(n, width): random(n, width) for matrix, n in products for width in matrix}

    def once() -> float:
        began = time.monotonic()
        for weight, (matrix, n) in zip(weights, products):
            inputs[n, matrix[1]] @ weight.T
        for weight, (matrix, n) in zip(reversed(weights), reversed(products)):
            grad = inputs[n, matrix[0]]
            grad @ weight
            grad.T @ inputs[n, matrix[1]]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - began

    once()
    seconds = statistics.median(once() for _ in range(args.repeats))
    flops = sum(6 * n * matrix.numel() for matrix, n in products)
    return {"seconds": seconds, "gflops": flops / seconds / 1e9}


# ---------------------------------------------------------------- profile

# Autograd nodes by name. Others belong to a part if they multiply matrices of its sizes, see by_shapes().
NODES = {"GeneratedBackwardFor_spantune_tiled_attention": ATTENTION,
         "GeneratedBackwardFor_torch_attn": ATTENTION, "RMSNorm": NORMS, "Rotate": NORMS, "SwiGLU": MLP,
         "WeightedNLL": HEAD, "Index": HEAD}
NODE = "autograd::engine::evaluate_function: "


def wrapped(function: Callable, name: str) -> Callable:
    def inner(*args: object, **kwargs: object) -> object:
        with part(name):
            return function(*args, **kwargs)
    return inner


def mark(model: model_module.Llama) -> None:
    """Put ranges around the parts of the forward pass, in this process for good."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, model_module.RMSNorm) or leaf in ("o_proj", "mlp"):
            module.forward = wrapped(module.forward, {"o_proj": PROJECTIONS, "mlp": MLP}.get(leaf, NORMS))
    model_module.attention = wrapped(model_module.attention, ATTENTION)
    model_module.varlen_attention = wrapped(model_module.varlen_attention, ATTENTION)
    model_module.rotate = wrapped(model_module.rotate, NORMS)
    train.weighted_nll = wrapped(train.weighted_nll, HEAD)


def by_shapes(event: object, shape: ModelConfig) -> str | None:
    """The part that the matrix products inside an event belong to, by the sizes that they were given."""
    sizes: set[int] = set()
    events = [event]
    while events:
        each = events.pop()
        for size in each.input_shapes or []:
            if len(size) == 2 and all(isinstance(n, int) for n in size):
                sizes.update(size)
        events.extend(each.cpu_children)
    if not sizes:
        return None
    return MLP if shape.intermediate_size in sizes else HEAD if shape.vocab_size in sizes else PROJECTIONS


def part_of(event: object, around: tuple[str, str], shape: ModelConfig) -> tuple[str, str]:
    """(part, direction) of an event and of what is inside it, unless that says otherwise. around: those of
    the event that it is in."""
    if event.name.startswith("part:"):
        return event.name.removeprefix("part:"), "forward"
    if event.name.startswith(NODE):
        node = event.name.removeprefix(NODE).lstrip("_")
        named = next((name for start, name in NODES.items() if node.startswith(start)), None)
        products = node.startswith(("Linears", "Mm", "Addmm", "T", "ToCopy", "View",
                                    "torch::autograd::AccumulateGrad"))
        return named or (products and by_shapes(event, shape)) or OTHER, "backward"
    if event.name == "_Linears" and around[0] == OTHER:
        return by_shapes(event, shape) or OTHER, around[1]
    return around


def profile_step(config: train.Config, args: argparse.Namespace) -> dict:
    model, one_step = training(config, args.document)
    # Compiled layers have no parts.
    model.compiled = None
    mark(model)
    plain = [one_step(step)["seconds"] for step in range(args.warmup + args.repeats)][args.warmup:]
    return {"seconds": statistics.median(plain)} | profiled(model, one_step, args.warmup + args.repeats)


def profiled(model: model_module.Llama, one_step: Callable[[int], dict], number: int) -> dict:
    """Where the time of a step of training() goes, by part. model: marked with mark(), its layers not
    compiled."""
    cuda = model.head_weight.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda],
                 record_shapes=True) as recorded:
        step = one_step(number)
        if cuda:
            torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type == DeviceType.CPU]
    # Ranges show up on the device, too, around the kernels that are counted already.
    ranges = {event.name for event in events}
    times: dict[tuple[str, str], float] = defaultdict(float)

    def own_seconds(event: object) -> float:
        if not cuda:
            return event.self_cpu_time_total / 1e6
        return sum(kernel.duration for kernel in event.kernels if kernel.name not in ranges) / 1e6

    def walk(event: object, around: tuple[str, str]) -> None:
        own = part_of(event, around, model.config)
        times[own] += own_seconds(event)
        for inner in event.cpu_children:
            walk(inner, own)

    for event in events:
        # On CUDA the backward pass runs in a thread of its own.
        if event.cpu_parent is None and (cuda or event.name == f"part:{OTHER}"):
            walk(event, (OTHER, "forward"))
    total = sum(times.values())
    expected = sum(kernels(recorded).values()) if cuda else step["seconds"]
    # Near 0 if nothing is lost, and nothing counts twice.
    error = abs(total - expected) / expected
    assert cuda or error < 0.05, (total, expected, step)
    parts = [{"name": name, "forward": times[name, "forward"], "backward": times[name, "backward"],
              "share": (times[name, "forward"] + times[name, "backward"]) / total} for name in PARTS]
    return {"profiled": step, "seconds_of_parts": total, "error": error, "parts": parts}


def kernels(recorded: profile) -> dict[str, float]:
    """{kernel: seconds} of all that ran on the CUDA device, copies too."""
    events = recorded.events()
    ranges = {event.name for event in events if event.device_type == DeviceType.CPU}
    times: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == DeviceType.CUDA and event.name not in ranges:
            times[event.name] += event.time_range.elapsed_us() / 1e6
    return times


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     usage="python -m bench.step WHAT [flags] -- flags of train.py")
    parser.add_argument("what", choices=("speed", "limit", "profile"))
    parser.add_argument("--document", type=int, default=0, help="tokens of synthetic documents")
    parser.add_argument("--tokens", type=int, default=4096, help="limit: of the micro-batch")
    parser.add_argument("--trained", type=int, default=2600, help="limit: trained targets of the micro-batch")
    parser.add_argument("--repeats", type=int, default=4, help="steps measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--result", metavar="FILE", help="write the JSON object there instead of printing it")
    split = argv.index("--") if "--" in argv else len(argv)
    args, passed = parser.parse_args(argv[:split]), argv[split + 1:]
    if args.document or args.what == "limit":
        passed += ["--train-data", "synthetic"]
    config = train.parse_args(passed)
    result = json.dumps({"speed": speed, "limit": limit, "profile": profile_step}[args.what](config, args))
    if is_main():
        Path(args.result).write_text(result) if args.result else print(result)
    finish(0)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
