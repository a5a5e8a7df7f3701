"""The stages of bench.gpu that measure: what the card can do, the speed and memory of a step, what each
change is worth, where the time goes, and how other trainers do.

Models have random weights and the shapes of published ones. The data are random tokens in documents of 512,
half of each instruction, 128 of them a step (65,536 tokens). A step is train.py's own (bench.step.training).

MFU is 6 (body parameters x N + V x C x R) a step, over its time and 989 TFLOP/s, an H100's in bf16. N:
tokens; V x C: the head; R: trained targets. What attention multiplies is not counted; at 512 tokens a
document that would be a few percent more.
"""
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import kernels.head
import train
from bench import step
from bench.common import cores, json_child
from bench.gpu import Report
from eval import estimate
from model import Llama, init_weights, parameter_count
from runtime import machine
from runtime.model_config import ModelConfig

PEAK_FLOPS = 989e12
SHAPES = {
    # SmolLM2-135M
    "0.13B": dict(model_type="llama", hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
                  num_key_value_heads=3, intermediate_size=1536, vocab_size=49152),
    # Qwen2.5-0.5B
    "0.5B": dict(model_type="qwen2", hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, intermediate_size=4864, vocab_size=151936),
    # Llama-3.2-1B
    "1B": dict(model_type="llama", hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, head_dim=64, intermediate_size=8192, vocab_size=128256),
}
COMMON = dict(max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True)
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            intermediate_size=48, vocab_size=96)
DOCUMENT, DOCUMENTS = 512, 128


def shape_of(name: str, tiny: bool) -> ModelConfig:
    return ModelConfig.from_dict(COMMON | SHAPES[name] | (TINY if tiny else {}))


def random_model(config: ModelConfig, device: str) -> Llama:
    """A model whose weights are drawn on the device."""
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device=device)
    init_weights(model, seed=0)
    return model


def flags(loss: str, micro_batch_tokens: int, tiny: bool) -> list[str]:
    """--max-length is the length of every document."""
    return ["--model", "none", "--train-data", "none", "--loss", loss, "--micro-batch-tokens",
            str(micro_batch_tokens), "--batch-size", str(8 if tiny else DOCUMENTS), "--max-length",
            str(16 if tiny else DOCUMENT)]


def settings(loss: str, micro_batch_tokens: int, device: str, tiny: bool) -> train.Config:
    return train.parse_args([*flags(loss, micro_batch_tokens, tiny), "--device", device])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------- ceilings


def seconds_of(function: Callable[[], object], device: str, repeats: int) -> float:
    """The median time of a call, after two that do not count."""
    times = []
    for i in range(repeats + 2):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def ceilings(report: Report, device: str, tiny: bool) -> None:
    """The fastest that this card multiplies, copies and starts kernels."""
    tokens, repeats = (64, 2) if tiny else (16384, 20)
    for name in SHAPES:
        config = shape_of(name, tiny)
        width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
        for what, (n, a, b) in {"attention's": (tokens, width, width), "MLP's": (tokens, width, inner),
                                "the head's": (tokens // 4, width, vocabulary)}.items():
            with report.trying(2, f"{name}: {what} product"):
                x, y = (torch.randn(size, device=device).bfloat16() for size in ((n, a), (b, a)))
                seconds = seconds_of(lambda: x @ y.T, device, repeats)
                report.row(2, f"{name}: {what} {n:,} x {a:,} x {b:,}", 2 * n * a * b / seconds / 1e12,
                           "TFLOP/s")
    with report.trying(2, "copy"):
        source = torch.zeros(2**14 if tiny else 2**28, device=device)
        target = torch.empty_like(source)
        seconds = seconds_of(lambda: target.copy_(source), device, repeats)
        report.row(2, "a copy of 1 GiB, read and written", 2 * source.nbytes / seconds / 1e12, "TB/s")
    with report.trying(2, "launches"):
        small, count = torch.zeros(16, device=device), 100 if tiny else 5000

        def launch() -> None:
            for _ in range(count):
                small.add_(1)

        seconds = seconds_of(launch, device, 3) / count
        report.row(2, "a small kernel, started from Python", 1e6 * seconds, "us")


# ---------------------------------------------------------------- compilation


def compile_times(report: Report, device: str, tiny: bool) -> None:
    """How long torch.compile takes for a layer of each model, which is all that it compiles. The measurements
    after this find the result in its cache."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config = settings("im", 64 if tiny else 4096, device, tiny)
    ways = {"as usual": contextlib.nullcontext, "deterministic": deterministic}
    for (way, around), name in itertools.product(ways.items(), ["1B"] if tiny else SHAPES):
        with report.trying(10, f"compiling {name}, {way}"), around():
            shape = dataclasses.replace(shape_of(name, tiny), num_hidden_layers=2)
            model = random_model(shape, device)
            model.choose_attention(config.compute_dtype)
            model.compile_layers()
            began = time.monotonic()
            _, one_step = step.training(config, config.max_length, model)
            one_step(0)
            synchronize(device)
            report.row(10, f"{name}: first step with compiling, {way}", time.monotonic() - began, "s")
        torch.compiler.reset()


# ---------------------------------------------------------------- speed


def step_flops(config: ModelConfig, tokens: int, trained: int) -> float:
    """6 (body parameters x N + V x C x R)."""
    head = config.vocab_size * config.hidden_size
    body = parameter_count(config) - head * (1 if config.tie_word_embeddings else 2)
    return 6 * (body * tokens + head * trained)


def expected_memory(config: train.Config, model: Llama) -> float:
    """Bytes that eval/estimate.py expects of such a run, without the program itself."""
    dataset = step.synthetic([config.max_length] * (4 * config.batch_size), model.config.vocab_size)
    steps = train.make_steps(config, dataset, np.arange(len(dataset)), 0, 1)
    packed = estimate.packing(steps.plan, dataset.lengths, dataset.counts, config.span_weights != 0)
    return sum(estimate.memory(model.config, packed, config.compute_dtype, 1, False, config.recompute, False,
                               config.device == "cuda", model.compiled is not None).values())


def measure(model: Llama, config: train.Config, warmup: int = 1, repeats: int = 3) -> dict[str, float]:
    """Speed and memory of a run that trains this model."""
    device = config.device
    free_memory(device)
    _, one_step = step.training(config, config.max_length, model)
    for number in range(warmup):
        one_step(number)
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    steps = [one_step(warmup + number) for number in range(repeats)]
    synchronize(device)
    seconds = time.perf_counter() - began
    tokens, trained = (sum(each[key] for each in steps) for key in ("tokens", "trained_tokens"))
    found = {"tokens_per_second": tokens / seconds,
             "mfu": step_flops(model.config, tokens, trained) / seconds / PEAK_FLOPS}
    if device == "cuda":
        found |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                  "reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
    return found


def measure_row(report: Report, name: str, model: Llama, config: train.Config, warmup: int = 1) -> float:
    """measure() as a row. Returns the tokens/s: 0 if memory does not suffice or it fails."""
    with report.trying(10, name):
        try:
            found = measure(model, config, warmup)
        except torch.OutOfMemoryError:
            report.row(10, name, "out of memory")
            return 0.0
        finally:
            model.zero_grad()
        short = f"{name}: MFU {found['mfu']:.1%}"
        if "peak_gb" in found:
            estimate = expected_memory(config, model) / 1e9
            found |= {"estimate_gb": estimate, "peak_over_estimate": found["peak_gb"] / estimate}
            short += f", {found['peak_gb']:.1f} GB, x{found['peak_over_estimate']:.2f}"
        report.row(10, short, found["tokens_per_second"], "tokens/s", data=found)
        return found["tokens_per_second"]
    return 0.0


def speed_of(name: str, report: Report, device: str, tiny: bool, switches: bool) -> None:
    """Speed and memory by loss and micro-batch; then, if asked for, by what is switched off, and profiles."""
    # For the deterministic steps at the end; CUDA reads it when it starts. An H100 uses this size anyway.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # As train.py does, also before CUDA starts.
    machine.keep_freed_memory()
    sizes = (64, 128) if tiny else (16384, 4096, 32768, 65536)
    usual = settings("im", sizes[0], device, tiny)
    model = random_model(shape_of(name, tiny), device)
    model.choose_attention(usual.compute_dtype)
    report.row(10, f"{name}: attention", "varlen" if model.varlen else "tiled")
    if device == "cuda":
        model.compile_layers()
    baseline = measure_row(report, f"{name} IM {sizes[0]:,}", model, usual, 2)
    for loss, size in itertools.product(("im", "it"), sizes):
        if (loss, size) != ("im", sizes[0]):
            measure_row(report, f"{name} {loss.upper()} {size:,}", model, settings(loss, size, device, tiny))
    if switches and baseline:
        switched_off(name, report, model, usual, baseline)


def switched_off(name: str, report: Report, model: Llama, usual: train.Config, speed: float) -> None:
    """The speed without one change after the other, in percent of `speed`, and profiles."""
    def compare(what: str, changed: Llama, around: contextlib.AbstractContextManager) -> None:
        with report.trying(11, f"{name}: {what}"), around:
            found = measure(changed, usual, 1, 2)
            report.row(11, f"{name}: {what}", 100 * found["tokens_per_second"] / speed, "% of the speed",
                       data=found)

    if usual.device == "cuda":
        with report.trying(12, f"{name}: kernels"):
            kernel_times(name, report, model, usual)
    eager = random_model(model.config, usual.device)
    eager.choose_attention(usual.compute_dtype)
    compare("eager layers", eager, contextlib.nullcontext())
    with report.trying(12, f"{name}: parts"):
        parts(name, report, eager, usual)
    del eager
    # The head in chunks as large as on a CPU; each operation on the logits by itself.
    compare("small chunks of logits", model,
            mock.patch("kernels.head.CUDA_LOGITS", kernels.head.CHUNK_LOGITS))
    compare("unfused loss", model, mock.patch.object(kernels.head.nll_and_gradient, "works", False))
    compare("deterministic", model, deterministic())
    compare("weight gradients rounded to bf16", model, rounded_products())
    model.varlen = False
    compare("tiled attention", model, contextlib.nullcontext())
    if usual.device == "cuda":
        # What compile_layers() chooses on a CPU. The graphs of all models are made again.
        torch.compiler.reset()
        model.choose_attention(usual.compute_dtype)
        compare("norms and SwiGLU recomputed", model,
                torch._functorch.config.patch(ban_recompute_materialized_backward=False))


@contextlib.contextmanager
def rounded_products() -> Iterator[None]:
    """A weight's gradient is rounded to bf16 before it is added up."""
    with (mock.patch("kernels.layers.multiplies_to_fp32", lambda x: False),
          mock.patch("kernels.head.multiplies_to_fp32", lambda x: False)):
        yield


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """As --deterministic, for a while."""
    machine.deterministic()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


speed_small = functools.partial(speed_of, "0.13B", switches=True)
speed_middle = functools.partial(speed_of, "0.5B", switches=False)
speed_large = functools.partial(speed_of, "1B", switches=True)


# ---------------------------------------------------------------- profile

# A kernel's kind by what its name contains, the first that fits.
KINDS = (("fused by the compiler", ("triton_",)),
         ("attention", ("flash", "fmha", "attention")),
         ("optimizer and clipping", ("multi_tensor", "adam", "foreach", "lpnorm")),
         ("matrix products", ("gemm", "gemv", "nvjet", "cutlass", "xmma", "cublas", "splitk")),
         ("copies and fills", ("memcpy", "memset")), ("other kernels", ("",)))


def kind_of(kernel: str) -> str:
    return next(kind for kind, names in KINDS if any(name in kernel.lower() for name in names))


def kernel_times(name: str, report: Report, model: Llama, config: train.Config) -> None:
    """The device's time in a step as it usually runs, by kind of kernel."""
    _, one_step = step.training(config, config.max_length, model)
    one_step(0)
    torch.cuda.synchronize()
    began = time.perf_counter()
    one_step(1)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        one_step(2)
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for kernel, _, each in step.device_events(step.traced(recorded)):
        times[kernel] += each
    report.row(12, f"{name}: a step", 1e3 * seconds, "ms")
    report.row(12, f"{name}: of which the device is busy", 100 * sum(times.values()) / seconds, "%")
    for kind, _ in KINDS:
        of_kind = {kernel: each for kernel, each in times.items() if kind_of(kernel) == kind}
        longest = sorted(of_kind, key=of_kind.get, reverse=True)[:5]
        report.row(12, f"{name}: {kind}", 1e3 * sum(of_kind.values()), "ms",
                   data={"longest": {kernel: of_kind[kernel] for kernel in longest}})


def parts(name: str, report: Report, model: Llama, config: train.Config) -> None:
    """The time of a step with eager layers, by part."""
    with step.marked(model):
        _, one_step = step.training(config, config.max_length, model)
        for number in range(2):
            one_step(number)
        found = step.profiled(model, one_step, 2)
    for part in found["parts"]:
        report.row(12, f"{name} eager: {part['name']}", 100 * part["share"], "%", data=part)
    # On a CPU it is a share of a step of milliseconds, to which whatever else runs adds.
    limit = 0.05 if model.head_weight.is_cuda else 0.5
    report.at_most(12, f"{name} eager: time without a part, or twice", found["error"], limit)


# ---------------------------------------------------------------- peers


# What is measured, the name it has in bench/peers.py, and the packages that it needs.
PEERS = (("transformers, sdpa, batch", "transformers", ("transformers",)),
         ("TRL, sdpa, packed", "trl", ("trl", "datasets")),
         ("TRL + Liger, sdpa, packed", "trl-liger", ("trl", "datasets", "liger_kernel")),
         ("TRL + Liger, sdpa, batch", "trl-liger-padded", ("trl", "datasets", "liger_kernel")))


def peers(report: Report, device: str, tiny: bool) -> None:
    """Other trainers, where they are installed, on the data of the other measurements, 4,096 tokens a
    micro-batch."""
    of_run = [*flags("im", 64 if tiny else 4096, tiny), "--device", device]
    config = train.parse_args(of_run)
    for name, (what, peer, needs) in itertools.product(["1B"] if tiny else ["0.13B", "1B"], PEERS):
        missing = [module for module in needs if importlib.util.find_spec(module) is None]
        if missing:
            report.row(13, f"{name}: {what}", "not installed", note=f"missing: {', '.join(missing)}")
            continue
        shape = COMMON | SHAPES[name] | (TINY if tiny else {})
        try:
            run = json_child(["-m", "bench.peers", peer, "--steps", "3", "--document", str(config.max_length),
                              "--padded-rows", str(config.micro_batch_tokens // config.max_length),
                              "--config", json.dumps(shape)], cores(), of_run)
        except ValueError as error:
            print(error)
            report.row(13, f"{name}: {what}", "failed", note=str(error).splitlines()[-1])
            continue
        # Without the first step.
        report.row(13, f"{name}: {what}", sum(run["tokens"][1:]) / sum(run["seconds"][1:]), "tokens/s",
                   note=f"{run['note']}; {run['peak_memory_gib'] * 2**30 / 1e9:.1f} GB at the peak")
