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
innermost part around it. Forward, parts are ranges around modules and functions; an autograd node belongs to
the part of the operation that made it. So the parts add up to the step, or to the device's time.
"""
from argparse import Namespace

from bench.common import document_length, make_parser, split_flags
from config import Config
from config import parse_args as parse_flags
from runtime.start import answer_flags, run_program


def parse_args(argv: list[str]) -> tuple[Namespace, Config]:
    """Its own flags, and train.py's."""
    parser = make_parser("step", __doc__, "WHAT [flags] -- flags of train.py")
    parser.add_argument("what", choices=("speed", "limit", "profile"))
    parser.add_argument("--document", type=document_length, default=0, help="tokens of synthetic documents")
    parser.add_argument("--tokens", type=int, default=4096, help="limit: of the micro-batch")
    parser.add_argument("--trained", type=int, default=2600, help="limit: trained targets of the micro-batch")
    parser.add_argument("--repeats", type=int, default=4, help="steps measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--result", metavar="FILE", help="write the JSON object there instead of printing it")
    own, passed = split_flags(argv)
    args = parser.parse_args(own)
    names = {word.partition("=")[0] for word in passed}
    if "--model" in names and "--train-data" not in names and (args.document or args.what == "limit"):
        passed += ["--train-data", "synthetic"]
    return args, parse_flags(passed)


answer_flags(__name__, parse_args)

import contextlib
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import model as model_module
import train
from chat import COMPLETION, INSTRUCTION, KINDS
from data import Dataset
from runtime.distributed import data_parallel, finish, is_main, join_ranks, rank, whole, world_size
from runtime.machine import deterministic, keep_freed_memory, peak_memory_mb
from runtime.model_config import read_config
from runtime.model_folder import resolve_model

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
                   np.zeros((len(lengths), 2), np.int32), np.array(counts, np.int32),
                   np.zeros(len(lengths), np.uint64), {}, "", "", np.zeros(1, np.int64))


def training(config: train.Config, document: int = 0, raw_model: model_module.Llama | None = None
             ) -> tuple[model_module.Llama, Callable[[int], dict]]:
    """Set up a run of train.py on this rank. Returns its model, and the function that makes the step of a
    given number: {"seconds", "loss", and of all ranks together "tokens" and "trained_tokens"}. The learning
    rate stays at --lr. document: tokens of synthetic documents; 0: the records of --train-data. raw_model:
    what to train, prepared already; by default --model."""
    keep_freed_memory()
    if config.deterministic:
        deterministic()
    device = join_ranks(config.device)
    model_config = raw_model.config if raw_model else read_config(resolve_model(config.model))
    config.micro_batch_tokens = train.micro_batch_tokens(config, model_config, device, world_size())
    if document:
        dataset = synthetic([document] * (4 * config.batch_size), model_config.vocab_size)
        usable = np.arange(len(dataset))
    else:
        source = train.open_source(config)
        dataset, usable, _ = train.load_data(config, source)
    steps = train.make_steps(config, dataset, usable, rank(), world_size())
    raw_model = raw_model or train.prepare_model(config, resolve_model(config.model), device)
    reference = None
    if config.kl_weight:
        reference = train.prepare_model(config, resolve_model(config.model), device).requires_grad_(False)
    optimizer = train.make_optimizer(raw_model, config)
    with train.autocast(config, device):
        model = data_parallel(raw_model, device)

    def one_step(step: int) -> dict:
        began = time.monotonic()
        with part(OTHER):
            micro_batches, counts = steps[step]
            sums, _ = train.accumulate_gradients(model, reference, dataset, micro_batches, config, step)
            with part(CLIP):
                norm = whole(torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.max_grad_norm))
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


def speed(config: train.Config, args: Namespace) -> dict:
    model, one_step = training(config, args.document)
    steps = [one_step(step) for step in range(args.warmup + args.repeats)]
    later = steps[args.warmup:]
    return {"tokens_per_second": sum(x["tokens"] for x in later) / sum(x["seconds"] for x in later),
            "step_seconds": statistics.median(x["seconds"] for x in later),
            "peak_memory_gib": peak_memory_mb(model.head_weight.device) / 1024, "steps": steps}


# ---------------------------------------------------------------- limit


def limit(config: train.Config, args: Namespace) -> dict:
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

# How the name of an autograd node begins in a trace.
NODE = "autograd::engine::evaluate_function: "


@contextlib.contextmanager
def marked(model: model_module.Llama) -> Iterator[None]:
    """Ranges around the parts of the forward pass."""
    functions = [(model_module, "attention", ATTENTION), (model_module, "varlen_attention", ATTENTION),
                 (model_module, "rotate", NORMS), (train, "weighted_nll", HEAD)]
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, model_module.RMSNorm) or leaf in ("self_attn", "mlp"):
            functions.append((module, "forward", {"self_attn": PROJECTIONS, "mlp": MLP}.get(leaf, NORMS)))
    with contextlib.ExitStack() as patches:
        for owner, name, of_part in functions:
            # A record_function is a decorator, too.
            patches.enter_context(mock.patch.object(owner, name, part(of_part)(getattr(owner, name))))
        yield


@dataclass
class Call:
    """An operation, range or launch of the host as the trace has it, with those inside it. Times in us."""
    name: str
    start: float
    end: float
    correlation: int | None
    sequence: int | None        # of the autograd node that a forward operation makes, or that this is
    inside: list["Call"] = field(default_factory=list)


def calls(trace: list[dict]) -> list[Call]:
    """The outermost calls of each thread of a Chrome trace."""
    threads: dict[int, list[Call]] = defaultdict(list)
    for event in trace:
        if event.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            more = event.get("args", {})
            threads[event["tid"]].append(Call(event["name"], event["ts"], event["ts"] + event.get("dur", 0),
                                              more.get("correlation"), more.get("Sequence number")))
    outermost: list[Call] = []
    for found in threads.values():
        around: list[Call] = []
        for call in sorted(found, key=lambda call: (call.start, -call.end)):
            while around and around[-1].end <= call.start:
                around.pop()
            (around[-1].inside if around else outermost).append(call)
            around.append(call)
    return outermost


def device_events(trace: list[dict]) -> list[tuple[str, int | None, float]]:
    """(kernel, correlation with the call that started it, seconds) of all that ran on the device, copies
    too. Ranges show up on the device, too, but in a category of their own."""
    return [(event["name"], event.get("args", {}).get("correlation"), event["dur"] / 1e6) for event in trace
            if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def traced(recorded: profile) -> list[dict]:
    """The events of a profile, as it exports them."""
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        return json.loads(Path(folder, "trace.json").read_text())["traceEvents"]


def seconds_of_parts(trace: list[dict]) -> tuple[dict[tuple[str, str], float], float]:
    """{(part, direction): seconds} of the device, or of the host if nothing ran on a device; and the seconds
    of kernels that no call is known to have started, which are under OTHER, too."""
    ran: dict[int | None, float] = defaultdict(float)
    for _, correlation, seconds in device_events(trace):
        ran[correlation] += seconds
    times: dict[tuple[str, str], float] = defaultdict(float)
    # The part of the operation that made the autograd node of a number.
    part_of_node: dict[int | None, str] = {}
    on_device = bool(ran)

    def walk(call: Call, around: tuple[str, str]) -> None:
        own = around
        if call.name.startswith("part:"):
            own = call.name.removeprefix("part:"), "forward"
        elif call.name.startswith(NODE):
            # Only what adds a gradient up has no number: it follows the node that made the gradient.
            part_of_node[None] = part_of_node.get(call.sequence, OTHER)
            own = part_of_node[None], "backward"
        elif own[1] == "forward" and call.sequence is not None:
            # Of several operations with a number, the last made the node.
            part_of_node[call.sequence] = own[0]
        if not on_device:
            times[own] += (call.end - call.start - sum(x.end - x.start for x in call.inside)) / 1e6
        elif call.correlation is not None:
            times[own] += ran.pop(call.correlation, 0.0)
        for inner in call.inside:
            walk(inner, own)

    # On CUDA the backward pass runs in a thread of its own. The forward pass comes first.
    for call in sorted(calls(trace), key=lambda call: call.start):
        if on_device or call.name == f"part:{OTHER}":
            walk(call, (OTHER, "forward"))
    lost = sum(ran.values())
    times[OTHER, "forward"] += lost
    return times, lost


def profile_step(config: train.Config, args: Namespace) -> dict:
    model, one_step = training(config, args.document)
    # Compiled layers have no parts.
    model.compiled = None
    with marked(model):
        plain = [one_step(step)["seconds"] for step in range(args.warmup + args.repeats)][args.warmup:]
        return {"seconds": statistics.median(plain)} | profiled(model, one_step, args.warmup + args.repeats)


def profiled(model: model_module.Llama, one_step: Callable[[int], dict], number: int) -> dict:
    """Where the time of a step of training() goes, by part. model: within marked(), its layers not
    compiled."""
    cuda = model.head_weight.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as recorded:
        step = one_step(number)
        if cuda:
            torch.cuda.synchronize()
    times, lost = seconds_of_parts(traced(recorded))
    total = sum(times.values())
    # Near 0 if nothing is lost, and nothing counts twice.
    error = lost / total if cuda else abs(total / step["seconds"] - 1)
    # Python around the step may take some milliseconds.
    assert cuda or error * step["seconds"] < 0.05 * step["seconds"] + 0.05, (total, step)
    parts = [{"name": name, "forward": times[name, "forward"], "backward": times[name, "backward"],
              "share": (times[name, "forward"] + times[name, "backward"]) / total} for name in PARTS]
    return {"profiled": step, "seconds_of_parts": total, "error": error, "parts": parts}


def main(argv: list[str]) -> None:
    args, config = parse_args(argv)
    result = json.dumps({"speed": speed, "limit": limit, "profile": profile_step}[args.what](config, args))
    if is_main():
        Path(args.result).write_text(result) if args.result else print(result)
    finish(0)


if __name__ == "__main__":
    run_program(main)
