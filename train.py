"""Instruction-tune a Llama-style checkpoint with the loss over the spans you choose.

    python train.py                                                   the embedded default, under a minute
    python train.py --model DIR --train-data FILE --eval-data FILE --loss im --output-dir runs/im
    torchrun --nproc-per-node 2 train.py --model ...                  the same run, on two ranks

Reads top to bottom: configuration, then main(): setup, data, model, optimizer, loop. Two things differ from
the usual way. A step's examples and all its denominators are known before it starts, so neither packing nor
micro-batch size nor the number of ranks changes what a step optimises. And every run reports the loss of each
kind of span, trained or not.
"""
import sys

INTERRUPTED = "error: interrupted before training began; nothing is lost"
if __name__ == "__main__":  # Ctrl-C while PyTorch is being imported: one line too
    sys.excepthook = lambda kind, error, trace: (
        print(INTERRUPTED, file=sys.stderr) if kind is KeyboardInterrupt
        else sys.__excepthook__(kind, error, trace))

import contextlib
import dataclasses
import json
import math
import os
import signal
import textwrap
import time
from dataclasses import dataclass
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
from data import (CACHE_DIR, COMPLETION, KINDS, TEMPLATES, Batch, Dataset, Tokenizer, cache_parts,
                  check_vocabulary, collate, load_dataset, load_template, plan, steps_per_epoch)
from eval.generate import answer_records
from eval.spans import example_sums, summary
from flags import flag, flag_name, given_flags
from folder import (LENGTH, append_line, check_folder, check_ranks, claim, finish_run, keep_lines,
                    saved_date)
from loss import (NORMALIZE, PRESETS, coefficients, kl_divergence, neftune_noise, nll, span_weights,
                  sums_by_kind, weighted_nll)
from machine import Reserve, keep_freed_memory, peak_memory_mb
from model import (DTYPES, activation_bytes, load_model, parameter_count, read_config, resolve_model,
                   stored_weights)
from ranks import (first_of_machine, from_all, from_main, is_main, join_ranks, leave, rank, report_error,
                   shows_progress, wait, world_size)
from shard import release, shard, whole

# ---------------------------------------------------------------- configuration


@dataclass
class Config:
    """Every flag of the command line, once: --max-length is max_length here. free: may change on resume."""
    # model and data
    model: str = flag("", "checkpoint folder or hub id (owner/name[@revision]); none: the embedded default")
    train_data: list[str] = flag(list, "records to train on: .jsonl, .json or .jsonl.gz files",
                                 metavar="FILE")
    eval_data: list[str] = flag(list, "held-out records, each file reported on its own", metavar="FILE",
                                free=True)
    template: str = flag("auto",
                         f"chat template: auto (the checkpoint's own), {', '.join(TEMPLATES)} or FILE.jinja")
    date: str = flag("", "YYYY-MM-DD for templates that print the date; default the day the run starts",
                     free=True)
    max_length: int = flag(2048, "tokens an example may have", least=2)
    overlong: str = flag("truncate", "what to do with longer ones", choices=("truncate", "drop", "error"))
    require_completion: bool = flag(True, "leave out examples without a completion to train, as where "
                                    "--max-length cuts it off, so that every --loss has the same examples")
    cache_dir: str = flag(CACHE_DIR, "where tokenised data is kept between runs", metavar="DIR", free=True)
    # loss
    loss: str = flag("im", "it: completions; im: instructions too; lm: every token", choices=tuple(PRESETS))
    template_weight: float | None = flag(None, "override the loss's weight of the template's own tokens",
                                         least=0)
    system_weight: float | None = flag(None, "... of system messages", least=0)
    instruction_weight: float | None = flag(None, "... of user and tool messages", least=0)
    completion_weight: float | None = flag(None, "... of assistant messages with their end-of-turn tokens",
                                           least=0)
    normalize: str = flag("token", "what the loss is a mean over, within a step", choices=NORMALIZE)
    neftune_alpha: float = flag(0.0, "noise on the embeddings while training (the paper: 5); 0: none",
                                least=0, below=1e6)
    kl_weight: float = flag(0.0, "adds this times KL(model || starting model) on the trained targets; 0: "
                            "none", least=0)
    # optimisation; the paper's values
    epochs: int = flag(2, "passes over the training data", least=1)
    max_steps: int = flag(0, "stop the schedule after this many steps; 0: by --epochs", least=0)
    batch_size: int = flag(128, "examples a step, over all ranks", least=1)
    micro_batch_tokens: int = flag(4096, "tokens of one forward and backward pass; changes memory and speed "
                                   "only", least=1, free=True)
    lr: float = flag(2e-5, "peak learning rate", above=0)
    schedule: str = flag("linear", "learning rate after warm-up", choices=("linear", "cosine", "constant"))
    warmup_ratio: float = flag(0.03, "part of the steps in which the learning rate rises", least=0, below=1)
    weight_decay: float = flag(0.0, "AdamW's, on matrices only", least=0)
    beta1: float = flag(0.9, "AdamW's", least=0, below=1)
    beta2: float = flag(0.98, "AdamW's", least=0, below=1)
    adam_eps: float = flag(1e-6, "AdamW's", above=0)
    clip_grad_norm: float = flag(1.0, "largest gradient norm; 0: no clipping", least=0)
    seed: int = flag(0, "of the order of examples and of NEFTune's noise", least=0)
    # machine
    dtype: str = flag("bf16", "bf16: autocast over fp32 parameters; fp32: everything",
                      choices=("bf16", "fp32"))
    device: str = flag("auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"), free=True)
    shard: bool = flag(False, "under torchrun: each rank holds a part of parameters, gradients and averages",
                       free=True)
    recompute: bool = flag(False, "recompute activations in the backward pass: less memory, more time",
                           free=True)
    compile: bool = flag(False, "torch.compile the decoder layers", free=True)
    dry_run: int = flag(0, "only say what a run on so many ranks takes: steps, packing, memory", least=0,
                        free=True, in_file=False, nargs="?", const=world_size(), metavar="RANKS")
    # output
    output_dir: str = flag("", "folder of this run; default runs/MODEL-LOSS", metavar="DIR", free=True)
    overwrite: bool = flag(False, "delete what a run left in --output-dir and start from scratch", free=True,
                           in_file=False)
    save_every: int = flag(0, "steps between checkpoints to resume from; 0: when interrupted, and while the "
                           "last evaluation and the export run", least=0, free=True)
    keep_checkpoints: int = flag(2, "how many of these to keep", least=1, free=True)
    save_dtype: str = flag("source", "of final/; source: as the model came",
                           choices=("source", "fp32", "bf16"), free=True)
    resume: str = flag("auto", "auto: resume where the same run was interrupted; never; or the folder of a "
                       "checkpoint to start from", free=True, in_file=False)
    eval_every: int = flag(0, "steps between evaluations; 0: only before and after", least=0, free=True)
    eval_generate: int = flag(0, "answer this many held-out prompts before and after, and count exact "
                              "matches", least=0, free=True)
    log_every: int = flag(10, "steps between looks at the NLL of spans that are not trained on", least=1,
                          free=True)


QUICKSTART = Path(__file__).resolve().parent / "quickstart"
# What the embedded default needs other than the paper's values: a small model learns with a high rate.
EMBEDDED = dict(model=str(QUICKSTART / "model"), train_data=[str(QUICKSTART / "train.jsonl")],
                eval_data=[str(QUICKSTART / "test.jsonl")], max_length=512, epochs=8, batch_size=16, lr=1e-3,
                beta2=0.95, schedule="cosine", warmup_ratio=0.1, eval_generate=1000)


def parse_args(argv: list[str]) -> Config:
    """Flags over --config's file over the embedded default (if no model is named)
    over the class's defaults."""
    given = given_flags(Config, argv, "train.py", __doc__.split("\n\n")[0])
    embedded = "model" not in given
    if embedded:
        if "train_data" in given:
            raise ValueError("--train-data is given but no --model: name the checkpoint folder to train")
        answers = {"eval_generate": 0} if given.get("shard") else {}
        given = EMBEDDED | answers | given
    config = Config(**given)
    if not config.output_dir:
        name = "quickstart" if embedded else Path(config.model).resolve().name or "model"
        config.output_dir = str(Path("runs") / f"{name}-{config.loss}")
        # The quick start may be repeated as often as one likes; an interrupted one is resumed.
        if embedded and (Path(config.output_dir) / "final").is_dir():
            config.overwrite = given.get("overwrite", True)
    validate(config)
    return config


def validate(config: Config) -> None:
    """What one flag alone does not tell: ValueError that names the flags and the fix."""
    def need(name: str, fits: bool, limit: str) -> None:
        if not fits:
            raise ValueError(f"{flag_name(name)} {getattr(config, name)}: must be {limit}")

    if not config.train_data:
        raise ValueError("--train-data is missing: give one or more files of records")
    if len({Path(file).resolve() for file in config.eval_data}) < len(config.eval_data):
        raise ValueError(f"--eval-data {' '.join(config.eval_data)}: a file is given twice; give each once")
    need("eval_every", not config.eval_every or bool(config.eval_data), "0 without --eval-data")
    need("eval_generate", not config.eval_generate or bool(config.eval_data), "0 without --eval-data")
    need("compile", not (config.shard and config.compile), "off with --shard")
    need("eval_generate", not (config.shard and config.eval_generate),
         "0 with --shard, since no rank has the whole model; python -m eval.generate answers with final/")
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


def count_steps(config: Config, per_epoch: int) -> int:
    """Steps of the whole run."""
    return config.max_steps or config.epochs * per_epoch


def other_length(config: Config, per_epoch: int, identity: dict, steps: int) -> str:
    """Why this run cannot resume one of another length after `steps` steps, and end as if it had been this
    one from the start; "" if it can. identity: the other run's."""
    other = dataclasses.replace(config, **{name: identity[name] for name in LENGTH})
    total, others = count_steps(config, per_epoch), count_steps(other, per_epoch)
    if steps > total:
        return f"{steps} steps are trained, and this run would have only {total}"
    if any(learning_rate(config, step, total) != learning_rate(other, step, others) for step in range(steps)):
        return (f"the {steps} steps that are trained would have had other learning rates; only a run with "
                "--schedule constant and as many warm-up steps can be extended")
    return ""


def make_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.adam_eps,
                             fused=True)


def settle_buckets(model: DistributedDataParallel, device: torch.device) -> None:
    """DDP rebuilds its buckets after a process's first backward pass. With three or more ranks the order of
    the buckets affects rounding. A pass over two tokens with loss 0 fixes the order before the first step, so
    a resumed run matches an uninterrupted one bit for bit. The second pass makes the gradients views of the
    final buckets, so that no_sync() accumulates in place."""
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
        self.number, self.doing = 0, "finishing this step, then saving"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number: int, _: object) -> None:
        # torchrun's TERM may follow another rank's error
        if not self.number and "WORLD_SIZE" not in os.environ:
            say(f"{signal.Signals(number).name}: {self.doing}")
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
        return ("Every record's loss is finite, so something else overflowed: lower --lr, --kl-weight and "
                "the weights of spans, or try --dtype fp32.")
    more = f" and {len(places) - 8} more" if len(places) > 8 else ""
    return f"Its loss is not finite for {', '.join(places[:8])}{more}."


def say_what_differs(config: Config, train_set: Dataset, incomplete: int, positions: int | None) -> None:
    """Where a run is not what its flags suggest: examples without a completion, files given twice, examples
    longer than the model has seen. incomplete: examples without a completion to train."""
    if incomplete and config.require_completion:
        say(f"  {incomplete:,} of these have no completion (cut off at --max-length, or of weight 0): left "
            "out under every\n  --loss, so that losses compare on the same examples; "
            "--no-require-completion keeps them")
    elif incomplete:
        say(f"warning: {incomplete:,} examples have no completion; --loss im and lm train on them, it does "
            "not:\n  losses compared with --no-require-completion have other examples and other steps")
    if twice := len(config.train_data) - len({Path(file).resolve() for file in config.train_data}):
        say(f"warning: --train-data names {twice} file(s) more than once; their records count as often")
    if positions and config.max_length > positions:
        longer = int((train_set.lengths > positions).sum())
        say(f"warning: --max-length {config.max_length} is more than the model's max_position_embeddings, "
            f"{positions};\n  {longer:,} examples are longer than that")


def describe(config: Config) -> str:
    text = " ".join(f"{f.name}={getattr(config, f.name)}".replace(" ", "\0")
                    for f in dataclasses.fields(config) if getattr(config, f.name) not in ("", None, []))
    wrapped = textwrap.fill(text, 79, initial_indent="  ", subsequent_indent="  ", break_long_words=False,
                            break_on_hyphens=False)
    return "configuration\n" + wrapped.replace("\0", " ")


def print_change(before: dict, after: dict) -> None:
    """The table at the end: held-out NLL of each kind of span in two evaluations, lines of eval.jsonl; "-"
    where the first did not have the same records."""
    say(f"\nheld-out NLL, nats a token, at step {before['step']} and step {after['step']}")
    say(f"{'data':<13}{'span':<12}{'tokens':>9}{'before':>12}{'after':>9}{'change':>9}")
    measured = {before["contents"][name]: kinds for name, kinds in before["data"].items()}
    for name, kinds in after["data"].items():
        for kind, now in kinds.items():
            then = measured.get(after["contents"][name], {}).get(kind, {}).get("nll_token_mean")
            value = now["nll_token_mean"]
            old, change = ("-", "-") if then is None else (f"{then:.4f}", f"{value - then:+.4f}")
            say(f"{name[-12:]:<13}{kind:<12}{now['tokens']:>9,}{old:>12}{value:>9.4f}{change:>9}")
    if "exact_match" in after:
        same = before["contents"] == after["contents"] and before.get("answers") == after["answers"]
        say(f"\nexact match on {after['answers']} held-out answers: "
            + (f"{before['exact_match']:.1%} before, " if same else "") + f"{after['exact_match']:.1%} after")


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

    # -- what is cheap to check comes before the data is tokenised
    folder, out = resolve_model(config.model), Path(config.output_dir)
    model_config = read_config(folder)
    stored_weights(folder, model_config)
    tokens = min(config.micro_batch_tokens, config.batch_size * config.max_length)
    averages = 8 * parameter_count(model_config) // (world_size() if sharded else 1)      # AdamW's, bytes
    reserve = Reserve(0 if use_cuda or config.dry_run else averages
                      + activation_bytes(model_config, tokens, compute, config.recompute))
    tokenizer = Tokenizer(folder)
    config.date = from_main(config.date or saved_date(out, config.resume == "never" or config.overwrite)
                            or date.today().isoformat())
    template = load_template(config.template, tokenizer, config.date)
    config.date = template.date
    if template.warning:
        say(f"warning: {template.warning}")
    check_vocabulary(model_config.vocab_size, tokenizer, template)
    parts = cache_parts(config.train_data, tokenizer, template, config.max_length, config.overlong)
    identity = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if not f.metadata["free"]}
    identity |= {"model": checkpoint.model_fingerprint(folder), "train_data": parts["data"],
                 "tokenizer": [parts["tokenizer"], parts["special_tokens"]], "template": parts["template"],
                 "date": parts["date"]}
    settings = dataclasses.asdict(config)
    if is_main() and not config.dry_run:
        check_folder(out, identity, settings, folder)

    # -- data: one process of each machine tokenises, the others read what it wrote
    def load(files: list[str]) -> Dataset:
        return load_dataset(files, tokenizer, template, config.max_length, config.overlong, config.cache_dir,
                            progress=shows_progress())

    with first_of_machine():
        train_set, eval_sets = load(config.train_data), [load([file]) for file in config.eval_data]
    check_vocabulary(model_config.vocab_size, tokenizer, datasets=[train_set, *eval_sets])
    names = [Path(file).name.split(".")[0] for file in config.eval_data]
    names = [file if names.count(name) > 1 else name for name, file in zip(names, config.eval_data)]

    weights = span_weights(config.loss, config.template_weight, config.system_weight,
                           config.instruction_weight, config.completion_weight)
    usable = train_set.trainable(weights, config.require_completion)    # (examples,) indices into train_set
    report = train_set.report
    incomplete = int((train_set.counts[:, COMPLETION] == 0).sum())
    if not len(usable):
        raise ValueError(f"no example has anything to train on under --loss {config.loss} with --template "
                         f"{config.template}: " + (
                             f"no completion is left of any (--max-length {config.max_length} cut off "
                             f"{report['truncated']:,}); --no-require-completion trains without"
                             if incomplete == len(train_set) and config.require_completion
                             else "every target's span has weight 0"))
    lengths = train_set.lengths[usable]
    if (longest := int(lengths.max())) > config.micro_batch_tokens:
        raise ValueError(f"--micro-batch-tokens {config.micro_batch_tokens}: an example has {longest} "
                         "tokens; raise it, or lower --max-length")
    per_epoch = steps_per_epoch(len(usable), config.batch_size)
    total_steps = count_steps(config, per_epoch)
    say(f"data: {len(usable):,} examples, {int(lengths.sum()):,} tokens; {total_steps:,} steps, "
        f"{per_epoch:,} an epoch\n  of {report['records']:,} records {report['truncated']:,} were truncated, "
        f"{report['dropped_overlong']:,} dropped as too long, {report['dropped_empty']:,} as empty,\n  "
        f"{len(train_set) - len(usable):,} left out with nothing to train on")
    say_what_differs(config, train_set, incomplete, model_config.max_position_embeddings)

    if config.dry_run:
        say(estimate.forecast(config, folder, compute, use_cuda, lengths, train_set.counts[usable],
                              weights != 0))
        return finish(0)

    identity["tokens"] = train_set.content
    everywhere = {"eval_data": [each.content for each in eval_sets], "torch": torch.__version__}
    check_ranks(out, identity | everywhere, resuming=config.resume == "auto" and not config.overwrite)

    # -- model
    divide = partial(shard, device=device, dtype=compute) if sharded else None
    raw_model = load_model(folder, device, divide)
    raw_model.recompute = config.recompute
    reference = load_model(folder, device, divide).requires_grad_(False) if config.kl_weight else None
    for each in filter(None, (raw_model, reference)):
        if warning := each.choose_attention(compute):
            say(f"warning: {warning}")

    # -- the folder, and where to resume; only now that all that can be wrong with the input was found

    # The bytes of final/ and of the checkpoints, each the weights and AdamW's averages in fp32. A new one is
    # written before the oldest is deleted.
    room = parameter_count(model_config) * (DTYPES.get(config.save_dtype, raw_model.source_dtype).itemsize
                                            + 12 * (config.keep_checkpoints + 1 if config.save_every else 1))
    begin = from_main(claim(out, identity, settings, folder, room, partial(other_length, config, per_epoch),
                            say) if is_main() else None)
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

    def due(step: int) -> bool:
        return bool(eval_sets) and (step in (0, total_steps)
                                    or config.eval_every > 0 and step % config.eval_every == 0)

    def evaluate(step: int) -> tuple[dict, list[dict]]:
        """Held-out NLL by file and kind, at the ends exact matches too; rank 0 writes them to eval.jsonl."""
        result: dict = {"step": step, "data": {},
                        "contents": {name: each.content for name, each in zip(names, eval_sets)}}
        answers: list[dict] = []
        with autocast:
            for name, dataset in zip(names, eval_sets):
                capacity = max(config.micro_batch_tokens, int(dataset.lengths.max()))
                rows = partial(tqdm, desc=f"evaluating on {name}", leave=False,
                               disable=not shows_progress())
                sums = example_sums(raw_model, dataset, capacity, device, rank(), world_size(), rows)
                result["data"][name] = summary(sums, dataset.counts)
            if config.eval_generate and step in (0, total_steps) and is_main():
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

    # Until here, and in the first evaluation, Ctrl-C ends the run at once: nothing would be lost.
    if due(first_step) or (eval_sets and not begin.evaluated):
        if is_main():   # what is there may be of an evaluation that did not come to its end
            keep_lines(out / "eval.jsonl", first_step - 1)
        after, answers = evaluate(first_step)

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
            kl = f", KL {kl_value}" if reference is not None else ""
            raise ValueError(f"step {step + 1}: loss {loss_value}{kl}, gradient norm {grad_norm}: the run "
                             "stops before this step changes the weights. " + blame(seen, train_set))
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
        interrupted = signals > 0 and step < total_steps
        # The last step is always saved, and before it is evaluated: whatever fails then, nothing is lost.
        if interrupted or step == total_steps or (config.save_every and step % config.save_every == 0):
            checkpoint.save_checkpoint(out, step, raw_model, optimizer, {"identity": identity},
                                       config.keep_checkpoints)
        if step == total_steps:
            stop.doing = "finishing the last evaluation and the export"
        if interrupted:
            bar.close()
            say(f"stopped after step {step} of {total_steps}; the same command resumes from here")
            return finish(128 + (stop.number or signal.SIGTERM))
        if due(step):
            after, answers = evaluate(step)
    bar.close()

    # -- the end
    if eval_sets and is_main():
        print_change(json.loads((out / "eval.jsonl").read_text().splitlines()[0]), after)
        show_answers(answers)
    checkpoint.export(out, raw_model, tokenizer, template, config.save_dtype)
    if is_main():
        finish_run(out, identity, step, keep_last=config.save_every > 0)
        say(f"\n{out}/final holds the trained model, {out}/metrics.jsonl each step; "
            f"{time.monotonic() - started:.0f} s in all")
    return finish(0)


def run(argv: list[str]) -> int:
    """main() with one readable line for what a user can mend, printed by one rank; the others just end."""
    try:
        return main(argv)
    except KeyboardInterrupt:
        if is_main():
            print(INTERRUPTED, file=sys.stderr)
        leave(128 + signal.SIGINT)
    except Exception as error:
        report_error(error)
        if dist.is_initialized():
            leave(1)
        return 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
