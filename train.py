"""Instruction-tune a Llama-style checkpoint with the loss over the spans you choose.

    python train.py                                                   the embedded default, under a minute
    python train.py --model DIR --train-data FILE --eval-data FILE --loss im --output-dir runs/im
    torchrun --nproc-per-node 2 train.py --model ...                  the same run, on two ranks

Reads top to bottom: configuration, then main(): setup, data, model, optimizer, loop. Two things differ from
the usual way. A step's examples and all its denominators are known before it starts, so neither packing nor
micro-batch size nor the number of ranks changes what a step optimises. And every run reports the loss of each
kind of span, trained or not.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import estimate
from data import (CACHE_DIR, KINDS, TEMPLATES, Batch, Dataset, Tokenizer, check_vocabulary, collate,
                  load_dataset, load_template, plan)
from data import steps_per_epoch as count_steps
from eval.generate import answer_records
from eval.spans import example_sums, summary
from folder import append_line, check_ranks, claim, saved_date
from loss import (NORMALIZE, PRESETS, coefficients, kl_divergence, neftune_noise, nll, span_weights,
                  sums_by_kind, weighted_nll)
from machine import Reserve, keep_freed_memory, peak_memory_mb
from model import activation_bytes, load_model, parameter_count, read_config, resolve_model
from ranks import (first_of_machine, from_all, from_main, is_main, join_ranks, leave, rank, report_error,
                   shows_progress, wait, world_size)
from shard import release, shard, whole

# ---------------------------------------------------------------- configuration


def flag(default: object, help: str, **more: object) -> object:
    make = {"default_factory": default} if callable(default) else {"default": default}
    return field(**make, metadata={"help": help, **more})


@dataclass
class Config:
    """Every flag of the command line, once: --max-length is max_length here."""
    # model and data
    model: str = flag("", "checkpoint folder or hub id (owner/name[@revision]); none: the embedded default")
    train_data: list[str] = flag(list, "records to train on: .jsonl, .json or .jsonl.gz files",
                                 metavar="FILE")
    eval_data: list[str] = flag(list, "held-out records, each file reported on its own", metavar="FILE")
    template: str = flag("auto",
                         f"chat template: auto (the checkpoint's own), {', '.join(TEMPLATES)} or FILE.jinja")
    date: str = flag("", "YYYY-MM-DD for templates that print the date; default the day the run starts")
    max_length: int = flag(2048, "tokens an example may have")
    overlong: str = flag("truncate", "what to do with longer ones", choices=("truncate", "drop", "error"))
    cache_dir: str = flag(CACHE_DIR, "where tokenised data is kept between runs", metavar="DIR")
    # loss
    loss: str = flag("im", "it: completions; im: instructions too; lm: every token", choices=tuple(PRESETS))
    template_weight: float | None = flag(None, "override the loss's weight of the template's own tokens")
    system_weight: float | None = flag(None, "... of system messages")
    instruction_weight: float | None = flag(None, "... of user and tool messages")
    completion_weight: float | None = flag(None, "... of assistant messages with their end-of-turn tokens")
    normalize: str = flag("token", "what the loss is a mean over, within a step", choices=NORMALIZE)
    neftune_alpha: float = flag(0.0, "noise on the embeddings while training (the paper: 5); 0: none")
    kl_weight: float = flag(0.0,
                            "adds this times KL(model || starting model) on the trained targets; 0: none")
    # optimisation; the paper's values
    epochs: int = flag(2, "passes over the training data")
    max_steps: int = flag(0, "stop the schedule after this many steps; 0: by --epochs")
    batch_size: int = flag(128, "examples a step, over all ranks")
    micro_batch_tokens: int = flag(4096,
                                   "tokens of one forward and backward pass; changes memory and speed only")
    lr: float = flag(2e-5, "peak learning rate")
    schedule: str = flag("linear", "learning rate after warm-up", choices=("linear", "cosine", "constant"))
    warmup_ratio: float = flag(0.03, "part of the steps in which the learning rate rises")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only")
    beta1: float = flag(0.9, "AdamW's")
    beta2: float = flag(0.98, "AdamW's")
    adam_eps: float = flag(1e-6, "AdamW's")
    clip_grad_norm: float = flag(1.0, "largest gradient norm; 0: no clipping")
    seed: int = flag(0, "of the order of examples and of NEFTune's noise")
    # machine
    dtype: str = flag("bf16", "bf16: autocast over fp32 parameters; fp32: everything",
                      choices=("bf16", "fp32"))
    device: str = flag("auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    shard: bool = flag(False, "under torchrun: each rank holds a part of parameters, gradients and averages")
    recompute: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = flag(False, "torch.compile the decoder layers")
    dry_run: int = flag(0, "only say what a run on so many ranks takes: steps, packing, memory",
                        nargs="?", const=world_size(), metavar="RANKS")
    # output
    output_dir: str = flag("", "folder of this run; default runs/MODEL-LOSS", metavar="DIR")
    overwrite: bool = flag(False, "delete what a run left in --output-dir and start anew")
    save_every: int = flag(0, "steps between checkpoints to resume from; 0: only when interrupted")
    keep_checkpoints: int = flag(2, "how many of these to keep")
    save_dtype: str = flag("source", "of final/; source: as the model came",
                           choices=("source", "fp32", "bf16"))
    resume: str = flag("auto",
                       "auto: go on where the same run was interrupted; never; or a checkpoint's folder")
    eval_every: int = flag(0, "steps between evaluations; 0: only before and after")
    eval_generate: int = flag(0,
                              "answer this many held-out prompts before and after, and count exact matches")
    log_every: int = flag(10, "steps between looks at the NLL of spans that are not trained on")


QUICKSTART = Path(__file__).resolve().parent / "quickstart"
# What the embedded default needs other than the paper's values: a small model learns with a high rate.
EMBEDDED = dict(model=str(QUICKSTART / "model"), train_data=[str(QUICKSTART / "train.jsonl")],
                eval_data=[str(QUICKSTART / "test.jsonl")], max_length=512, epochs=8, batch_size=16, lr=1e-3,
                beta2=0.95, schedule="cosine", warmup_ratio=0.1, eval_generate=1000)
# These change where a run's results go, how fast it is or what it shows, but not the weights that come out.
FREE = {"output_dir", "overwrite", "save_every", "keep_checkpoints", "save_dtype", "resume", "eval_every",
        "log_every", "eval_generate", "eval_data", "date", "micro_batch_tokens", "device", "shard",
        "recompute", "compile", "dry_run", "cache_dir"}


def parse_args(argv: list[str]) -> Config:
    """Flags over --config's file over the embedded default (if no model is named)
    over the class's defaults."""
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:
            raise ValueError(f"{message} (python train.py --help lists the flags)")

    parser = Parser(prog="train.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE",
                        help="a run's run_config.json, to repeat it; flags override it")
    for f in dataclasses.fields(Config):
        more = {key: value for key, value in f.metadata.items() if key != "help"}
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        text = f.metadata["help"] + (f" (default {default})" if default not in ("", None, [], False) else "")
        name = "--" + f.name.replace("_", "-")
        if f.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        elif f.type == list[str]:
            parser.add_argument(name, nargs="+", help=text, **more)
        else:
            parser.add_argument(name, type=float if f.type == float | None else f.type, help=text, **more)
    given = vars(parser.parse_args(argv))
    saved = {}
    if file := given.pop("config", None):
        try:
            saved = json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"--config {file}: {error}") from None
        if unknown := set(saved) - {f.name for f in dataclasses.fields(Config)}:
            raise ValueError(f"--config {file}: unknown names {', '.join(sorted(unknown))}")
    given = {**saved, **given}
    name = Path(given.get("model", "")).name
    if not name:
        if "train_data" in given:
            raise ValueError("--train-data is given but no --model: name the checkpoint folder to train")
        answers = {"eval_generate": 0} if given.get("shard") else {}
        name, given = "quickstart", {**EMBEDDED, "overwrite": "output_dir" not in given, **answers, **given}
    config = Config(**given)
    config.output_dir = config.output_dir or str(Path("runs") / f"{name}-{config.loss}")
    validate(config)
    return config


def validate(config: Config) -> None:
    """ValueError that names the flag, its value and what it may be."""
    def need(name: str, fits: bool, limit: str) -> None:
        if not fits:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be {limit}")

    if not config.train_data:
        raise ValueError("--train-data is missing: give one or more files of records")
    for name in ("epochs", "batch_size", "micro_batch_tokens", "keep_checkpoints", "log_every"):
        need(name, getattr(config, name) >= 1, "1 or more")
    for name in ("max_steps", "dry_run", "save_every", "eval_every", "eval_generate", "seed"):
        need(name, getattr(config, name) >= 0, "0 or more")
    for name in ("neftune_alpha", "kl_weight", "weight_decay", "clip_grad_norm"):
        need(name, 0 <= getattr(config, name) < math.inf, "a finite number, 0 or more")
    for name in ("lr", "adam_eps"):
        need(name, 0 < getattr(config, name) < math.inf, "a finite number above 0")
    for name in ("beta1", "beta2", "warmup_ratio"):
        need(name, 0 <= getattr(config, name) < 1, "from 0 to below 1")
    need("compile", not (config.shard and config.compile), "off with --shard")
    need("eval_generate", not (config.shard and config.eval_generate),
         "0 with --shard, since no rank has the whole model; python -m eval.generate answers with final/")
    need("max_length", config.max_length >= 2, "2 or more")
    need("device", config.device != "cuda" or torch.cuda.is_available(),
         "cpu here: PyTorch finds no CUDA device")
    span_weights(config.loss, config.template_weight, config.system_weight, config.instruction_weight,
                 config.completion_weight)


# ---------------------------------------------------------------- functions with an invariant


def learning_rate(config: Config, step: int, total: int) -> float:
    """Of the step with index `step` out of `total`; above 0 from the first to the last."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    left = (total - step) / (total - warmup)    # 1 at the peak, one step's worth at the end
    factor = {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)),
              "constant": 1.0}[config.schedule]
    return config.lr * factor


def make_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.adam_eps,
                             fused=True)


def settle_buckets(model: DistributedDataParallel, device: torch.device) -> None:
    """Of a process's gradients DDP adds up the first in buckets of its own order, later ones in the order in
    which the first became ready; and the order decides how sums over three ranks and more are rounded. So let
    a pass of two tokens, with loss 0, come first: then a resumed run adds up as one that was not interrupted.
    A second one makes the gradients views of those buckets, where micro-batches add theirs up in place."""
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    for _ in range(2):
        hidden = model(ids, torch.arange(2, device=device), torch.tensor([0, 2], dtype=torch.int32))
        loss, _ = weighted_nll(hidden, model.module.head_weight, ids, torch.zeros(2, device=device))
        loss.backward()
        model.zero_grad(set_to_none=False)


class Signals:
    """SIGTERM and Ctrl-C ask for a stop; the loop looks between steps,
    so the step in hand is finished and saved."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number: int, _: object) -> None:
        # torchrun's TERM may follow another rank's error
        if not self.number and "WORLD_SIZE" not in os.environ:
            say(f"{signal.Signals(number).name}: finishing this step, then saving a checkpoint")
        self.number = self.number or number


def say(text: str = "") -> None:
    """Print on rank 0, above the progress bar."""
    if is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def blame(seen: list[tuple[Batch, torch.Tensor]], dataset: Dataset) -> str:
    """Which records have a target whose NLL is not finite;
    seen: this rank's micro-batches with their rows' NLL."""
    places: list[str] = []
    for batch, values in seen:
        bad = batch.documents[batch.rows][~values.isfinite()].unique().tolist()
        places += [dataset.where(batch.examples[document]) for document in bad]
    places = sorted(sum(from_all(places), []))
    if not places:
        return "Every record's loss is finite, so the gradient overflowed: lower --lr, or try --dtype fp32."
    more = f" and {len(places) - 8} more" if len(places) > 8 else ""
    return f"Its loss is not finite for {', '.join(places[:8])}{more}."


def describe(config: Config) -> str:
    text = " ".join(f"{f.name}={getattr(config, f.name)}".replace(" ", "\0")
                    for f in dataclasses.fields(config) if getattr(config, f.name) not in ("", None, []))
    wrapped = textwrap.fill(text, 79, initial_indent="  ", subsequent_indent="  ", break_long_words=False,
                            break_on_hyphens=False)
    return "configuration\n" + wrapped.replace("\0", " ")


def print_change(before: dict, after: dict) -> None:
    """The table at the end: held-out NLL of each kind of span before and after."""
    say(f"\nheld-out NLL, nats a token, at step {before['step']} and step {after['step']}")
    say(f"{'data':<13}{'span':<12}{'tokens':>9}{'before':>12}{'after':>9}{'change':>9}")
    for name, kinds in after["data"].items():
        for kind, now in kinds.items():
            then = before["data"].get(name, {}).get(kind, now)["nll_token_mean"]
            say(f"{name[:12]:<13}{kind:<12}{now['tokens']:>9,}{then:>12.4f}{now['nll_token_mean']:>9.4f}"
                f"{now['nll_token_mean'] - then:>+9.4f}")
    if "exact_match" in after:
        match, count = after["exact_match"], after["answers"]
        say(f"\nexact match on {count} held-out answers: {before.get('exact_match', 0):.1%} before, "
            f"{match:.1%} after")


def show_answers(answers: list[dict]) -> None:
    """Two prompts with their answers: of a right and a wrong answer one each, if there are both."""
    chosen = [next((a for a in answers if a["correct"] is right), None) for right in (True, False)]
    for answer in [a for a in chosen if a] or answers[:2]:
        for name in ("prompt", "expected", "output"):
            text = answer[name] if len(answer[name]) < 600 else (
                answer[name][:300] + " [...] " + answer[name][-300:])
            say(textwrap.fill(f"{name + ':':<10}{text}", 79, subsequent_indent=" " * 10,
                              initial_indent="\n" if name == "prompt" else ""))


# ---------------------------------------------------------------- the run


def main(argv: list[str]) -> int:
    """Train; returns the exit status: 0, or 128 + signal number if one asked for a stop."""
    config = parse_args(argv)
    started = time.monotonic()
    keep_freed_memory()
    device, sharded = join_ranks(config.device), config.shard and world_size() > 1
    use_cuda = device.type == "cuda"

    def finish(status: int) -> int:
        """End all ranks together."""
        wait()
        if world_size() > 1:
            leave(status)
        return status

    compute = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bf16")
    say(describe(config))
    if config.shard and not sharded:
        say("warning: --shard does nothing on one rank")

    # -- data: one process of each machine tokenises, the others read what it wrote
    folder = resolve_model(config.model)
    model_config = read_config(folder)
    tokens = min(config.micro_batch_tokens, config.batch_size * config.max_length)
    averages = 8 * parameter_count(model_config) // (world_size() if sharded else 1)      # AdamW's, bytes
    reserve = Reserve(0 if use_cuda or config.dry_run else averages
                      + activation_bytes(model_config, tokens, compute, config.recompute))
    tokenizer = Tokenizer(folder)
    out = Path(config.output_dir)
    config.date = from_main(config.date or saved_date(out, config.resume == "never" or config.overwrite)
                            or date.today().isoformat())
    template = load_template(config.template, tokenizer, config.date)
    config.date = template.date

    def load(files: list[str]) -> Dataset:
        return load_dataset(files, tokenizer, template, config.max_length, config.overlong, config.cache_dir,
                            progress=shows_progress())

    with first_of_machine():
        train_set, eval_sets = load(config.train_data), [load([file]) for file in config.eval_data]
    check_vocabulary(model_config.vocab_size, tokenizer, template, [train_set, *eval_sets])
    names = [Path(file).name.split(".")[0] for file in config.eval_data]
    names = [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]

    weights = span_weights(config.loss, config.template_weight, config.system_weight,
                           config.instruction_weight, config.completion_weight)
    usable = train_set.trainable(weights)       # (examples,) indices into train_set
    if not len(usable):
        raise ValueError(f"no example has anything to train on under --loss {config.loss} with --template "
                         f"{config.template}: every target's span has weight 0")
    lengths = train_set.lengths[usable]
    if (longest := int(lengths.max())) > config.micro_batch_tokens:
        raise ValueError(f"--micro-batch-tokens {config.micro_batch_tokens}: an example has {longest} "
                         "tokens; raise it, or lower --max-length")
    per_epoch = count_steps(len(usable), config.batch_size)
    total_steps = config.max_steps or config.epochs * per_epoch
    report = train_set.report
    say(f"data: {len(usable):,} examples, {int(lengths.sum()):,} tokens; {total_steps:,} steps, "
        f"{per_epoch:,} an epoch\n  of {report['records']:,} records {report['truncated']:,} were truncated, "
        f"{report['dropped_overlong']:,} dropped as too long, {report['dropped_empty']:,} as empty,\n  "
        f"{len(train_set) - len(usable):,} left out with nothing to train on under --loss {config.loss}")

    if config.dry_run:
        say(estimate.forecast(config, folder, compute, use_cuda, lengths, train_set.counts[usable],
                              weights != 0))
        return finish(0)

    identity = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    identity.update(model=checkpoint.model_fingerprint(folder), train_data=train_set.key,
                    template=template.source)
    check_ranks(out, {**identity, "eval_data": [each.key for each in eval_sets], "torch": torch.__version__},
                going_on=config.resume == "auto" and not config.overwrite)

    # -- model
    divide = partial(shard, device=device, dtype=compute) if sharded else None
    raw_model = load_model(folder, device, divide)
    raw_model.recompute = config.recompute
    reference = load_model(folder, device, divide).requires_grad_(False) if config.kl_weight else None
    for each in filter(None, (raw_model, reference)):
        if warning := each.choose_attention(compute):
            say(f"warning: {warning}")

    # -- the folder, and where to go on; only now that all that can be wrong with the input was found
    begin = from_main(claim(out, identity, dataclasses.asdict(config), config.resume, config.overwrite,
                            folder, say) if is_main() else None)
    if begin.finished:
        say(f"{out}/final was finished before")
        return finish(0)

    # -- optimizer
    reserve.release()   # to averages and DDP's buckets
    optimizer = make_optimizer(raw_model, config)
    first_step = checkpoint.load_checkpoint(begin.resume, raw_model, optimizer) if begin.resume else 0
    if config.compile:
        for layer in raw_model.model.layers:
            layer.compile(dynamic=True)
    model, wait_to_sync = raw_model, contextlib.nullcontext
    if world_size() > 1 and not sharded:
        model = DistributedDataParallel(raw_model, device_ids=[device] if use_cuda else None,
                                        gradient_as_bucket_view=True)
        wait_to_sync = model.no_sync    # a sharded model would have to keep whole gradients meanwhile
        with autocast:
            settle_buckets(model, device)
    say(f"model: {sum(p.numel() for p in raw_model.parameters()):,} parameters, {world_size()} rank(s), "
        f"{device.type}, {config.dtype}, {torch.get_num_threads()} thread(s) each")

    def evaluate(step: int, answers_too: bool) -> tuple[dict, list[dict]]:
        """Held-out NLL by file and kind, and exact matches; rank 0 writes them to eval.jsonl."""
        result: dict = {"step": step, "data": {}}
        answers: list[dict] = []
        with autocast:
            for name, dataset in zip(names, eval_sets):
                capacity = max(config.micro_batch_tokens, int(dataset.lengths.max()))
                rows = partial(tqdm, desc=f"evaluating on {name}", leave=False,
                               disable=not shows_progress())
                sums = example_sums(raw_model, dataset, capacity, device, rank(), world_size(), rows)
                result["data"][name] = summary(sums, dataset.counts)
            if answers_too and is_main():
                answers = answer_records(raw_model, tokenizer, template, config.eval_data,
                                         config.eval_generate)
        release(raw_model)
        if answers:
            result.update(exact_match=sum(a["correct"] for a in answers) / len(answers), answers=len(answers))
        if is_main():
            append_line(out / "eval.jsonl", result)
            for name, kinds in result["data"].items():
                say(f"step {step}: {name}: " + ", ".join(f"{kind} {value['nll_token_mean']:.4f}"
                                                         for kind, value in kinds.items()))
        return result, answers

    with_answers = bool(config.eval_generate and config.eval_data)
    if eval_sets and first_step == 0:
        evaluate(0, with_answers)

    # -- the loop
    stop = Signals()
    epoch_plan: list = []
    say(f"ready to train after {time.monotonic() - started:.1f} s")
    terminal = shows_progress()     # a bar there, lines in a log file
    bar = tqdm(total=total_steps, initial=first_step, disable=not terminal, unit="step", dynamic_ncols=True)
    step = first_step
    while step < total_steps:
        began = time.monotonic()
        epoch, index = divmod(step, per_epoch)
        if index == 0 or not epoch_plan:
            epoch_plan = plan(lengths, config.seed, epoch, config.batch_size, config.micro_batch_tokens,
                              world_size())
        micro_batches = epoch_plan[index]                       # [rank][micro-batch] -> indices into `usable`
        counts = train_set.counts[usable[np.concatenate([m for r in micro_batches for m in r])]]
        table = coefficients(counts, weights, config.normalize)  # (examples of the step, K)
        tables = np.split(table, np.cumsum([len(m) for r in micro_batches for m in r])[:-1])
        tables = tables[rank() * len(micro_batches[0]):]        # this rank's come first now
        look = ((step + 1) % config.log_every == 0 or step == 0
                or step + 1 == total_steps)                     # at untrained spans too

        # What the ranks add up: loss, KL, whether to stop, NLL by kind.
        objective, divergence = torch.zeros((), device=device), torch.zeros((), device=device)
        sums = torch.zeros(len(KINDS), dtype=torch.float64, device=device)
        seen: list[tuple[Batch, torch.Tensor]] = []
        for i, examples in enumerate(micro_batches[rank()]):
            batch = collate(train_set, usable[examples], tables[i])
            rest = (batch.coefficients == 0).nonzero().squeeze(1)   # before the device has it: no waiting
            batch, rest = batch.to(device), rest.to(device)
            noise = None
            if config.neftune_alpha:
                noise = neftune_noise(batch, model_config.hidden_size, config.neftune_alpha, config.seed,
                                      step)
            last = i + 1 == len(micro_batches[rank()])
            with contextlib.nullcontext() if last else wait_to_sync():
                with autocast:
                    hidden = model(batch.ids, batch.positions, batch.cu_seqlens, noise)     # (N, C)
                    rows = batch.rows
                    loss, values = weighted_nll(hidden[rows], raw_model.head_weight, batch.targets[rows],
                                                batch.coefficients[rows])
                    sums += sums_by_kind(values, batch.kinds[rows])
                    seen.append((batch, values))
                    objective += loss.detach()
                    if reference is not None:
                        with torch.no_grad():
                            start = reference(batch.ids, batch.positions, batch.cu_seqlens, noise)
                        kl = kl_divergence(hidden[rows], raw_model.head_weight, start[rows],
                                           reference.head_weight, batch.coefficients[rows])
                        divergence += kl.detach()
                        loss = loss + config.kl_weight * kl
                    if look:  # the spans that carry no weight: no gradient
                        values = nll(hidden.detach()[rest], raw_model.head_weight, batch.targets[rest])
                        sums += sums_by_kind(values, batch.kinds[rest])
                (loss * world_size()).backward()  # gradients are averaged over ranks, the loss is their sum

        # -- the one place where the host waits for the device
        stats = torch.cat([torch.stack([objective, divergence]).double(), sums,
                           torch.tensor([float(stop.number)], dtype=torch.float64, device=device)])
        if world_size() > 1:
            dist.all_reduce(stats)
        release(reference)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.clip_grad_norm or math.inf)
        *values, grad_norm = torch.cat([stats, whole(norm).double()[None]]).tolist()
        loss_value, kl_value, nll_sums, signals = values[0], values[1], values[2:-1], values[-1]
        if not (math.isfinite(loss_value) and math.isfinite(grad_norm) and math.isfinite(kl_value)):
            raise ValueError(f"step {step + 1}: loss {loss_value}, gradient norm {grad_norm}: the run stops "
                             "before this step changes the weights. " + blame(seen, train_set))
        lr = learning_rate(config, step, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        # DDP's gradients stay views of its buckets: new ones, made under no_sync(), would be beside them.
        optimizer.zero_grad(set_to_none=model is raw_model)
        step += 1

        # -- what came of it
        of_kind = counts.sum(0)
        seconds = time.monotonic() - began
        tokens = int(of_kind.sum())
        record = {"step": step, "epoch": step / per_epoch, "loss": loss_value, "lr": lr,
                  "grad_norm": grad_norm}
        for kind in ("completion", "instruction", "system", "template"):
            k = KINDS.index(kind)
            known = of_kind[k] > 0 and (look or weights[k] != 0)
            record[f"nll_{kind}"] = nll_sums[k] / int(of_kind[k]) if known else None
        if reference is not None:
            record["kl"] = kl_value
        record.update(tokens=tokens, trained_tokens=int(of_kind[weights != 0].sum()), padding_tokens=0,
                      tokens_per_second=tokens / seconds, peak_memory_mb=peak_memory_mb(device),
                      seconds=seconds)
        if is_main():
            append_line(out / "metrics.jsonl", record)
        bar.update()
        shown = [f"{name} {record[key]:.3f}" for name, key in (
            ("loss", "loss"), ("completion", "nll_completion"), ("instruction", "nll_instruction"))
            if record[key] is not None]
        bar.set_postfix_str(" ".join(shown) + f" {record['tokens_per_second']:,.0f} tok/s")
        if look and not terminal:
            say(f"step {step}/{total_steps}: {', '.join(shown)}, {record['tokens_per_second']:,.0f} tokens/s")
        if config.eval_every and step % config.eval_every == 0 and step < total_steps and eval_sets:
            evaluate(step, answers_too=False)
        interrupted = signals > 0 and step < total_steps
        if interrupted or (config.save_every and step % config.save_every == 0 and step < total_steps):
            checkpoint.save_checkpoint(out, step, raw_model, optimizer, {"identity": identity},
                                       config.keep_checkpoints)
        if interrupted:
            bar.close()
            say(f"stopped after step {step} of {total_steps}; the same command goes on from here")
            return finish(128 + (stop.number or signal.SIGTERM))
    bar.close()

    # -- the end
    if eval_sets:
        after, answers = evaluate(step, with_answers)
        if is_main():
            before = json.loads((out / "eval.jsonl").read_text().splitlines()[0])
            print_change(before, after)
            show_answers(answers)
    checkpoint.export(out, raw_model, tokenizer, template, config.save_dtype)
    if is_main():
        say(f"\n{out}/final holds the trained model, {out}/metrics.jsonl each step; "
            f"{time.monotonic() - started:.0f} s in all")
    return finish(0)


def run(argv: list[str]) -> int:
    """main() with one readable line for what a user can mend, printed by one rank; the others just end."""
    try:
        return main(argv)
    except Exception as error:
        report_error(error)
        if dist.is_initialized():
            leave(1)
        return 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
