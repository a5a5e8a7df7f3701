"""Whole runs: against a plain loop in transformers, under other packings, with every option, refused."""
import argparse
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import model as model_module
import train
from chat import COMPLETION, INSTRUCTION, KINDS, SYSTEM, load_template
from runtime.model_config import ModelConfig, read_config
from runtime.tokenizer import Tokenizer
from data import collate, hold_out, load_dataset, plan
from kernels import head, layers
from kernels.attention import VARLEN_KEYWORDS
from loss import neftune_noise
from tiny import (arguments, copies_of_meta_tensors, difference, make_model, make_records, metrics, run_apart,
                  run_here, same_weights, setup, stop_after, weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return setup(tmp_path_factory.mktemp("train"))


WEIGHTS = {"it": {COMPLETION: 1.0}, "im": {SYSTEM: 1.0, INSTRUCTION: 1.0, COMPLETION: 1.0}}
# A run's values with the flags of arguments().
PLAIN = dict(lr=1e-2, beta1=0.9, beta2=0.98, adam_eps=1e-6, weight_decay=0.0, clip_grad_norm=1.0, warmup=1,
             neftune_alpha=0.0, kl_weight=0.0, seed=0, batch_size=6)


def average(values: list[list[tuple[int, torch.Tensor]]], weight: dict[int, float], normalize: str
            ) -> torch.Tensor:
    """values: of each example, [(kind, value)]. Their mean, from the definition."""
    every = [pair for example in values for pair in example]
    if normalize == "token":
        return sum(weight[k] * n for k, n in every if k in weight) / sum(k in weight for k, _ in every)
    if normalize == "example":
        means = [sum(weight[k] * n for k, n in example if k in weight)
                 / sum(weight[k] for k, _ in example if k in weight) for example in values]
        return sum(means) / len(means)
    return sum(weight[kind] * sum(n for k, n in every if k == kind) / sum(k == kind for k, _ in every)
               for kind in weight if any(k == kind for k, _ in every))


def plain_training(folder: Path, weight: dict[int, float], normalize: str, **more: object
                   ) -> tuple[dict, list[dict]]:
    """What train.py promises, written plainly: transformers' model, one example at a time, every logit, the
    loss from its definition over lists of numbers, AdamW and clipping spelled out. more: over PLAIN.
    Shares the order of examples, the spans and the draws of noise only."""
    set_to = argparse.Namespace(**{**PLAIN, **more})
    tokenizer = Tokenizer(folder / "model")
    dataset = load_dataset([folder / "train.jsonl"], tokenizer, load_template("llama3", tokenizer), 120,
                           "truncate", folder / "cache")
    model, start = (transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
                    for _ in range(2))
    parameters = dict(model.named_parameters())
    averages = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    usable = [e for e in range(len(dataset)) if any(dataset.counts[e, k] for k in weight)]
    per_epoch = -(-len(usable) // set_to.batch_size)
    total, log = 2 * per_epoch, []
    for step in range(total):
        order = np.concatenate(plan(dataset.lengths[usable], set_to.seed, step // per_epoch,
                                    set_to.batch_size, 10**9, 1)[step % per_epoch][0])
        nlls, kls = [], []  # of each example, [(kind, value)]
        for e in [usable[i] for i in order]:
            a, b = dataset.offsets[e:e + 2]
            ids = torch.tensor(dataset.ids[a:b].astype(np.int64))
            kinds = dataset.kinds[a + 1:b].tolist()
            noise = 0.0
            if set_to.neftune_alpha:
                noise = neftune_noise(collate(dataset, np.array([e]), np.zeros((1, len(KINDS)))),
                                      model.config.hidden_size, set_to.neftune_alpha, set_to.seed, step)
            log_p, log_q = (each(inputs_embeds=(each.get_input_embeddings()(ids[:-1]) + noise)[None])
                            .logits[0].log_softmax(-1) for each in (model, start))
            log_q = log_q.detach()
            nlls.append(list(zip(kinds, -log_p[range(len(kinds)), ids[1:]])))
            kls.append(list(zip(kinds, (log_p.exp() * (log_p - log_q)).sum(-1))))
        loss, kl = (average(values, weight, normalize) for values in (nlls, kls))
        model.zero_grad()
        (loss + set_to.kl_weight * kl).backward()
        norm = sum(p.grad.square().sum() for p in parameters.values()).sqrt()
        clip = min(1.0, set_to.clip_grad_norm / (norm + 1e-6)) if set_to.clip_grad_norm else 1.0
        # The rate rises over `warmup` steps and falls to one step's worth in a line.
        rise = (step + 1) / set_to.warmup
        lr = set_to.lr * (rise if step < set_to.warmup else (total - step) / (total - set_to.warmup))
        for name, p in parameters.items():
            first, second = averages[name]
            first.lerp_(p.grad * clip, 1 - set_to.beta1)
            second.lerp_((p.grad * clip).square(), 1 - set_to.beta2)
            with torch.no_grad():
                if "norm" not in name and not name.endswith("bias"):
                    p -= lr * set_to.weight_decay * p
                p -= (lr * first / (1 - set_to.beta1 ** (step + 1))
                      / ((second / (1 - set_to.beta2 ** (step + 1))).sqrt() + set_to.adam_eps))
        every = [pair for example in nlls for pair in example]
        log.append({"loss": loss.item(), "kl": kl.item(), "grad_norm": norm.item(), "lr": lr,
                    "tokens": len(every), "trained_tokens": sum(k in weight for k, _ in every),
                    "nll": {kind: np.mean([n.item() for k, n in every if k == kind]) for kind in range(5)
                            if any(k == kind for k, _ in every)}})
    return {n: p.detach() for n, p in parameters.items() if n != "lm_head.weight"}, log


def check_against_plain(folder: Path, out: str, expected: dict, log: list[dict], steps: int) -> None:
    """A finished run with --log-every 1 against plain_training()'s: its weights and every step's numbers."""
    rows = metrics(folder / out)
    assert len(rows) == len(log) == steps
    start, got = weights(folder / "model"), weights(folder / out / "final")
    assert difference(got, expected) < 1e-5 < 0.05 < difference(start, expected)
    for row, plain in zip(rows, log):
        assert row["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
        assert row["lr"] == pytest.approx(plain["lr"], rel=1e-9)
        assert (row["tokens"], row["trained_tokens"]) == (plain["tokens"], plain["trained_tokens"])
        assert row.get("kl", plain["kl"]) == pytest.approx(plain["kl"], rel=1e-4, abs=1e-7)
        for kind, value in plain["nll"].items():  # of every span, trained or not
            if KINDS[kind] != "context":
                assert row[f"nll_{KINDS[kind]}"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("loss", ["it", "im"])
@pytest.mark.parametrize("normalize", ["token", "example", "span"])
def test_training_equals_a_plain_loop_in_transformers(folder, loss, normalize):
    out = f"plain-{loss}-{normalize}"
    assert run_here(arguments(folder, out, loss=loss, normalize=normalize, micro_batch_tokens=300,
                              log_every=1)) == 0
    check_against_plain(folder, out, *plain_training(folder, WEIGHTS[loss], normalize), steps=8)


@pytest.mark.parametrize("normalize", ["token", "example"])
def test_every_flag_of_the_objective_and_the_optimizer_means_what_a_plain_loop_does(folder, normalize):
    """Each at another value than its default."""
    more = dict(lr=2e-2, beta1=0.8, beta2=0.95, adam_eps=1e-3, weight_decay=0.5, clip_grad_norm=0.7,
                neftune_alpha=5.0, kl_weight=0.5, seed=3)
    out = f"plain-flags-{normalize}"
    assert run_here(arguments(folder, out, normalize=normalize, micro_batch_tokens=300, log_every=1,
                              warmup_ratio=0.3, system_weight=0.25, completion_weight=2, **more)) == 0
    weight = {SYSTEM: 0.25, INSTRUCTION: 1.0, COMPLETION: 2.0}
    expected, log = plain_training(folder, weight, normalize, warmup=3, **more)
    check_against_plain(folder, out, expected, log, steps=8)
    assert all(row["grad_norm"] > 0.7 and row["kl"] > 0.01 for row in metrics(folder / out)[1:])


def test_without_clipping_a_large_gradient_moves_the_weights_as_it_is(folder):
    """With an epsilon so large that AdamW's step grows with the gradient."""
    more = dict(adam_eps=10.0, clip_grad_norm=0.0)
    assert run_here(arguments(folder, "unclipped", normalize="span", loss="it", completion_weight=30,
                              log_every=1, lr=0.1, **more)) == 0
    expected, log = plain_training(folder, {COMPLETION: 30.0}, "span", lr=0.1, **more)
    check_against_plain(folder, "unclipped", expected, log, steps=8)
    assert all(row["grad_norm"] > 5 for row in log)


def test_examples_with_nothing_to_train_on_change_no_step(folder):
    """Every second record has no answer to train on: it is marked with weight 0, or was cut off."""
    home = folder / "some-usable"
    home.mkdir()
    (home / "model").symlink_to(folder / "model")
    lines = (folder / "train.jsonl").read_text().splitlines()
    unusable = [{"messages": [{"role": "user", "content": "a plum " * (1 if i % 2 else 99)},
                              {"role": "assistant", "content": "red", **({"weight": 0} if i % 2 else {})}]}
                for i in range(len(lines))]
    (home / "train.jsonl").write_text("".join(f"{json.dumps(record)}\n{line}\n"
                                              for record, line in zip(unusable, lines)))
    assert run_here(arguments(home, "out", loss="it", log_every=1)) == 0
    expected, log = plain_training(home, WEIGHTS["it"], "token")
    check_against_plain(home, "out", expected, log, steps=8)
    same, _ = plain_training(folder, WEIGHTS["it"], "token")    # as if these were not there
    assert difference(expected, same) == 0


@pytest.mark.parametrize("normalize", ["token", "example", "span"])
def test_packing_and_micro_batch_size_do_not_change_the_trajectory(folder, normalize):
    results = []
    for tokens in (120, 4096):
        out = f"micro-{normalize}-{tokens}"
        run_here(arguments(folder, out, normalize=normalize, micro_batch_tokens=tokens, neftune_alpha=5,
                           kl_weight=0.1))
        results.append((weights(folder / out / "final"), metrics(folder / out)))
    for other, rows in results[:-1]:
        assert difference(other, results[-1][0]) < 1e-5
        assert [r["tokens"] for r in rows] == [r["tokens"] for r in results[-1][1]]
        np.testing.assert_allclose([r["loss"] for r in rows], [r["loss"] for r in results[-1][1]], rtol=1e-5)
        np.testing.assert_allclose([r["kl"] for r in rows], [r["kl"] for r in results[-1][1]], rtol=1e-3,
                                   atol=1e-6)


# ---------------------------------------------------------------- objectives and options


def test_a_head_that_differs_from_a_tied_embedding_is_counted_trained_saved_and_resumed(folder, capsys):
    make_model(folder / "head" / "model")
    file = folder / "head" / "model" / "model.safetensors"
    before = load_file(file)
    before["lm_head.weight"] = before["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(before, file, {"format": "pt"})
    argv = arguments(folder, "head-out", model=file.parent, max_steps=2, save_every=1)
    assert run_here(argv) == 0
    assert f"model: {sum(x.numel() for x in before.values()):,} parameters" in capsys.readouterr().out
    after = weights(folder / "head-out" / "final")
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert after.keys() == before.keys() and min(moved.values()) > 0
    argv = arguments(folder, "head-again", model=file.parent, max_steps=2, save_every=1,
                     resume=folder / "head-out" / "checkpoints" / "step-00000001")
    assert run_here(argv) == 0
    assert same_weights(folder / "head-again", folder / "head-out")


def test_neftune_changes_training_forward_only(folder):
    for alpha in (0, 20):
        run_here(arguments(folder, f"noise-{alpha}", neftune_alpha=alpha, eval_data=folder / "train.jsonl"))
    quiet, noisy = ([json.loads(line)["data"] for line in open(folder / f"noise-{a}" / "eval.jsonl")]
                    for a in (0, 20))
    assert quiet[0] == noisy[0] and quiet[1] != noisy[1]
    assert metrics(folder / "noise-0")[0]["loss"] != metrics(folder / "noise-20")[0]["loss"]


def test_kl_is_zero_at_the_first_step_and_holds_the_model_back(folder):
    for weight in (1e-9, 10):
        run_here(arguments(folder, f"kl-{weight}", kl_weight=weight, normalize="token"))
    free, held = (metrics(folder / f"kl-{w}") for w in (1e-9, 10))
    assert free[0]["kl"] == held[0]["kl"] == pytest.approx(0, abs=1e-7)
    assert 0 < held[-1]["kl"] < free[-1]["kl"] / 2


def test_compile_changes_nothing_and_makes_one_graph_of_a_run(folder, monkeypatch):
    """By a backend that runs the traced operations as they are. PyTorch would give up on code that it had to
    compile eight times: here ten layers and several micro-batches a step, with noise and recomputation."""
    make_model(folder / "deep", layers=10)
    graphs, calls, original = [], [], torch.compile
    torch.compiler.reset()

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return lambda *args: calls.append(1) or graph.forward(*args)
    monkeypatch.setattr(torch, "compile", partial(original, backend=backend))
    monkeypatch.setattr(train, "compile_fault", lambda device: "")
    fused = []      # what the head would compile on CUDA
    monkeypatch.setattr(head, "on_gpu", lambda x: True)
    for name in ("nll_of_logits", "nll_and_gradient"):
        monkeypatch.setattr(head, name, lambda *_, name=name: fused.append(name))
    argv = dict(model=folder / "deep", max_steps=2, lr=1e-3, micro_batch_tokens=200, recompute=True,
                neftune_alpha=5)
    run_here(arguments(folder, "not-compiled", **argv, no_compile=True))
    assert not graphs and not fused
    run_here(arguments(folder, "compiled", **argv, compile=True))
    # In each layer of each micro-batch, forward and again backward.
    assert len(graphs) == 1 and len(calls) > 2 * 10 * 2 and len(calls) % 20 == 0 and len({*fused}) == 2
    start, plain, traced = (weights(folder / name)
                            for name in ("deep", "not-compiled/final", "compiled/final"))
    assert difference(traced, plain) < 1e-5 < 1e-3 < difference(start, plain)


def test_layers_are_compiled_by_default_on_cuda_and_from_a_size_and_only_where_it_works(monkeypatch, capsys):
    cpu, cuda, fault = torch.device("cpu"), torch.device("cuda"), [""]
    small, large = (ModelConfig.from_dict(dict(
        model_type="llama", vocab_size=vocabulary, hidden_size=512, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, rms_norm_eps=1e-5, tie_word_embeddings=True))
        for vocabulary in (90_000, 110_000))    # 47 and 57 million parameters
    monkeypatch.setattr(train, "compile_fault", lambda device: fault[0])
    for compile, model, device, expected in (
            (None, small, cpu, False), (None, large, cpu, True), (None, small, cuda, True),
            (True, small, cpu, True), (True, small, cuda, True), (False, large, cpu, False),
            (False, large, cuda, False)):
        assert train.should_compile(train.Config(compile=compile), model, device) == expected
    assert not capsys.readouterr().out
    fault[0] = "TritonMissing: no triton"
    for _ in range(2):      # the second time for the model that --kl-weight starts from
        assert not train.should_compile(train.Config(), small, cuda)
    line = capsys.readouterr().err
    assert line.startswith("warning: the layers are not compiled") and "TritonMissing: no triton" in line
    assert line.count("\n") == 1
    with pytest.raises(ValueError, match="--compile: .*TritonMissing: no triton; give --no-compile"):
        train.should_compile(train.Config(compile=True), small, cuda)


def test_micro_batches_are_as_large_as_a_gpu_and_a_step_allow_and_the_same_on_every_rank(folder, monkeypatch):
    """SmolLM2-135M's shape: 16,384 tokens take 12.7 GB of an H100, 32,768 take 22.5, and a fifth of the
    memory is left."""
    monkeypatch.delitem(VARLEN_KEYWORDS, "enable_gqa", raising=False)
    shape = ModelConfig.from_dict(dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True))
    free, other = [0], [65536]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80e9))
    monkeypatch.setattr(train, "from_all", lambda tokens: [tokens, other[0]])

    def chosen(memory: float, device: str = "cuda", ranks: int = 1, processes: int = 1, **config: object
               ) -> int:
        free[0] = memory
        config = train.Config(dtype="bf16", **config)
        return train.micro_batch_tokens(config, shape, torch.device(device), ranks, processes)

    assert [chosen(memory) for memory in (7e9, 15e9, 17e9, 27e9, 29e9, 80e9)] == [
        4096, 8192, 16384, 16384, 32768, 65536]
    # Layers that are not compiled keep less.
    assert chosen(14e9, compile=False) == 16384
    # 5 examples of up to 2,048 tokens fit into 16,384; each of two ranks has 3, which fit into 8,192.
    assert [chosen(80e9, batch_size=5), chosen(80e9, batch_size=5, ranks=2)] == [16384, 8192]
    # Two processes have half of the memory each.
    assert chosen(30e9, processes=2) == 8192
    assert chosen(80e9, "cpu") == 4096
    other[0] = 4096
    assert chosen(80e9) == 4096
    # What was chosen is stored, so that --config repeats it.
    run_here([*arguments(folder, "chosen", max_steps=1), "--micro-batch-tokens", "0"])
    assert json.loads((folder / "chosen" / "run_config.json").read_text())["micro_batch_tokens"] == 4096


def test_deterministic_changes_nothing_on_a_cpu(folder, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    argv = dict(dtype="bf16", max_steps=2, eval_data=folder / "train.jsonl", eval_generate=2)
    run_here(arguments(folder, "usual", **argv))
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    try:
        run_here(arguments(folder, "deterministic", **argv, deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert same_weights(folder / "usual", folder / "deterministic")
    assert [row["loss"] for row in metrics(folder / "usual")] == [
        row["loss"] for row in metrics(folder / "deterministic")]


def test_metrics_say_which_attention_ran_and_what_a_gpu_reserved(folder, monkeypatch):
    """Peaks are those of one step each."""
    resets = []
    monkeypatch.setattr(train, "reset_peak", resets.append)
    run_here(arguments(folder, "machine", max_steps=2))
    assert len(resets) == 2
    for row in metrics(folder / "machine"):
        assert row["attention"] == "tiled products" and row["peak_reserved_mb"] is None
        assert row["peak_memory_mb"] > 100


def test_padding_is_what_the_layers_compute_beside_the_tokens(folder, monkeypatch):
    monkeypatch.setattr("kernels.layers.LEAST_PADDED", 100)
    forward, rows = model_module.Layer.forward, []
    monkeypatch.setattr(model_module.Layer, "forward", lambda self, x, *others: (
        rows.append(len(x)) or forward(self, x, *others)))
    run_here(arguments(folder, "padded", max_steps=1, micro_batch_tokens=150))
    [line] = metrics(folder / "padded")
    layers = len(model_module.load_model(folder / "model").model.layers)
    assert len(rows) > layers and line["padding_tokens"] == sum(rows) / layers - line["tokens"] > 0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("loss", ["it", "im", "lm"])
@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_the_host_need_not_know_a_number_of_the_device_to_do_a_step(
        folder, monkeypatch, loss, recompute, as_on_cuda):
    """On CUDA it would wait for each."""
    copies = copies_of_meta_tensors(monkeypatch)
    if as_on_cuda:
        monkeypatch.setattr(head, "on_gpu", lambda x: True)
        for module in (head, layers):
            monkeypatch.setattr(module, "multiplies_to_fp32", lambda x: x.dtype == torch.bfloat16)
        for name in ("nll_of_logits", "nll_and_gradient"):
            monkeypatch.setattr(head, name, getattr(head, f"_{name}"))
    config = train.parse_args(arguments(folder, "meta", loss=loss, neftune_alpha=5, kl_weight=0.1,
                                        compile=True))
    tokenizer = Tokenizer(folder / "model")
    dataset = load_dataset(config.train_data, tokenizer, load_template("llama3", tokenizer), 120, "truncate",
                           folder / "cache")
    steps = train.make_steps(config, dataset, dataset.trainable(config.span_weights), 0, 1)
    with torch.device("meta"):
        trained, reference = (model_module.Llama(read_config(folder / "model")).bfloat16() for _ in range(2))
    trained.recompute = recompute
    batch = collate(dataset, *steps[0][0][0]).to(torch.device("meta"))
    reference.requires_grad_(False)
    value, statistics, nll = train.micro_batch_loss(trained, reference, batch, config, 0, log_untrained=True)
    value.backward()
    assert not copies and statistics.keys() == {"loss", "nll", "kl"} and len(nll) == len(batch.trained) > 0
    assert bool(len(batch.untrained)) or loss == "lm"
    assert all(x.is_meta for x in (value, nll, *statistics.values(), *(p.grad for p in trained.parameters())))


def test_what_was_not_computed_is_null_in_the_metrics(folder):
    """Under IT the other kinds' NLL is looked at in the first step, every third and the last; and no step has
    a kind that the data lacks."""
    file = folder / "no-system.jsonl"
    file.write_text("".join(line for line in open(folder / "train.jsonl") if '"system"' not in line))
    run_here(arguments(folder, "nulls", train_data=file, loss="it", log_every=3, batch_size=3))
    rows = metrics(folder / "nulls")
    assert len(rows) == 2 * -(-len(file.read_text().splitlines()) // 3) == 10
    looked = [row["step"] in (1, 3, 6, 9, 10) for row in rows]
    for kind in ("instruction", "template"):
        assert [row[f"nll_{kind}"] is not None and row[f"nll_{kind}"] > 0 for row in rows] == looked
        assert [row[f"nll_{kind}"] is None for row in rows] == [not look for look in looked]
    assert all(row["nll_completion"] > 0 and row["nll_system"] is None for row in rows)


def test_held_out_examples_may_be_longer_than_a_micro_batch(folder):
    """119 targets, which training in rows of 60 tokens could not take. Their NLL is that of transformers."""
    make_records(folder / "short.jsonl", 8, longest=3)
    message = {"role": "user", "content": "a plum"}, {"role": "assistant", "content": "red town " * 50}
    (folder / "long.jsonl").write_text(json.dumps({"messages": message}))
    argv = arguments(folder, "long", train_data=folder / "short.jsonl", micro_batch_tokens=60, max_steps=1,
                     eval_data=folder / "long.jsonl")
    assert run_here(argv) == 0
    got = json.loads((folder / "long" / "eval.jsonl").read_text().splitlines()[0])["data"]["long"]
    tokenizer = Tokenizer(folder / "model")
    dataset = load_dataset([folder / "long.jsonl"], tokenizer, load_template("llama3", tokenizer), 120,
                           "truncate", folder / "cache")
    assert dataset.lengths.tolist() == [119]
    ids = torch.tensor(dataset.ids.astype(np.int64))[None]
    labels = ids.masked_fill(torch.tensor(dataset.kinds != COMPLETION), -100)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert got["completion"]["tokens"] == int((labels != -100).sum()) > 60
    expected = theirs(ids, labels=labels).loss.item()
    assert got["completion"]["nll_token_mean"] == pytest.approx(expected, rel=1e-5)


def test_bf16_trains_fp32_parameters_close_to_fp32(folder):
    """Pitfall: bf16 parameters drop updates smaller than their spacing. Evaluations are in bf16, too."""
    more = dict(lr=1e-5, eval_data=folder / "train.jsonl")
    run_here(arguments(folder, "fp32-small", **more))
    run_here(arguments(folder, "bf16-small", **more, dtype="bf16"))
    exact, rounded = (evaluations(folder / f"{name}-small")[0]["train"]["completion"]["nll_token_mean"]
                      for name in ("fp32", "bf16"))
    assert exact != rounded == pytest.approx(exact, rel=0.01)
    start, fp32, bf16 = (weights(folder / name) for name in ("model", "fp32-small/final", "bf16-small/final"))
    for name in start:
        if start[name].dim() == 2:
            full, got = fp32[name] - start[name], bf16[name] - start[name]
            assert full.norm() > 0 and torch.cosine_similarity(full.flatten(), got.flatten(), 0) > 0.9


# ---------------------------------------------------------------- which examples


def evaluations(folder: Path) -> list[dict]:
    return [json.loads(line)["data"] for line in (folder / "eval.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def repeated(folder) -> Path:
    """30 records, of which every third asks what the one before it asks."""
    records = [json.loads(line) for line in open(make_records(folder / "repeated.jsonl", 30, seed=4))]
    asked = [next(m for m in record["messages"] if m["role"] == "user") for record in records]
    for before, message in zip(asked[1::3], asked[2::3]):
        message["content"] = before["content"]
    (folder / "repeated.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "repeated.jsonl"


@pytest.fixture(scope="module")
def held_out_file(folder, repeated) -> Path:
    """What --eval-fraction 0.25 holds out of repeated; rest.jsonl, next to it, has the others."""
    tokenizer = Tokenizer(folder / "model")
    dataset = load_dataset([repeated], tokenizer, load_template("llama3", tokenizer), 120, "truncate",
                           folder / "cache")
    chosen = hold_out(dataset.groups, 0.25, 0)
    assert chosen.sum() == 8 and chosen[1::3].any() and (chosen[1::3] == chosen[2::3]).all()
    for name, side in (("rest", False), ("held-out", True)):
        lines = [line for line, held_out in zip(open(repeated), chosen) if held_out == side]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder / "held-out.jsonl"


def test_what_is_held_out_is_evaluated_and_never_trained_on(folder, repeated, held_out_file, capsys):
    """Bit for bit as with two files, whatever the loss, the seed and the packing."""
    for number, more in enumerate((dict(loss="it", seed=0), dict(loss="im", seed=1, micro_batch_tokens=150))):
        one, two = (folder / f"{name}-{number}" for name in ("one-file", "two-files"))
        run_here(arguments(folder, one.name, train_data=repeated, eval_fraction=0.25, eval_every=3, **more))
        assert "8 held out for evaluation" in capsys.readouterr().out
        run_here(arguments(folder, two.name, train_data=folder / "rest.jsonl", eval_every=3,
                           eval_data=held_out_file, **more))
        assert same_weights(one, two) and len(evaluations(one)) == 4
        assert evaluations(one) == evaluations(two) and [*evaluations(one)[0]] == ["held-out"]
        capsys.readouterr()


def test_a_bad_held_out_record_is_named_before_the_training_data_is_tokenized(folder, tmp_path):
    bad, cache = tmp_path / "bad.jsonl", tmp_path / "cache"
    bad.write_text('{"prompt": "Hi"}')
    with pytest.raises(ValueError, match="bad.jsonl:1: has none of the known layouts"):
        run_here(arguments(folder, "bad", eval_data=bad, cache_dir=cache))
    assert not list(cache.iterdir())


def test_a_held_out_file_of_that_name_keeps_its_own_result(folder, repeated, held_out_file):
    run_here(arguments(folder, "two-names", train_data=repeated, eval_fraction=0.25, max_steps=1,
                       eval_data=held_out_file))
    assert {*evaluations(folder / "two-names")[0]} == {"held-out.jsonl", "held-out"}


def test_examples_that_ask_what_a_training_example_asks_are_counted(folder, repeated, capsys):
    known, new = repeated.read_text().splitlines()[3:5], json.dumps({"prompt": "?!", "completion": "a"})
    (folder / "asked.jsonl").write_text("\n".join([*known, new]))
    (folder / "new.jsonl").write_text(new)
    for file, more, says in (("asked", {}, True), ("new", {}, False), ("asked", dict(max_examples=3), False)):
        run_here(arguments(folder, "asked", train_data=repeated, eval_data=folder / f"{file}.jsonl",
                           max_steps=1, overwrite=True, **more))
        printed = " ".join(capsys.readouterr().out.split())
        assert ("warning: 2 of the 3 examples of asked have the first user message of a training example"
                in printed) == says and ("warning:" in printed) == says


@pytest.mark.parametrize("more, says", [
    (dict(eval_fraction=0.01), "--eval-fraction 0.01: holds out none of 20 examples; .* Give more"),
    (dict(eval_fraction=0.99), "--eval-fraction 0.99: holds out all of 20 examples; .* Give less"),
    (dict(train_data=None, mix=["train.jsonl=1", "no-answer.jsonl=1"]),
     "--mix .*no-answer.jsonl=1: the file has no example to train on"),
    (dict(train_data=None, mix=["train.jsonl=99", "plain.jsonl=1"]),
     "--mix .*plain.jsonl=1: is less than half an example of an epoch's 22"),
])
def test_shares_that_leave_nothing_are_refused_by_flag(folder, more, says):
    (folder / "no-answer.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    (folder / "plain.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n"
                                        + json.dumps({"prompt": "red", "completion": "b"}))
    more = {name: [f"{folder}/{word}" for word in value] if name == "mix" else value
            for name, value in more.items()}
    with pytest.raises(ValueError, match=says):
        run_here(arguments(folder, "nothing-left", **more))


def test_a_file_whose_results_would_be_called_as_those_of_eval_fraction_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    shutil.copy("train.jsonl", "held-out")
    with pytest.raises(ValueError, match="--eval-data held-out: results call the records of --eval-fraction"):
        run_here(arguments(folder, "nothing-left", eval_fraction=0.2, eval_data="held-out"))
    assert not (folder / "nothing-left").exists()


def test_the_first_examples_are_those_of_a_file_cut_there(folder, repeated):
    lines = repeated.read_text().splitlines(keepends=True)
    (folder / "first.jsonl").write_text("".join(lines[:11]))
    run_here(arguments(folder, "max-examples", train_data=repeated, max_examples=11))
    run_here(arguments(folder, "first", train_data=folder / "first.jsonl"))
    assert same_weights(folder / "max-examples", folder / "first")
    # What is held out stays the same, whatever is trained on.
    held_out = []
    for number in (3, 0):
        run_here(arguments(folder, f"first-{number}", train_data=repeated, max_examples=number, max_steps=1,
                           eval_fraction=0.25))
        held_out.append(evaluations(folder / f"first-{number}")[0])
    assert held_out[0] == held_out[1]


def test_a_folder_in_a_mix_is_said_with_the_examples_of_all_its_files(folder, repeated, capsys):
    """An epoch has no more examples than there are, whatever --max-examples."""
    (folder / "shards").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / "shards" / name).write_text((folder / "train.jsonl").read_text())
    sizes = []
    for name in ("train.jsonl", "shards"):
        run_here(arguments(folder, f"mix-{name}", train_data=None, max_steps=1, max_examples=1000,
                           mix=[f"{folder / name}=1", f"{repeated}=1"]))
        printed = capsys.readouterr().out
        draws, available = zip(*re.findall(r"an epoch has (\d+) .*, which has (\d+)", printed))
        sizes.append([*map(int, available)])
        assert sum(map(int, draws)) == sum(sizes[-1])
    (of_file, of_other), of_folder = sizes
    assert of_folder == [2 * of_file, of_other]


def test_a_mix_trains_on_its_shares_and_resumes_bit_for_bit(folder, repeated, monkeypatch, capsys):
    """Half of each epoch's 16 examples from a file of 20 records, half from one of 30."""
    more = dict(train_data=None, mix=[f"{folder / 'train.jsonl'}=1", f"{repeated}=1"], max_examples=16,
                eval_fraction=0.2, eval_every=2, epochs=3, neftune_alpha=5)
    assert run_here(arguments(folder, "mixed", **more)) == 0
    printed = capsys.readouterr().out
    assert f"an epoch has 8 examples of {folder / 'train.jsonl'}, which has " in printed
    assert f"an epoch has 8 examples of {repeated}, which has " in printed
    rows = metrics(folder / "mixed")
    assert len(rows) == 9 and [row["epoch"] for row in rows] == [step / 3 for step in range(1, 10)]
    tokens = [sum(row["tokens"] for row in rows[i:i + 3]) for i in (0, 3, 6)]
    assert len({*tokens}) == 3, "every epoch has other examples"

    assert run_here(arguments(folder, "mixed-again", **more)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert run_here(arguments(folder, "mixed-stopped", **more)) == 128 + signal.SIGTERM
    assert run_here(arguments(folder, "mixed-stopped", **more)) == 0
    for name in ("mixed-again", "mixed-stopped"):
        assert same_weights(folder / name, folder / "mixed")
        assert evaluations(folder / name) == evaluations(folder / "mixed")
        assert [row["loss"] for row in metrics(folder / name)] == [row["loss"] for row in rows]


# ---------------------------------------------------------------- what ends a run


def test_the_signal_handlers_come_back_however_a_run_ends(folder, monkeypatch):
    def handlers() -> list:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    before = handlers()
    assert run_here(arguments(folder, "ends", max_steps=2)) == 0 and handlers() == before
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run_here(arguments(folder, "ends-early", max_steps=4)) == 128 + signal.SIGTERM
    assert handlers() == before
    monkeypatch.setattr(train, "save_checkpoint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here(arguments(folder, "ends-badly", max_steps=2))
    assert handlers() == before


def changed_in_step(number: int, original: Callable, change: Callable) -> Callable:
    """A function that is called once a step; in step `number` its result goes through `change`."""
    calls = []

    def function(*args: object, **more: object) -> object:
        calls.append(1)
        result = original(*args, **more)
        return change(result) if len(calls) == number else result
    return function


@pytest.mark.parametrize("what, owner, name, change, says", [
    ("loss", head._WeightedNLL, "forward", lambda r: (r[0] * math.nan, r[1] * math.nan),
     r"loss nan, .*Its loss is not finite for .*train\.jsonl:\d+.* so the likely cause is --lr 0\.\d+: "),
    ("gradient", head._WeightedNLL, "backward", lambda r: (r[0], r[1] * math.inf, *r[2:]),
     r"loss \d+\.\d+, kl \d+\.\d+, gradient norm (inf|nan)"),
    ("KL", train, "kl_divergence", lambda r: r + math.nan, r"loss \d+\.\d+, kl nan, gradient norm \d+\.\d+"),
], ids=["loss", "gradient", "KL"])
def test_what_is_not_finite_stops_the_run_before_the_weights_change(
        folder, monkeypatch, what, owner, name, change, says):
    """Each alone: the others are finite."""
    monkeypatch.setattr(owner, name, changed_in_step(3, getattr(owner, name), change))
    stepped = []
    original_step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda self, *a: stepped.append(1) or original_step(self, *a))
    with pytest.raises(ValueError, match=f"step 3: {says}"):
        run_here(arguments(folder, f"not-finite-{what}", kl_weight=0.1))
    assert len(stepped) == 2 and len(metrics(folder / f"not-finite-{what}")) == 2


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_update_that_is_not_finite_is_an_error_and_not_saved(folder, monkeypatch, value):
    """Also the last one, whose weights no loss is computed with."""
    original = torch.optim.AdamW.step

    def step(self, *a):
        original(self, *a)
        with torch.no_grad():
            self.param_groups[0]["params"][-1][-1, -1] = value
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    out = folder / f"not-finite-{value}"
    with pytest.raises(ValueError, match=r"^step 1: \S+ holds NaN or Inf after the update.*--lr"):
        run_here(arguments(folder, out.name, max_steps=1))
    assert not (out / "final").exists() and not list(out.glob("checkpoints/*"))


def test_the_records_whose_loss_is_not_finite_are_named_with_their_lines(folder, monkeypatch):
    """Two of a step of several micro-batches, behind one with nothing to train on; told by a letter that only
    they have."""
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[0] = json.dumps({"messages": [{"role": "user", "content": "a"},
                                        {"role": "assistant", "content": "b", "weight": 0}]})
    for i in (11, 16):
        lines[i] = json.dumps({"messages": [{"role": "user", "content": "a"},
                                            {"role": "assistant", "content": "red zzz red"}]})
    file = folder / "not-finite.jsonl"
    file.write_text("\n".join(lines))
    ids = Tokenizer(folder / "model").reference.encode("zzz", add_special_tokens=False).ids
    original, marked = head._WeightedNLL.forward, []

    def forward(ctx, hidden, head, targets, scale, compiled):
        value, nlls = original(ctx, hidden, head, targets, scale, compiled)
        bad = torch.isin(targets, torch.tensor(ids))
        marked.append(bool(bad.any()))
        return value + bad.sum() * math.nan if bad.any() else value, nlls.masked_fill(bad, math.nan)
    monkeypatch.setattr(head._WeightedNLL, "forward", forward)
    with pytest.raises(ValueError) as error:
        run_here(arguments(folder, "not-finite", train_data=file, loss="it", batch_size=20,
                           micro_batch_tokens=200))
    assert len(marked) > 3 and 0 < sum(marked) <= 2
    assert str(error.value).endswith(f"Its loss is not finite for {file}:12, {file}:17.")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_schedules_start_and_end_above_zero_and_peak_at_lr(schedule, total):
    config = train.Config(lr=2.0, schedule=schedule, warmup_ratio=0.1)
    rates = [train.learning_rate(config, step, total) for step in range(total)]
    assert min(rates) > 0 and max(rates) == pytest.approx(2.0)
    warmup = -(-total // 10)
    assert rates[:warmup] == pytest.approx([2.0 * (s + 1) / warmup for s in range(warmup)])
    if schedule == "linear" and total == 100:
        assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[99] == pytest.approx(2 / 90)
    if schedule == "cosine" and total == 100:
        assert rates[55] == pytest.approx(1.0)


@pytest.mark.parametrize("more, rates", [
    # 20 records in steps of 6: 4 steps an epoch, 8 in all
    (dict(warmup_ratio=0), [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    (dict(max_steps=3, warmup_ratio=0), [1, 2 / 3, 1 / 3]),
    (dict(max_steps=10, warmup_ratio=0), [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    (dict(epochs=1, warmup_ratio=0), [1, 3 / 4, 2 / 4, 1 / 4]),
    (dict(warmup_ratio=0.3), [1 / 3, 2 / 3, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
    (dict(schedule="constant", warmup_ratio=0.3), [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
    (dict(schedule="cosine", max_steps=4, warmup_ratio=0), [1, 0.85355339, 0.5, 0.14644661]),
    (dict(schedule="cosine", max_steps=6, warmup_ratio=0.2), [1 / 2, 1, 1, 0.85355339, 0.5, 0.14644661]),
], ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "")
def test_a_runs_learning_rates_are_those_written_here_and_so_is_their_number(folder, more, rates):
    assert run_here(arguments(folder, "rates", overwrite=True, lr=3e-3, **more)) == 0
    rows = metrics(folder / "rates")
    assert [row["lr"] for row in rows] == pytest.approx([3e-3 * rate for rate in rates], rel=1e-7)
    assert [row["epoch"] for row in rows] == [step / 4 for step in range(1, len(rates) + 1)]


@pytest.mark.parametrize("more, says", [
    (dict(max_length=120, micro_batch_tokens=50), "--micro-batch-tokens 50"),
    (dict(model="nowhere"), "--model nowhere"),
    (dict(train_data="nowhere.jsonl"), "nowhere.jsonl: no such file"),
    (dict(template="auto"), "no chat template"), (dict(template="chatml"), "could not learn to stop"),
    (dict(loss="it", completion_weight=0, template_weight=0, instruction_weight=0), "nothing to train"),
])
def test_wrong_input_is_one_line_and_leaves_no_folder(folder, more, says):
    done = run_apart(arguments(folder, "wrong", **more), check=False)
    assert done.returncode == 1 and says in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert not (folder / "wrong").exists()


def test_the_exported_config_has_no_path_of_another_model(folder, tmp_path):
    """transformers 4 writes the folder that a model was loaded from into config.json."""
    shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/a/b"}))
    run_here(arguments(folder, "no-path", model=tmp_path / "model", max_steps=1))
    assert "/home/a/b" not in (folder / "no-path" / "final" / "config.json").read_text()


def test_final_folder_generates_the_same_in_transformers_and_trains_again(folder):
    from eval.engine import Engine
    from eval.generate import generate
    from model import load_model
    run_here(arguments(folder, "exported", save_dtype="bf16"))
    final = folder / "exported" / "final"
    assert {tensor.dtype for tensor in weights(final).values()} == {torch.bfloat16}     # the source is fp32
    # config.json is the source's but for what has changed: the weights' dtype. It says nothing of a folder.
    source = json.loads((folder / "model" / "config.json").read_text())
    assert json.loads((final / "config.json").read_text()) == {
        **source, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    mine = load_model(final)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                             tokenize=True, return_dict=False)
               for text in ("red", "be brief and", "a")]
    stop = theirs.generation_config.eos_token_id
    assert stop == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for prompt, got in zip(prompts, generate(Engine(mine), prompts, {stop}, 20)):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20,
                                   do_sample=False)[0, len(prompt):].tolist()
        assert got == (expected[:expected.index(stop)] if stop in expected else expected)
    assert run_here(arguments(folder, "again", model=final, template="auto", max_steps=1)) == 0
    assert json.loads((folder / "again" / "final" / "config.json").read_text())["dtype"] == "float32"
