"""Instruction-tune a Llama-style checkpoint with the loss over the spans you choose.

    python train.py                                                   the embedded default, under a minute
    python train.py --model DIR --train-data FILE --eval-data FILE --loss im --output-dir runs/im
    torchrun --nproc-per-node 2 train.py --model ...                  the same run, on two ranks
    python -m eval.look --model DIR --train-data FILE ...             what such a run will do

The flags are in config.py. The rest reads top to bottom: optimization, the loss of a micro-batch, then
main(): data, model, loop. Two things differ from the usual way. A step's examples and all its denominators
are known before it starts, so neither packing nor micro-batch size nor the number of ranks changes what a
step optimizes. And every run reports the loss of each kind of span, trained or not.
"""
from runtime.start import answer_flags, answer_interrupts

if __name__ == "__main__":
    answer_interrupts()

from config import COMPILED_ON_CPU, MICRO_BATCH_TOKENS, Config, check_inputs, parse_args, parse_mix

# PyTorch takes seconds to import. Wrong flags and --help do not wait for it.
answer_flags(__name__, lambda argv: check_inputs(parse_args(argv)))

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from chat import KINDS, Template, check_vocabulary, load_template
from data import Batch, Dataset, Steps, cache_parts, check_embedding, collate, hold_out, load_dataset
from eval.estimate import memory
from eval.generate import answer_records
from eval.spans import summary, sums_by_file
from kernels.head import nll, weighted_nll
from kernels.layers import padding
from loss import check_finite, coefficients, kl_divergence, neftune_noise, step_record, sums_by_kind
from model import Llama, load_model, parameter_count, stored_weights
from runtime.card import model_card
from runtime.checkpoint import load_checkpoint, new_folder, optimizer_state, save_checkpoint
from runtime.distributed import (Sums, data_parallel, finish, first_of_machine, from_all, from_main, is_main,
                                 join_ranks, leave, rank, release, report_error, shard, shows_progress,
                                 sync_gradients, unwrap, whole, world_size)
from runtime.files import distinct_endings
from runtime.folder import (LENGTH, append_line, check_folder, check_ranks, claim, finish_run,
                            is_evaluation, keep_lines, read_log, saved_flag)
from runtime.foreign import is_number, printable
from runtime.machine import (compile_fault, deterministic, keep_freed_memory, peak_memory_mb,
                             peak_reserved_mb, reset_peak, resolve_dtype, sleep_while_crowded,
                             warn_of_emulation)
from runtime.model_config import ModelConfig, read_config
from runtime.model_folder import resolve_model
from runtime.report import (Progress, StopSignal, describe, describe_data, ending, print_change, say,
                            show_answers)
from runtime.start import fit, raise_interrupts, raise_stops, warn_once
from runtime.tokenizer import Tokenizer, write_tokenizer
from runtime.track import Tracker
from runtime.weights import DTYPES, model_fingerprint, save_model

INTERRUPTED = "error: interrupted before training began; nothing is lost"

# ---------------------------------------------------------------- optimization


def make_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices (embeddings, too) but not on norms and biases. Any other optimizer
    of torch.optim will do: all that it keeps for a parameter is saved and resumed. A group's own lr stays the
    same multiple of --lr throughout the schedule."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.adam_eps,
                             fused=True)


def warmup_steps(config: Config, total: int) -> int:
    """Steps with rising learning rate, out of `total`."""
    return math.ceil(config.warmup_ratio * total)


def learning_rate(config: Config, step: int, total: int) -> float:
    """The learning rate of the step with index `step` out of `total`; above 0 from the first to the last."""
    warmup = warmup_steps(config, total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    # Falls from 1 to 1 / (total - warmup), so that the last step still learns.
    left = (total - step) / (total - warmup)
    factor = {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "constant": 1.0}
    return config.lr * factor[config.schedule]


def count_steps(config: Config, per_epoch: int) -> int:
    """Steps of the whole run."""
    return config.max_steps or config.epochs * per_epoch


def why_not_extendable(config: Config, per_epoch: int, identity: dict, steps: int) -> str:
    """Why a run with another --epochs, --max-steps or --warmup-ratio cannot be continued as this one after
    `steps` steps: it has trained too many, or with other learning rates. "" if it can. identity: the other
    run's."""
    if not all(is_number(identity.get(name)) for name in LENGTH):
        return "its state.json does not say how long the run was to be"
    other = dataclasses.replace(config, **{name: identity[name] for name in LENGTH})
    total, other_total = count_steps(config, per_epoch), count_steps(other, per_epoch)
    if steps > total:
        return f"{steps} steps are trained, and this run would have only {total}"
    if any(learning_rate(config, i, total) != learning_rate(other, i, other_total) for i in range(steps)):
        return (f"the {steps} steps that are trained would have had other learning rates; only a run with "
                "--schedule constant and as many warm-up steps can be extended")
    return ""


def micro_batch_loss(model: torch.nn.Module, reference: Llama | None, batch: Batch, config: Config, step: int,
                     log_untrained: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """What this micro-batch adds to the step's loss, with a graph; statistics that are summed over
    micro-batches and ranks, of which each number is logged by its name; and (R,) the trained targets' NLL."""
    noise = None
    if config.neftune_alpha:
        width = unwrap(model).config.hidden_size
        noise = neftune_noise(batch, width, config.neftune_alpha, config.seed, step)
    hidden = model(batch.ids, batch.positions, batch.cu_seqlens, noise)         # (N, C)
    # Read after the forward pass: with --shard, that is what gathers it.
    head = unwrap(model).head_weight
    trained, untrained, compiled = batch.trained, batch.untrained, config.compile is not False
    if not len(untrained):
        # All of them: a view does, instead of a copy.
        trained = slice(None)
    loss, trained_nll = weighted_nll(hidden[trained], head, batch.targets[trained],
                                     batch.coefficients[trained], compiled)
    statistics = {"loss": loss, "nll": sums_by_kind(trained_nll, batch.kinds[trained])}
    if reference is not None:
        with torch.no_grad():
            start = reference(batch.ids, batch.positions, batch.cu_seqlens, noise)
        kl = kl_divergence(hidden[trained], head, start[trained], reference.head_weight,
                           batch.coefficients[trained])
        statistics["kl"] = kl
        loss = loss + config.kl_weight * kl
    if log_untrained:   # no gradient
        values = nll(hidden.detach()[untrained], head, batch.targets[untrained], compiled)
        statistics["nll"] = statistics["nll"] + sums_by_kind(values, batch.kinds[untrained])
    return loss, statistics, trained_nll


def accumulate_gradients(model: torch.nn.Module, reference: Llama | None, dataset: Dataset,
                         micro_batches: list[tuple], config: Config, step: int, log_untrained: bool = False
                         ) -> tuple[Sums, list[tuple[Batch, Tensor]]]:
    """The forward and backward passes of a step. micro_batches: this rank's (Steps). Returns this rank's sums
    of the statistics, and its batches with the NLL of their trained targets."""
    device = unwrap(model).head_weight.device
    sums, nll_by_batch = Sums(), []
    for i, micro_batch in enumerate(micro_batches):
        batch = collate(dataset, *micro_batch).to(device)
        sync_gradients(model, now=i == len(micro_batches) - 1)
        with autocast(config, device):
            loss, statistics, trained_nll = micro_batch_loss(model, reference, batch, config, step,
                                                             log_untrained)
        # DDP and FSDP average gradients over the ranks; the step's loss is the ranks' sum.
        (loss * world_size()).backward()
        padded = torch.full((), float(padding(len(batch.ids), device)), device=device)
        sums.add(statistics | {"padding": padded})
        nll_by_batch.append((batch, trained_nll))
    release(reference)
    return sums, nll_by_batch


# ---------------------------------------------------------------- what a run is made from


class Source(NamedTuple):
    """The checkpoint that a run starts from."""
    folder: Path
    model_config: ModelConfig
    tokenizer: Tokenizer
    template: Template


def open_source(config: Config) -> Source:
    """All but the weights of --model, checked as far as that is cheap. A resumed run keeps its date.
    ValueError for what is wrong with the folder, the template or the date."""
    folder = resolve_model(config.model)
    model_config = read_config(folder)
    stored_weights(folder, model_config)
    tokenizer = Tokenizer(folder)
    day = from_main(config.date or saved(config, "date") or date.today().isoformat())
    template = load_template(config.template, tokenizer, day)
    if template.warning:
        say(fit(f"warning: {printable(template.warning)}"))
    check_vocabulary(model_config.vocab_size, tokenizer, template)
    return Source(folder, model_config, tokenizer, template)


def saved(config: Config, name: str) -> str:
    """A flag of the run that this one goes on from, "" if there is none."""
    return saved_flag(Path(config.output_dir), name, config.resume, config.overwrite)


def settle(config: Config, source: Source) -> None:
    """Replace what a flag leaves open by what is stored with a run, which resumes with the same: the date,
    and the dtype that auto stands for."""
    config.date = source.template.date
    if config.dtype == "auto":
        config.dtype = from_main(saved(config, "dtype") or resolve_dtype("auto", config.device))
    warn_of_emulation(config.dtype, config.device)


def run_identity(config: Config, source: Source) -> dict[str, object]:
    """All that must be the same to resume, as JSON can hold it, as far as it is known before the data is
    tokenized."""
    parts = cache_parts(config.train_data, source.tokenizer, source.template, config.max_length,
                        config.overlong, config.columns)
    identity = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)
                if not f.metadata["free"]}
    # Only the relation of the shares matters.
    identity["mix"] = parse_mix(config.mix)[1]
    return identity | {"model": model_fingerprint(source.folder), "train_data": parts["data"],
                       "tokenizer": [parts["tokenizer"], parts["special_tokens"]],
                       "template": parts["template"], "date": parts["date"]}


def result_names(files: list[str]) -> list[str]:
    """What to call each file in results: a/near.jsonl -> near; if two names are the same, as much of the end
    of the path as tells them apart: a/test.jsonl and b/test.jsonl."""
    names = [Path(file).name.split(".")[0] for file in files]
    return [path if names.count(name) > 1 else name for name, path in zip(names, distinct_endings(files))]


# What --eval-fraction holds out is called in results.
HELD_OUT = "held-out"


def load_data(config: Config, source: Source) -> tuple[Dataset, np.ndarray, dict[str, Dataset]]:
    """The training set, (examples,) the indices of those to train on, and the held-out sets by name. One
    process of each machine tokenizes, the others read what it wrote. ValueError for bad records, and if
    nothing is left to train on."""
    def load(names: list[str]) -> Dataset:
        dataset = load_dataset(names, source.tokenizer, source.template, config.max_length, config.overlong,
                               config.cache_dir, progress=shows_progress(), columns=config.columns)
        check_embedding(dataset, source.model_config.vocab_size, source.tokenizer)
        return dataset

    names = result_names([*config.eval_data, *([HELD_OUT] if config.eval_fraction else [])])
    if len({*names}) < len(names):
        raise ValueError(f"--eval-data {HELD_OUT}: results call the records of --eval-fraction so, too; give "
                         "its absolute path")
    with first_of_machine():
        # First what is usually smaller: a bad record there is named before the training data is tokenized.
        eval_sets = {name: load([file]) for name, file in zip(names, config.eval_data)}
        train_set = load(config.train_data)
    held_out = None
    if config.eval_fraction:
        held_out = hold_out(train_set.groups, config.eval_fraction, config.split_seed)
        if not 0 < held_out.sum() < len(train_set):
            amount, fix = ("all", "less") if held_out.any() else ("none", "more")
            raise ValueError(f"--eval-fraction {config.eval_fraction}: holds out {amount} of "
                             f"{len(train_set):,} examples; those with the same first user message stay "
                             f"together. Give {fix}, or other records with --eval-data")
        eval_sets[HELD_OUT] = train_set.subset(np.flatnonzero(held_out))
    usable = examples_to_train(config, train_set, held_out)
    if not len(usable):
        left = train_set if held_out is None else train_set.subset(np.flatnonzero(~held_out))
        cut_off = config.require_completion and left.without_completion == len(left)
        truncated = train_set.report["truncated"]
        cut = f" (--max-length {config.max_length} cut off {truncated:,}; raise it)" if truncated else ""
        raise ValueError(f"no example has anything to train on under --loss {config.loss} with --template "
                         f"{config.template}: " + (
                             f"none has a completion of a weight above 0{cut}; give records that have "
                             "completions (--no-require-completion trains without)"
                             if cut_off else "every target's span has weight 0"))
    return train_set, usable, eval_sets


def examples_to_train(config: Config, dataset: Dataset, held_out: np.ndarray | None = None) -> np.ndarray:
    """The indices of those to train on; held_out: (examples,) whether each is held out."""
    usable = dataset.trainable(config.span_weights, config.require_completion)
    if held_out is not None:
        usable = usable[~held_out[usable]]
    return usable[:config.max_examples] if config.max_examples and not config.mix else usable


def warn_of_known(train_set: Dataset, usable: np.ndarray, eval_sets: dict[str, Dataset]) -> None:
    """Say how many examples of each held-out set ask what a training example asks. usable: (examples,) the
    indices of those that are trained on."""
    for name, held_out in eval_sets.items():
        if shared := int(np.isin(held_out.groups, train_set.groups[usable]).sum()):
            say(fit(f"warning: {shared:,} of the {len(held_out):,} examples of {ending(name, 40)} have the "
                    "first user message of a training example"))


def micro_batch_tokens(config: Config, model_config: ModelConfig, device: torch.device, ranks: int,
                       processes: int = 1) -> int:
    """--micro-batch-tokens, or what 0 means here, the same on all ranks. On CUDA: the largest of
    MICRO_BATCH_TOKENS that is estimated to fit in four fifths of the free memory, but no larger than a rank's
    examples of a step need. processes: how many share a device, such as the jobs of a study."""
    if config.micro_batch_tokens:
        return config.micro_batch_tokens
    chosen, *larger = MICRO_BATCH_TOKENS
    if device.type == "cuda":
        free_memory = 0.8 * torch.cuda.mem_get_info(device)[0] / processes
        of_a_step = -(-config.batch_size // ranks) * config.max_length
        for tokens in larger:
            packed = {"largest": tokens, "trained": tokens, "other": tokens}
            parts = memory(model_config, packed, config.compute_dtype, ranks, config.shard and ranks > 1,
                           config.recompute, config.kl_weight > 0, True, compiles(config, model_config, True))
            if chosen >= of_a_step or sum(parts.values()) > free_memory:
                break
            chosen = tokens
    return min(from_all(chosen))


def examples_of_mix(config: Config, dataset: Dataset, usable: np.ndarray) -> list[int]:
    """How many of an epoch's examples come from each file of --mix. usable: (examples,) all that there are to
    train on. ValueError for a file that has none, or too small a share."""
    available = np.bincount(dataset.names_of(usable), minlength=len(config.mix))
    total = min(config.max_examples or len(usable), len(usable))
    draws = [round(share * total) for share in parse_mix(config.mix)[1]]
    for word, count, draw in zip(config.mix, available, draws):
        if not count:
            raise ValueError(f"--mix {word}: the file has no example to train on; leave it out")
        if not draw:
            raise ValueError(f"--mix {word}: is less than half an example of an epoch's {total:,}; give the "
                             "file a larger share, or leave it out")
    return draws


def make_steps(config: Config, dataset: Dataset, usable: np.ndarray, rank: int, world_size: int) -> Steps:
    """The batches of one rank. ValueError if --micro-batch-tokens is less than an example has, and for what
    is wrong with --mix."""
    draws = examples_of_mix(config, dataset, usable) if config.mix else None
    return Steps(dataset, usable, partial(coefficients, weights=config.span_weights,
                                          normalize=config.normalize),
                 config.seed, config.batch_size, config.micro_batch_tokens, rank, world_size, draws)


# ---------------------------------------------------------------- what the loop asks for


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Autocast as --dtype asks. (With --shard, layers are gathered in the same dtype.)"""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.compute_dtype == torch.bfloat16)


def compiles(config: Config, model_config: ModelConfig, cuda: bool) -> bool:
    """Whether --compile asks for compiled layers: by default on CUDA and for large models."""
    if config.compile is None:
        return cuda or parameter_count(model_config) >= COMPILED_ON_CPU
    return config.compile


def should_compile(config: Config, model_config: ModelConfig, device: torch.device) -> bool:
    """Whether to compile the layers: if compiles() and it works. ValueError if it was asked for and does
    not."""
    if not compiles(config, model_config, device.type == "cuda"):
        return False
    fault = compile_fault(device)
    if fault and config.compile:
        raise ValueError(f"--compile: torch.compile does not work here: {fault}; give --no-compile")
    if fault:
        warn_once(f"the layers are not compiled, and slower: torch.compile does not work here: {fault}")
    return not fault


def prepare_model(config: Config, folder: Path, device: torch.device) -> Llama:
    """The weights of --model on this rank, its share of them with --shard."""
    divide = None
    if config.shard and world_size() > 1:
        divide = partial(shard, device=device, dtype=config.compute_dtype)
    model = load_model(folder, device, divide)
    model.recompute = config.recompute
    model.choose_attention(config.compute_dtype)
    if should_compile(config, model.config, device):
        model.compile_layers()
    return model


def bytes_to_write(config: Config, model: Llama) -> int:
    """The disk space for final/ and the checkpoints, each of which holds the weights and AdamW's two averages
    in fp32. A new checkpoint is written before the oldest is deleted."""
    checkpoints = config.keep_checkpoints + 1 if config.save_every else 1
    final_bytes = DTYPES.get(config.save_dtype, model.source_dtype).itemsize
    return parameter_count(model.config) * (final_bytes + 12 * checkpoints)


def evaluation_due(config: Config, step: int, total_steps: int) -> bool:
    """Whether to evaluate after `step` steps."""
    every = config.eval_every > 0 and step % config.eval_every == 0
    return config.evaluates and (every or step in (0, total_steps))


def evaluate(model: Llama, eval_sets: dict[str, Dataset], config: Config, source: Source, step: int,
             total_steps: int, record_sums: Callable | None = None) -> tuple[dict, list[dict]]:
    """Held-out NLL by file and kind, and at both ends of the run exact matches of answers: what rank 0 adds
    to eval.jsonl, and the answers. record_sums(step, eval_sets, sums) gets the NLL sums of each example, as
    spans.sums_by_file() returns them. All ranks call."""
    answers: list[dict] = []
    with autocast(config, model.head_weight.device):
        sums = sums_by_file(model, eval_sets, config.micro_batch_tokens, "evaluating",
                            config.compile is not False)
        if config.eval_generate and step in (0, total_steps) and is_main():
            answers = answer_records(model, source.tokenizer, source.template, config.eval_data,
                                     config.eval_generate, columns=config.columns)
    release(model)
    if record_sums:
        record_sums(step, eval_sets, sums)
    result = {"step": step, "data": {name: summary(sums[name], x.counts) for name, x in eval_sets.items()},
              "contents": {name: x.content for name, x in eval_sets.items()}}
    if answers:
        result.update(exact_match=sum(a["correct"] for a in answers) / len(answers), answers=len(answers))
    if is_main():
        append_line(Path(config.output_dir) / "eval.jsonl", result)
    for name, kinds in result["data"].items():
        values = ", ".join(f"{kind} {value['nll_token_mean']:.4f}" for kind, value in kinds.items())
        say(fit(f"step {step}: {ending(name, 40)}: {values}"))
    return result, answers


def export(model: Llama, config: Config, source: Source, card: str) -> None:
    """Write OUTPUT/final, the checkpoint folder to use, with the template that was trained and the model
    card. All ranks call, rank 0 writes."""
    with new_folder(Path(config.output_dir) / "final") as folder:
        save_model(model, folder, None if config.save_dtype == "source" else DTYPES[config.save_dtype])
        if is_main():
            template = source.template
            write_tokenizer(folder, source.tokenizer, template.source, template.end_of_turn, model.config.raw)
            (folder / "README.md").write_text(card, encoding="utf-8")


# ---------------------------------------------------------------- the run


def main(argv: list[str], record_sums: Callable | None = None) -> int:
    """Train; returns the exit status: 0, or 128 + signal number if one asked for a stop. record_sums: as in
    evaluate(), for programs that want more of an evaluation than eval.jsonl holds."""
    config = parse_args(argv)
    started = time.monotonic()
    keep_freed_memory()
    sleep_while_crowded()
    if config.deterministic:
        deterministic()
    device, out = join_ranks(config.device), Path(config.output_dir)
    say(describe(config))
    if config.shard and world_size() == 1:
        say("warning: --shard does nothing on one rank")

    # What is cheap to check comes before the data is tokenized.
    source = open_source(config)
    settle(config, source)
    config.micro_batch_tokens = micro_batch_tokens(config, source.model_config, device, world_size())
    identity = run_identity(config, source)
    settings = asdict(config)
    if is_main():
        check_folder(out, identity, settings, source.folder)

    # Data: the examples of each step, and what each of their targets counts, are known from here on.
    train_set, usable, eval_sets = load_data(config, source)
    warn_of_known(train_set, usable, eval_sets)
    weights = config.span_weights
    steps = make_steps(config, train_set, usable, rank(), world_size())
    total_steps = count_steps(config, steps.per_epoch)
    say(describe_data(config, train_set, usable, eval_sets[HELD_OUT] if config.eval_fraction else None, steps,
                      total_steps, source.model_config.max_position_embeddings))
    identity["tokens"] = train_set.content
    must_agree = identity | {"eval_data": [each.content for each in eval_sets.values()],
                             "torch": torch.__version__}
    check_ranks(out, must_agree, resuming=config.resume == "auto" and not config.overwrite)

    # Model: the one to train and, for KL, the one it started as.
    raw_model = prepare_model(config, source.folder, device)
    reference = None
    if config.kl_weight:
        reference = prepare_model(config, source.folder, device).requires_grad_(False)

    # The folder is changed only now, when nothing can be wrong with the input any more.
    start = None
    if is_main():
        room = bytes_to_write(config, raw_model)
        extendable = partial(why_not_extendable, config, steps.per_epoch)
        start = claim(out, identity, settings, source.folder, room, extendable, say)
    start = from_main(start)
    if start.finished:
        say(f"{out}/final was finished before")
        return finish(0)

    optimizer = make_optimizer(raw_model, config)
    lr_factors = [group["lr"] / config.lr for group in optimizer.param_groups]
    step = first_step = load_checkpoint(start.resume, raw_model, optimizer) if start.resume else 0
    with autocast(config, device):
        model = data_parallel(raw_model, device)
    say(f"model: {sum(p.numel() for p in raw_model.parameters()):,} parameters, {world_size()} rank(s), "
        f"{device.type}, {config.dtype}, {torch.get_num_threads()} thread(s) each")
    compiled = "compiled" if raw_model.compiled else "not compiled"
    say(fit(f"attention: {raw_model.attention}; layers {compiled}; micro-batches of up to "
            f"{config.micro_batch_tokens:,} tokens"))

    evaluates_first = evaluation_due(config, first_step, total_steps) or (
        bool(eval_sets) and not start.evaluated)
    tracker = Tracker(config.track if is_main() else "none", out, settings, first_step, evaluates_first)
    if evaluates_first:
        if is_main():   # an evaluation of this step that was interrupted may have left its line
            keep_lines(out / "eval.jsonl", first_step - 1, is_evaluation)
        after, answers = evaluate(raw_model, eval_sets, config, source, first_step, total_steps, record_sums)
        tracker.add("eval", after)

    # The loop. From here on a signal lets the current step end; before, it ends the run, and nothing is lost.
    with StopSignal() as stop:
        progress = Progress(first_step, total_steps)
        say(f"ready to train after {time.monotonic() - started:.1f} s")
        while step < total_steps:
            began = time.monotonic()
            reset_peak(device)
            log_untrained = (step + 1) % config.log_every == 0 or step in (0, total_steps - 1)
            micro_batches, counts = steps[step]
            sums, nll_by_batch = accumulate_gradients(model, reference, train_set, micro_batches, config,
                                                      step, log_untrained)

            # One sum over the ranks, and the only place where the host waits for the device.
            # (torch.tensor() would wait for a copy to the device.)
            sums.add({"stop": torch.full((), float(stop.number), device=device)})
            norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.max_grad_norm)
            totals, [grad_norm] = sums.over_ranks(whole(norm))
            stopping = totals.pop("stop") > 0 and step + 1 < total_steps
            padded = int(totals.pop("padding"))
            check_finite(step + 1, totals, grad_norm, nll_by_batch, train_set, config.lr)

            lr = learning_rate(config, step, total_steps)
            for group, factor in zip(optimizer.param_groups, lr_factors):
                group["lr"] = lr * factor
            optimizer.step()
            if step == first_step:
                # Raises now, rather than at the first save, if this optimizer cannot be saved.
                optimizer_state(raw_model, optimizer)
            # Clear all of the model's gradients, not only the optimizer's: others would add up and count in
            # the clipped norm. Under DDP they are zeroed in place, because they are views of its buckets.
            raw_model.zero_grad(set_to_none=model is raw_model)
            step += 1

            record = step_record(step, step / steps.per_epoch, totals, counts, weights, log_untrained, lr=lr,
                                 grad_norm=grad_norm, padding=padded, seconds=time.monotonic() - began,
                                 peak_memory_mb=peak_memory_mb(device),
                                 peak_reserved_mb=peak_reserved_mb(device),
                                 attention="varlen_attn" if raw_model.varlen else "tiled products")
            if is_main():
                append_line(out / "metrics.jsonl", record)
            tracker.add("metrics", record)
            progress.update(record, line=log_untrained)

            # The last step is always saved, before it is evaluated: whatever fails then, nothing is lost.
            if stopping or step == total_steps or (config.save_every and step % config.save_every == 0):
                save_checkpoint(out, step, raw_model, optimizer, {"identity": identity},
                                config.keep_checkpoints)
            if step == total_steps:
                stop.doing = "finishing the last evaluation and the export"
            if stopping:
                progress.close()
                tracker.close()
                say(f"stopped after step {step} of {total_steps}; the same command resumes from here")
                return finish(128 + (stop.number or signal.SIGTERM))
            if evaluation_due(config, step, total_steps):
                after, answers = evaluate(raw_model, eval_sets, config, source, step, total_steps,
                                          record_sums)
                tracker.add("eval", after)
        progress.close()
        tracker.close()

        # The end: what training has changed, and the folder to use.
        before, after = {}, after if eval_sets else {}
        if eval_sets and is_main():
            evaluations, _ = read_log(out / "eval.jsonl", is_evaluation)
            if evaluations:
                before = evaluations[0]
                print_change(before, after)
            show_answers(answers)
        card = ""
        if is_main():
            card = model_card(config, train_set, steps.first_epoch, KINDS, step, before, after)
        export(raw_model, config, source, card)
        if is_main():
            finish_run(out, identity, step, keep_last=config.save_every > 0)
        say(f"\n{out}:\n  final/ is the trained model, metrics.jsonl has each step; "
            f"{time.monotonic() - started:.0f} s in all")
        return finish(0)


def run(argv: list[str]) -> int:
    """main() with one readable line for what a user can fix, printed by one rank; the others just end."""
    raise_interrupts()
    if world_size() == 1:
        # torchrun sends SIGTERM, too, when another rank has failed: that rank's error is what to read.
        raise_stops()
    try:
        return main(argv)
    except (KeyboardInterrupt, SystemExit) as stop:     # Ctrl-C; SIGTERM or SIGHUP
        if is_main():
            print(INTERRUPTED, file=sys.stderr)
        leave(128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else stop.code)
    except Exception as error:
        report_error(error)
        if world_size() > 1:
            leave(1)
        return 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
