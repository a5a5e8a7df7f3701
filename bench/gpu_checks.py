"""The stages of bench.gpu that check: what holds on CUDA as on a CPU, and what is equal to what.

A stage is function(report, device, tiny); tiny: shapes for a dry run on a CPU. Where numbers cannot be equal,
the bound is stated with the check. In fp32: 1e-4 of a tensor's norm (TF32 would make some 1e-3). In bf16: 1.5
times what computing in bf16 itself changes of the gradient, measured against fp32. Two roundings of the same
step differ by about the square root of 2 of that. Faults are planted to see that a check would catch them.
"""
import contextlib
import copy
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import train
from bench.common import REPOSITORY, read_lines, start
from bench.gpu import Report
from bench.step import synthetic
from config import QUICKSTART
from data import Dataset, collate
from eval.engine import Engine
from kernels.attention import attention as tiled_attention
from kernels.attention import varlen_attention
from loss import coefficients
from model import Llama, load_model
from runtime.distributed import data_parallel, shard
from runtime.model_config import ModelConfig
from runtime.weights import save_model

FP32_LIMIT = 1e-4
BF16_FACTOR = 1.5
# What PyTorch warns of where the host waits for the device.
WAIT = "called a synchronizing CUDA operation"


# ---------------------------------------------------------------- models and gradients of a test


def shapes(tiny: bool) -> dict[str, dict]:
    """config.json of a small model of each family."""
    common = dict(vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
                  rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False)
    if tiny:
        common |= dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    return {"Llama": common | dict(model_type="llama"),
            "Qwen2": common | dict(model_type="qwen2", tie_word_embeddings=True),
            "Qwen3": common | dict(model_type="qwen3")}


def build(config: dict) -> Llama:
    """A model on the CPU with random weights that make every part matter."""
    model = Llama(ModelConfig.from_dict(config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.08, generator=generator)
    return model


def settings(dtype: str) -> train.Config:
    return train.parse_args(["--model", "none", "--train-data", "none", "--dtype", dtype, "--loss", "im"])


def on(device: str, model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model."""
    return copy.deepcopy(model).to(device)


def step_of(model: torch.nn.Module, dataset: Dataset, micro_batches: Sequence[Sequence[int]],
            config: train.Config) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients, in fp64 on the CPU, of a step of these examples."""
    table = coefficients(dataset.counts, config.span_weights, config.normalize)
    model.zero_grad()
    sums, _ = train.accumulate_gradients(
        model, None, dataset, [(np.array(m), table[m]) for m in micro_batches], config, 0)
    gradients = {name: train.whole(p.grad).detach().double().cpu() for name, p in model.named_parameters()}
    return float(sums["loss"]), gradients


def whole_gradient(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    a, b = (x.detach().double().cpu() for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest distance of two tensors of the same name."""
    assert a.keys() == b.keys()
    return max(distance(a[name], b[name]) for name in b)


def logits(model: Llama, dataset: Dataset, device: str, config: train.Config) -> Tensor:
    """(N, V) of all examples in one row."""
    batch = collate(dataset, np.arange(len(dataset)), np.ones((len(dataset), dataset.counts.shape[1])))
    batch = batch.to(torch.device(device))
    with torch.no_grad(), train.autocast(config, torch.device(device)):
        return (model(batch.ids, batch.positions, batch.cu_seqlens) @ model.head_weight.T).float()


def exact_matrix_products() -> None:
    """No TF32, in this process."""
    torch.set_float32_matmul_precision("highest")


# ---------------------------------------------------------------- stages


def versions(report: Report, device: str, tiny: bool) -> None:
    report.row(1, "torch", torch.__version__)
    report.row(1, "CUDA of torch", torch.version.cuda or "none")
    report.row(1, "Python", sys.version.split()[0])
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        report.row(1, "card", properties.name)
        report.row(1, "its memory", properties.total_memory / 2**30, "GiB")
        with report.trying(1, "nvidia-smi"):
            query = "driver_version", "power.limit", "clocks.max.sm", "temperature.gpu"
            done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"],
                                  capture_output=True, text=True, timeout=20)
            for name, value in zip(query, done.stdout.splitlines()[0].split(", ")):
                report.row(1, name, value)
    for name, config in shapes(tiny).items():
        with report.trying(1, f"attention of {name}, bf16"):
            model = build(config).to(device)
            warning = model.choose_attention(torch.bfloat16)
            if device == "cuda":
                report.holds(1, f"varlen_attn is used: {name}, bf16", model.varlen, warning)
            else:
                report.row(1, f"attention of {name}", "varlen" if model.varlen else "tiled")


def fp32(report: Report, device: str, tiny: bool) -> None:
    """Logits, loss and gradients in fp32 on the device and on the CPU."""
    exact_matrix_products()
    config = settings("fp32")
    for name, shape in shapes(tiny).items():
        with report.trying(3, name):
            model = build(shape)
            dataset = synthetic([1, 20, 37] if tiny else [1, 127, 128, 129, 700], shape["vocab_size"])
            batches = [range(len(dataset))]
            moved = on(device, model)
            report.at_most(3, f"{name}: logits", distance(logits(moved, dataset, device, config),
                                                          logits(model, dataset, "cpu", config)), FP32_LIMIT)
            (loss, got), (expected_loss, expected) = (
                step_of(each, dataset, batches, config) for each in (moved, model))
            report.at_most(3, f"{name}: loss", abs(loss / expected_loss - 1), FP32_LIMIT)
            report.at_most(3, f"{name}: gradients, worst tensor", worst(got, expected), FP32_LIMIT)
            if device == "cuda":
                torch.set_float32_matmul_precision("high")
                _, rounded = step_of(moved, dataset, batches, config)
                exact_matrix_products()
                report.row(3, f"{name}: what TF32 would make of that", worst(rounded, expected))


# ---------------------------------------------------------------- attention


def exact_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool = True) -> Tensor:
    """Attention in fp64, document by document. q: (N, H, D); k, v: (N, G, D) -> (N, H, D)."""
    group, out = q.shape[1] // k.shape[1], []
    for a, b, c in zip(*(x.double().split(list(lengths)) for x in (q, k, v))):
        b, c = (x.repeat_interleave(group, 1) for x in (b, c))
        scores = torch.einsum("nhd,mhd->hnm", a, b) * a.shape[-1] ** -0.5
        if causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        out.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), c))
    return torch.cat(out)


def document_error(got: Tensor, expected: Tensor, lengths: Sequence[int], usual: float) -> Tensor:
    """The largest distance of a document, ||a - b|| / ||b||. usual: the root mean square of comparable
    tensors. A document that is much smaller, such as the zero gradient of a single query, is compared with a
    tenth of that."""
    pairs = zip(got.detach().double().split(list(lengths)), expected.detach().split(list(lengths)))
    return torch.stack([(a - b).norm() / b.norm().clamp(min=0.1 * usual * b.numel() ** 0.5)
                        for a, b in pairs]).max()


def attention(report: Report, device: str, tiny: bool) -> None:
    """bf16 attention over packed documents, with its gradients, against fp64."""
    rows = [[1], [127, 128, 129], [4096], [1, 127, 1, 128, 129, 4096, 1]]
    sizes, groups = (64, 128), (1, 3, 4, 8)
    if tiny:
        rows, sizes, groups = [[1], [1, 17, 5]], (8,), (1, 3)

    def flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return varlen_attention(q, k, v, cu_seqlens.to(device), int(cu_seqlens.diff().max()))

    functions = {"tiled": tiled_attention} if device == "cpu" else {"flash": flash, "tiled": tiled_attention}
    # Rounding to bf16 alone makes 0.2 to 0.6 %.
    limit = 0.01

    def errors(function: Callable, lengths: list[int], cuts: list[int], size: int, group: int,
               causal: bool = True) -> float:
        """The worst error of the output and the gradients. cuts: the documents' lengths as the function is
        told; causal: as the truth is."""
        make = torch.Generator().manual_seed(0)
        n, keys = sum(lengths), 2
        inputs = [torch.randn(n, heads, size, generator=make).to(device, torch.bfloat16).requires_grad_()
                  for heads in (keys * group, keys, keys)]
        grad = torch.randn(n, keys * group, size, generator=make).to(device, torch.bfloat16)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        expected = exact_attention(*exact, lengths, causal)
        got = function(*inputs, torch.tensor([0, *cuts]).cumsum(0).int())
        exact_gradients = torch.autograd.grad(expected, exact, grad.double())
        usual = torch.cat([x.flatten() for x in exact_gradients]).square().mean().sqrt().item()
        found = [document_error(got, expected, lengths, 0.0)]
        found += [document_error(a, b, lengths, usual)
                  for a, b in zip(torch.autograd.grad(got, inputs, grad), exact_gradients)]
        # Tensor.max() is NaN if one of them is.
        return torch.stack(found).max().item()

    for name, function in functions.items():
        for size in sizes:
            for group in groups:
                with report.trying(4, f"{name}, head size {size}, group {group}"):
                    found = {str(lengths): errors(function, lengths, lengths, size, group)
                             for lengths in rows}
                    which = max(found, key=found.get)
                    report.at_most(4, f"{name}, head size {size}, group {group}", found[which], limit,
                                   note=f"worst with documents of {which}")
        with report.trying(4, f"{name}: planted faults"):
            lengths = rows[-1]
            joined = [lengths[0] + lengths[1], *lengths[2:]]
            report.at_least(4, f"{name}: a leak between documents is caught",
                            errors(function, lengths, joined, sizes[0], groups[1]), 5 * limit)
            report.at_least(4, f"{name}: a dropped causal mask is caught",
                            errors(function, lengths, lengths, sizes[0], groups[1], causal=False), 5 * limit)
            report.at_least(4, f"{name}: an error of 2 % is caught",
                            errors(lambda q, k, v, cu: 1.02 * function(q, k, v, cu), lengths, lengths,
                                   sizes[0], groups[1]), 1.5 * limit)


# ---------------------------------------------------------------- bf16


@contextlib.contextmanager
def leak(model: Llama) -> Iterator[None]:
    """The first two documents of every row can see each other."""
    def joined(cu_seqlens: Tensor, device: torch.device) -> Callable:
        cut = torch.cat([cu_seqlens[:1], cu_seqlens[2:]]) if len(cu_seqlens) > 2 else cu_seqlens
        return Llama.attention_over(model, cut, device)

    model.attention_over = joined
    yield
    del model.attention_over


def bf16(report: Report, device: str, tiny: bool) -> None:
    """A step in bf16 by several ways: packed or not, recomputed, compiled, in other chunks."""
    exact_matrix_products()
    config, shape = settings("bf16"), shapes(tiny)["Llama"]
    # The planted leak joins the first two: long ones, so that it matters.
    dataset = synthetic([17, 30, 2, 9] if tiny else [300, 700, 2, 129, 64, 1000], shape["vocab_size"])
    packed, alone = [range(len(dataset))], [[i] for i in range(len(dataset))]
    pairs = [[i, i + 1] for i in range(0, len(dataset), 2)]
    model = build(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                # What a token sees of others has to matter, at any width.
                parameter.mul_(1.5 / 0.08 / shape["hidden_size"] ** 0.5)
    compiled, model = on(device, model), on(device, model)
    _, exact = step_of(model, dataset, packed, settings("fp32"))
    model.choose_attention(torch.bfloat16)
    expected_loss, gradients = step_of(model, dataset, packed, config)
    expected = whole_gradient(gradients)

    def change(micro_batches: Sequence[Sequence[int]] = packed, changed: Llama = model
               ) -> tuple[float, float]:
        """How far the loss and the gradient are from the expected."""
        loss, gradients = step_of(changed, dataset, micro_batches, config)
        return abs(loss / expected_loss - 1), distance(whole_gradient(gradients), expected)

    rounding = distance(expected, whole_gradient(exact))
    # Flash attention's backward pass adds in any order.
    noise = max(change()[1] for _ in range(3))
    report.row(5, "what bf16 itself changes of the gradient", rounding)
    report.row(5, "what the same again changes of it", noise)
    other_kernels, same_kernels = BF16_FACTOR * rounding, max(3 * noise, rounding / 3)

    def compare(name: str, limit: float, *args: object) -> None:
        with report.trying(5, name):
            of_loss, of_gradient = change(*args)
            report.at_most(5, f"{name}: gradient", of_gradient, limit)
            report.at_most(5, f"{name}: loss", of_loss, 2e-3)

    compare("unpacked", same_kernels, alone)
    compare("two documents a micro-batch", same_kernels, pairs)
    model.recompute = True
    compare("recompute", same_kernels)
    model.recompute = False
    for rows in (16,) if tiny else (128, 512):
        with (mock.patch("kernels.head.CHUNK_LOGITS", rows * shape["vocab_size"]),
              mock.patch("kernels.head.CUDA_ROWS", rows)):
            compare(f"chunks of {rows} targets", same_kernels)
    with report.trying(5, "planted leak"), leak(model):
        report.at_least(5, "a leak between documents is caught", change()[1], 2 * other_kernels)
    if model.varlen:
        model.varlen = False
        compare("tiled attention", other_kernels)
    compiled.choose_attention(torch.bfloat16)
    compiled.compile_layers()
    compare("compiled", other_kernels, packed, compiled)
    compare("compiled, two documents a micro-batch", other_kernels, pairs, compiled)


# ---------------------------------------------------------------- syncs


def flags_of_run(folder: str, device: str) -> list[str]:
    """Of a run that trains the embedded default's model in a temporary folder."""
    return ["--model", str(QUICKSTART / "model"), "--train-data", str(QUICKSTART / "train.jsonl"),
            "--output-dir", f"{folder}/run", "--cache-dir", f"{folder}/cache", "--device", device]


def syncs(report: Report, device: str, tiny: bool) -> None:
    """How often the host waits for the device in five steps of train.py."""
    steps, original = range(2, 7), train.accumulate_gradients

    def accumulate(*args: object) -> object:
        step = args[5]
        if step in (steps.start, steps.stop) and device == "cuda":
            torch.cuda.set_sync_debug_mode("warn" if step == steps.start else "default")
        return original(*args)

    for more in ([], ["--neftune-alpha", "5"]):
        name = " ".join(more) or "plain"
        with (report.trying(6, name), tempfile.TemporaryDirectory() as folder,
              warnings.catch_warnings(record=True) as caught,
              mock.patch("train.accumulate_gradients", accumulate)):
            warnings.simplefilter("always")
            status = train.main([
                *flags_of_run(folder, device), "--max-length", "512", "--max-steps", "8", "--batch-size",
                "8" if tiny else "32", "--micro-batch-tokens", "512", "--log-every", "1000", *more])
            report.holds(6, f"{name}: the run ends well", status == 0)
            places = Counter("/".join([*Path(each.filename).parts[-2:]]) + f":{each.lineno}"
                             for each in caught if WAIT in str(each.message))
            report.at_most(6, f"{name}: waits of {len(steps)} steps", places.total(), len(steps))
            for place, count in places.most_common(12):
                report.row(6, f"{name}: {place}", count, "waits")


# ---------------------------------------------------------------- the quick start


def ended_well(process: subprocess.Popen, folder: Path, name: str) -> None:
    if status := process.wait():
        raise RuntimeError(f"exit status {status}: {(folder / f'{name}.txt').read_text()[-250:].strip()}")


def same_run(a: Path, b: Path) -> tuple[bool, float]:
    """Whether two runs have the same losses and weights, bit for bit, and how far apart the weights are."""
    from safetensors.torch import load_file
    losses = [[(x["loss"], x["grad_norm"]) for x in read_lines(run / "metrics.jsonl")] for run in (a, b)]
    left, right = (load_file(run / "final" / "model.safetensors") for run in (a, b))
    equal = all(torch.equal(left[name], right[name]) for name in right)
    return equal and losses[0] == losses[1] and len(losses[0]) > 0, worst(left, right)


def quickstart(report: Report, device: str, tiny: bool) -> None:
    """The embedded default, and --deterministic twice, once with a SIGKILL in the middle."""
    steps = 6 if tiny else 120
    common = ["--device", device, *(["--batch-size", "4"] if tiny else [])]
    exact = [*common, "--deterministic", "--eval-generate", "0", "--max-steps", str(steps), "--save-every",
             str(steps // 6)]
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as at_end:
        folder = Path(temporary)

        def train_as(name: str, flags: list[str]) -> subprocess.Popen:
            """train.py's embedded default. With one thread, because several run at once."""
            command = [str(REPOSITORY / "train.py"), "--output-dir", str(folder / name), "--cache-dir",
                       str(folder / "cache"), "--save-dtype", "fp32", *flags]
            with open(folder / f"{name}.txt", "a") as log:
                process = start(command, 1, log)
            at_end.callback(process.wait)
            at_end.callback(process.kill)
            return process

        began = time.monotonic()
        killed, whole_run = train_as("killed", exact), train_as("exact", exact)
        usual = train_as("usual", common + (["--eval-generate", "0", "--max-steps", "4"] if tiny else []))
        with report.trying(7, "deterministic: killed and resumed"):
            metrics = folder / "killed" / "metrics.jsonl"
            while len(read_lines(metrics)) < steps // 2 and killed.poll() is None:
                time.sleep(0.02)
            killed.kill()
            killed.wait()
            done = len(read_lines(metrics))
            report.holds(7, "deterministic: killed in the middle", 0 < done < steps,
                         f"after {done} of {steps} steps: {(folder / 'killed.txt').read_text()[-250:]}")
            ended_well(train_as("killed", exact), folder, "killed")
            ended_well(whole_run, folder, "exact")
            equal, far = same_run(folder / "killed", folder / "exact")
            report.holds(7, "deterministic: resumed equals uninterrupted", equal,
                         f"weights are {far:.1e} apart")
        with report.trying(7, "quick start"):
            ended_well(usual, folder, "usual")
            report.row(7, "quick start, next to two others", time.monotonic() - began, "s")
            metrics = read_lines(folder / "usual" / "metrics.jsonl")
            first, last = (metrics[i]["nll_completion"] for i in (0, -1))
            report.at_most(7, "completions' NLL in the last step over the first", last / first,
                           0.9 if tiny else 0.5)
            for line in read_lines(folder / "usual" / "eval.jsonl"):
                if "exact_match" in line:
                    report.row(7, f"exact matches at step {line['step']}", line["exact_match"])


# ---------------------------------------------------------------- transformers


def by_transformers(config: dict, model: Llama, device: str) -> torch.nn.Module:
    """transformers' model with the weights of `model`."""
    from transformers import AutoConfig, AutoModelForCausalLM
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa",
                                             dtype=torch.float32)
    missing, surplus = built.load_state_dict(model.state_dict(), strict=False)
    assert not surplus and set(missing) <= {"lm_head.weight"}, (missing, surplus)
    built.tie_weights()
    return built.to(device).eval()


def transformers_step(reference: torch.nn.Module, dataset: Dataset, config: train.Config, device: str
                      ) -> tuple[Tensor, float, dict[str, Tensor]]:
    """transformers' logits, loss and gradients of the same step, document by document."""
    table = coefficients(dataset.counts, config.span_weights, config.normalize)
    reference.zero_grad()
    all_logits, total = [], 0.0
    for i in range(len(dataset)):
        batch = collate(dataset, np.array([i]), table[[i]]).to(torch.device(device))
        with train.autocast(config, torch.device(device)):
            logits = reference(batch.ids[None], use_cache=False).logits[0].float()
        nll = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        loss = (nll * batch.coefficients).sum()
        loss.backward()
        total += loss.item()
        all_logits.append(logits.detach())
    gradients = {name: p.grad.detach().double().cpu() for name, p in reference.named_parameters()}
    return torch.cat(all_logits), total, gradients


def transformers_parity(report: Report, device: str, tiny: bool) -> None:
    exact_matrix_products()
    for name, shape in shapes(tiny).items():
        dataset = synthetic([1, 20, 37] if tiny else [1, 129, 700, 64], shape["vocab_size"])
        packed = [range(len(dataset))]
        model = build(shape)
        with report.trying(8, name):
            reference, ours = by_transformers(shape, model, device), on(device, model)
            for dtype in ("fp32", "bf16"):
                config = settings(dtype)
                ours.choose_attention(config.compute_dtype)
                loss, gradients = step_of(ours, dataset, packed, config)
                theirs = transformers_step(reference, dataset, config, device)
                if dtype == "fp32":
                    exact, limits = theirs, [FP32_LIMIT] * 3
                    of_gradients = worst(gradients, exact[2])
                else:
                    whole_exact = whole_gradient(exact[2])
                    limits = [BF16_FACTOR * distance(theirs[0], exact[0]), 2e-3,
                              BF16_FACTOR * distance(whole_gradient(theirs[2]), whole_exact)]
                    of_gradients = distance(whole_gradient(gradients), whole_exact)
                found = [distance(logits(ours, dataset, device, config), exact[0]), abs(loss / exact[1] - 1),
                         of_gradients]
                for what, value, limit in zip(("logits", "loss", "gradients"), found, limits):
                    report.at_most(8, f"{name}, {dtype}: {what}", value, limit)


def generation(report: Report, device: str, tiny: bool) -> None:
    """Greedy answers in fp32 on the device, on the CPU, and by transformers."""
    exact_matrix_products()
    count, new = (3, 6) if tiny else (16, 32)
    for name, shape in shapes(tiny).items():
        with report.trying(9, name):
            model = build(shape)
            draw = np.random.default_rng(0)
            prompts = [draw.integers(shape["vocab_size"], size=n).tolist()
                       for n in draw.integers(1, 20 if tiny else 200, size=count)]

            def answers(device: str, dtype: torch.dtype = torch.float32) -> list[list[int]]:
                moved = on(device, model)
                moved.choose_attention(dtype)
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    engine = Engine(moved)
                return [ids for _, ids, _ in sorted(engine.answers(prompts, set(), new, batch_size=5))]

            def equal(a: list[list[int]], b: list[list[int]]) -> int:
                return sum(len(x) == new and x == y for x, y in zip(a, b))

            got, expected = answers(device), answers("cpu")
            report.at_least(9, f"{name}: answers as on the CPU, of {count}", equal(got, expected), count)
            report.row(9, f"{name}: the same in bf16", equal(answers(device, torch.bfloat16), expected))
            reference, theirs = by_transformers(shape, model, device), []
            for prompt in prompts:
                ids = torch.tensor([prompt], device=device)
                answer = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                            do_sample=False, eos_token_id=None, pad_token_id=0)
                theirs.append(answer[0, len(prompt):].tolist())
            report.at_least(9, f"{name}: answers as transformers, of {count}", equal(got, theirs), count)


# ---------------------------------------------------------------- one rank


def ranks(report: Report, device: str, tiny: bool) -> None:
    """torchrun with one rank; and DDP and FSDP2 around a model in a group of one."""
    with report.trying(14, "torchrun"), tempfile.TemporaryDirectory() as folder:
        # torchrun has to end its ranks itself, so it is asked to end after a while.
        done = subprocess.run([
            "timeout", "60", sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", "1", str(REPOSITORY / "train.py"), *flags_of_run(folder, device),
            "--max-steps", "3", "--batch-size", "4"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY)
        steps = len(read_lines(Path(folder) / "run" / "metrics.jsonl"))
        report.holds(14, "torchrun: three steps", done.returncode == 0 and steps == 3,
                     done.stdout.strip()[-200:])
    exact_matrix_products()
    backend = "nccl" if device == "cuda" else "gloo"
    config, shape = settings("fp32"), shapes(tiny)["Llama"]
    dataset = synthetic([1, 20, 37] if tiny else [1, 129, 700, 64], shape["vocab_size"])
    packed, place = [range(len(dataset))], torch.device("cuda:0" if device == "cuda" else "cpu")
    model = build(shape)
    _, expected = step_of(on(device, model), dataset, packed, config)
    with tempfile.TemporaryDirectory() as folder:
        with report.trying(14, backend):
            dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
            report.holds(14, f"a group of one by {backend}", dist.is_initialized())
        try:
            with report.trying(14, "DDP"):
                wrapped = data_parallel(on(device, model), place)
                _, got = step_of(wrapped, dataset, packed, config)
                got = {key.removeprefix("module."): value for key, value in got.items()}
                report.at_most(14, f"DDP by {backend}: gradients", worst(got, expected), FP32_LIMIT)
            with report.trying(14, "FSDP2"):
                save_model(model, folder)
                sharded = load_model(folder, place, partial(shard, device=place, dtype=torch.float32))
                _, got = step_of(sharded, dataset, packed, config)
                report.at_most(14, f"FSDP2 by {backend}: gradients", worst(got, expected), FP32_LIMIT)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
