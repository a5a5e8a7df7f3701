"""Which loss for this data? Runs of train.py over losses, learning rates and seeds, and what they show.

    python -m eval.study --model DIR --train-data F --eval-data near.jsonl far.jsonl --losses it im im:span \\
        --lrs 2e-5 1e-4 --seeds 5 --output-dir STUDY            and any other flags of train.py
    python -m eval.study --from STUDY/runs.jsonl                the verdict again, without any model

A contender is a set of flags that say what is optimized: --losses im:span is `--loss im --normalize span`;
--variants noisy='--loss it --neftune-alpha 5' has any. The first contender is the baseline of all
differences. All train on the same examples, in the same order for the same seed.

The same command resumes, in the middle of a run too (Ctrl-C saves; --save-every is for kills). More losses,
rates or seeds may be added later. --jobs N shares the cores among N processes; on a CPU the number of threads
changes how sums are rounded.

Each contender gets its own learning rate and number of epochs: those with the lowest NLL of completions on
validation data, a mean over tokens and over seeds. What models generate is measured after the last step, with
the chosen learning rate. Differences from the baseline are paired by seed and example; their intervals are
for other seeds and other examples than these (study_statistics.half_width()). docs/study.md has the rest.

    STUDY/runs.jsonl     a line a finished run, with everything that the verdict needs
    STUDY/study.json     the verdict; also printed, and drawn in curves.png and differences.png
    STUDY/data/          the split of the training records
    STUDY/runs/          the runs (study_runs.py)
"""
import dataclasses
import re
import shlex
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# First, so that `python eval/study.py` finds eval/eval.py, which says how it is started.
from eval.flags import Parser, need

from config import EMBEDDED, NORMALIZE, PRESETS, WEIGHT_FLAGS, Config, check_files, local_files, validate
from config import parse_args as parse_flags
from records import naming, read_all
from runtime.files import check_writable, read_json
from runtime.flags import flag, flag_name, given_flags
from runtime.start import answer_flags, fit, world_size

# What a contender may set: what is optimized. The data and the length are the same for all.
OTHER_FLAGS = ("normalize", "neftune_alpha", "kl_weight", "schedule", "warmup_ratio", "weight_decay", "beta1",
               "beta2", "adam_eps", "clip_grad_norm")
CONTENDER_FLAGS = "loss", *WEIGHT_FLAGS, *OTHER_FLAGS


@dataclass
class StudyConfig(Config):
    """The flags of a run, and these."""
    output_dir: str = flag("runs/study", "folder of the study", metavar="DIR", free=True)
    losses: list[str] = flag(list, "contenders: a loss, or LOSS:NORMALIZE, such as im:span (default it im)",
                             metavar="LOSS")
    variants: list[str] = flag(list, "more contenders: NAME='--flag value ...'", metavar="NAME=FLAGS")
    lrs: list[float] = flag(list, "learning rates to choose from (default: --lr)", above=0, below=100,
                            metavar="LR")
    seeds: int = flag(5, "seeds of each: --seed and those after it", least=1, below=1000)
    validation_data: str = flag("", "records to choose learning rate and epoch by", metavar="FILE")
    validation_fraction: float = flag(0.1, "without --validation-data: this part of the training records is "
                                      "held out with --split-seed; 0: no choice, one learning rate and the "
                                      "last epoch", least=0, below=1)
    train_sample: int = flag(256, "training records whose NLL is measured, drawn with --split-seed", least=1)
    memorization: int = flag(64, "training prompts to answer at the end, as eval.memorization does; 0: none",
                             least=0)
    generate: int = flag(0, "prompts of each test file to answer at the end, for exact matches; 0: none",
                         least=0)
    tasks: list[str] = flag(list, "tasks of lm-evaluation-harness at the end", metavar="TASK")
    tasks_flags: str = flag("", "more flags for eval.harness, in one string", metavar="FLAGS")
    jobs: int = flag(1, "runs at the same time, each in its own process with its share of the cores", least=1,
                     free=True)
    deadline: float = flag(0.0, "seconds after which no run is started; 0: none", least=0, free=True)
    keep_weights: bool = flag(False, "keep every run's final/", free=True)


def parse_contenders(config: StudyConfig) -> dict[str, dict]:
    """The contenders' flags by name. ValueError for a loss or flag that does not exist, and for a name or
    flags that are given twice."""
    given_by = []       # (the flag, the contender's name, its flags)
    for name in config.losses or ([] if config.variants else ["it", "im"]):
        loss, colon, normalize = name.partition(":")
        if loss not in PRESETS or colon and normalize not in NORMALIZE:
            raise ValueError(f"--losses {name}: must be one of {', '.join(PRESETS)}, or such a name with "
                             f"{', '.join(f':{each}' for each in NORMALIZE)}")
        given_by.append(("--losses", name, ["--loss", loss, *(["--normalize", normalize] if colon else [])]))
    for text in config.variants:
        name, equals, given = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise ValueError(f"--variants {text}: write NAME='--flag value' with letters, digits and ._+- in "
                             "NAME")
        with naming(f"--variants {text}"):
            given_by.append(("--variants", name, shlex.split(given)))

    def optimized(given: dict) -> list:
        own = dataclasses.replace(config, **given)
        # --loss is a name for weights, so that equal ones may be given in several ways.
        return [own.span_weights.tolist(), *(getattr(own, name) for name in OTHER_FLAGS)]

    contenders: dict[str, dict] = {}
    for flag_, name, argv in given_by:
        if name in contenders:
            raise ValueError(f"{flag_} {name}: is given twice; give each contender its own name")
        with naming(f"contender {name}"):
            given = given_flags(Config, argv, "train.py", "")
            if others := sorted(given.keys() - {*CONTENDER_FLAGS}):
                raise ValueError(f"{', '.join(map(flag_name, others))} must be the same for all contenders; "
                                 f"one may have {', '.join(map(flag_name, CONTENDER_FLAGS))}")
            validate(dataclasses.replace(config, **given))
            if twice := next((other for other, flags in contenders.items()
                              if optimized(flags) == optimized(given)), None):
                raise ValueError(f"trains exactly as contender {twice}; leave one of them out")
        contenders[name] = given
    return contenders


def parse_lrs(config: StudyConfig) -> list[float]:
    """--lrs in rising order, or --lr. ValueError for a rate that is given twice."""
    lrs = config.lrs or [config.lr]
    # Folders are named by the rate as it is shown.
    if len({f"{lr:g}" for lr in lrs}) < len(lrs):
        raise ValueError(f"--lrs {' '.join(map(str, lrs))}: a learning rate is given twice; give each once")
    return sorted(lrs)


def parse_args(argv: list[str]) -> StudyConfig | Namespace:
    """The flags of a study, or those that go with --from."""
    if any(word.partition("=")[0] == "--from" for word in argv):
        parser = Parser("study", __doc__)
        parser.add_argument("--from", required=True, metavar="RUNS.jsonl",
                            help="a study's runs.jsonl")
        parser.add_argument("--baseline", metavar="NAME", help="contender to compare the others with; "
                            "default: it or, where there is none, that of the first line")
        parser.add_argument("--output-dir", metavar="DIR", help="where to write; default: next to the file")
        return parser.parse_args(argv)
    purpose = __doc__.split("\n\n")[0] + " --from RUNS.jsonl gives the verdict again (--from x --help)."
    return parse_flags(argv, StudyConfig, "python -m eval.study", purpose)


def check(config: StudyConfig, lrs: list[float]) -> None:
    """ValueError for flags that do not go together, and for what is missing."""
    if world_size() > 1:
        raise ValueError(f"a study runs on one rank, not {world_size()}: start it without torchrun; --jobs N "
                         "has N processes")
    if not config.eval_data:
        raise ValueError("--eval-data is missing: give the test files on which the losses are compared")
    for name, wrong in (("overwrite", config.overwrite), ("resume", config.resume != "auto"),
                        ("shard", config.shard), ("require_completion", not config.require_completion),
                        ("eval_fraction", config.eval_fraction > 0)):
        if wrong:
            raise ValueError(f"{flag_name(name)}: a study decides this itself; leave the flag out"
                             + (f", or delete {config.output_dir} yourself" if name == "overwrite" else ""))
    if "-" in (*config.train_data, *config.eval_data, config.validation_data):
        raise ValueError("-: a study that is resumed reads the records again; write standard input to a file")
    if config.mix and config.validation_fraction and not config.validation_data:
        raise ValueError(f"--mix {' '.join(config.mix)}: a study holds out records of --train-data only; "
                         "give --validation-data, or --validation-fraction 0")
    check_files(config)

    def files(names: list[str]) -> set[Path]:
        return {Path(file).resolve() for name in names for file in local_files(name) or [name]}

    if config.validation_data and files([config.validation_data]) & files(config.eval_data):
        raise ValueError(f"--validation-data {config.validation_data}: has a file of --eval-data, and test "
                         "data must not choose; give other records")
    if not config.validation_data and not config.validation_fraction and len(lrs) > 1:
        raise ValueError(f"--validation-fraction 0: {len(lrs)} learning rates need validation data to choose "
                         "by; give one rate or a fraction such as 0.1")
    if config.tasks_flags and not config.tasks:
        raise ValueError(f"--tasks-flags {config.tasks_flags}: needs --tasks; give that too")
    if config.tasks:
        need("lm_eval", "--tasks")
    if config.memorization:
        need("sacrebleu", "--memorization above 0")
    read_settings(config)


def read_settings(config: StudyConfig) -> dict:
    """What settings.json says in the study's folder, {} until a run has begun there: before, nothing has to
    stay the same. ValueError if the folder holds something else."""
    out = Path(config.output_dir)
    check_writable("--output-dir", out, folder=True)
    settings = read_json(out / "settings.json")
    if not settings and out.exists() and {path.name for path in out.iterdir()} - {".lock", "data"}:
        raise ValueError(f"--output-dir {out}: is not empty and is not a study's folder; give another")
    if settings and not all(isinstance(settings.get(name), dict) for name in ("identity", "contenders")):
        raise ValueError(f"{out}/settings.json: is not a study's; give another --output-dir, or delete it")
    return settings


def check_early(argv: list[str]) -> None:
    """What can be said about the flags without PyTorch."""
    args = parse_args(argv)
    need("matplotlib", "a study")
    need("scipy", "a study")
    if isinstance(args, StudyConfig):
        parse_contenders(args)
        check(args, parse_lrs(args))
    else:
        check_files(args)


answer_flags(__name__, check_early)

import json
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from itertools import product

import numpy as np
import torch
from tqdm import tqdm

import train
from chat import COMPLETION
from data import hold_out, instruction_hash
from eval import harness
from eval.answers import hash_data
from eval.common import read_objects, run, write_json
from eval.study_report import pictures, report_text
from eval.study_runs import Outcome, Plan, Run, delete_weights, free_memory, run_here, run_in_workers
from eval.study_statistics import TRAINING, VALIDATION, verdict
from runtime.distributed import join_ranks
from runtime.files import write_text
from runtime.foreign import parse_json, read_text
from runtime.folder import append_line, check_identity, lock_folder
from runtime.report import ending, say

FEW = 5     # validation records; fewer are too few to choose by
# What a line of runs.jsonl has, among other things. The starting model is no contender.
LINE = {"contender": str | None, "lr": float, "seed": int, "evaluations": list, "tokens": dict, "end": dict}


def task_flags(config: StudyConfig) -> list[str]:
    """eval.harness's flags, or nothing."""
    return ["--tasks", *config.tasks, *shlex.split(config.tasks_flags)] if config.tasks else []


# ---------------------------------------------------------------- data


def as_line(messages: list[dict]) -> str:
    """A record's messages as a line of JSON, the same for equal messages in whatever layout. It is read as
    these messages again: tools and arguments are written as text, in which null stays."""
    def text(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    def written(call: dict) -> dict:
        function = call["function"]
        return {**call, "function": {**function, "arguments": text(function["arguments"])}}

    messages = [{**message} for message in messages]
    for message in messages:
        if "tools" in message:
            message["tools"] = text(message["tools"])
        if "tool_calls" in message:
            message["tool_calls"] = [written(call) for call in message["tool_calls"]]
    return text({"messages": messages})


def prepare_data(config: StudyConfig) -> tuple[list[str], str, str, dict[str, str]]:
    """The files to train on, of validation and of the sample of training records, and the contents of those
    that do not exist yet: they are written after everything has been checked. ValueError if too few
    records are left."""
    folder, records, groups = Path(config.output_dir) / "data", [], []
    for messages, _, _ in read_all(config.train_data, config.columns):
        records.append(as_line(messages))
        groups.append(instruction_hash(messages))
    train_files, validation, new = config.train_data, config.validation_data, {}
    if config.validation_fraction and not validation:
        chosen = hold_out(np.array(groups, np.uint64), config.validation_fraction, config.split_seed)
        records, held_out = ([r for r, is_held_out in zip(records, chosen) if is_held_out == side]
                             for side in (False, True))
        if len(held_out) < FEW or not records:
            raise ValueError(f"--validation-fraction {config.validation_fraction}: leaves {len(records)} "
                             f"record(s) to train on and {len(held_out)} validation record(s), too few to "
                             f"choose by; give another, so that there are {FEW} or more, or more records")
        train_files, validation = [str(folder / "study-train.jsonl")], str(folder / "study-validation.jsonl")
        new = {train_files[0]: records, validation: held_out}
    if config.max_examples and not config.mix:
        records = records[:config.max_examples]
    order = np.random.default_rng([config.split_seed, 2]).permutation(len(records))
    sample = str(folder / "study-train-sample.jsonl")
    new[sample] = [records[i] for i in order[:max(config.train_sample, config.memorization)]]
    return train_files, validation, sample, {file: "".join(line + "\n" for line in lines)
                                             for file, lines in new.items()}


# ---------------------------------------------------------------- the study's folder


def study_identity(config: StudyConfig, source: train.Source) -> dict:
    """What must be the same to resume a study: all but contenders, rates and seeds."""
    identity = train.run_identity(config, source)
    free = {"lr", "seed", "losses", "variants", "lrs", "seeds"}
    identity = {name: value for name, value in identity.items() if name not in free}
    measures = {f.name: getattr(config, f.name) for f in dataclasses.fields(StudyConfig)
                if f.name not in free and not f.metadata["free"]}
    files = [hash_data(config.validation_data)] if config.validation_data else []
    return json.loads(json.dumps({
        **measures, **identity, "eval_every": config.eval_every, "validation_data": files,
        "eval_data": dict(zip(train.result_names(config.eval_data), map(hash_data, config.eval_data)))}))


def check_study(config: StudyConfig, old: dict, identity: dict, contenders: dict[str, dict]) -> None:
    """ValueError if the study in the folder has other settings. old: read_settings(), not empty."""
    out = Path(config.output_dir)
    fix = "give another --output-dir, or the earlier flags"
    check_identity(out, old["identity"], identity, asdict(config), f"--output-dir {out}", fix)
    for name, flags in contenders.items():
        if (was := old["contenders"].get(name, flags)) != flags:
            raise ValueError(f"--output-dir {out}: contender {name} was {was}, is {flags}; give it another "
                             "name")


def read_runs(file: Path) -> dict[Run, dict]:
    """The lines of runs.jsonl, but for one that a kill has cut off: its run is measured again."""
    lines = {}
    texts = read_text(file, limit=2**30).split("\n")[:-1] if file.is_file() else []
    for number, text in enumerate(texts, 1):
        try:
            line = {**parse_json(text)}
            if missing := LINE.keys() - line.keys():
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}:{number}: not a line of a study ({error}); give another "
                             "--output-dir") from None
        lines[Run(line["contender"], line["lr"], line["seed"])] = line
    return lines


def write_runs(file: Path, lines: dict[Run, dict], grid: list[Run]) -> list[Run]:
    """Rewrite runs.jsonl, the runs of the grid first and in its order. Returns those of them that are
    finished."""
    finished = [each for each in grid if each in lines]
    others = [each for each in lines if each not in grid]
    write_text(file, "".join(json.dumps(lines[each]) + "\n" for each in finished + others))
    return finished


# ---------------------------------------------------------------- how long


def probe(config: train.Config, source: train.Source, dataset: train.Dataset, steps: train.Steps) -> float:
    """Seconds a token of training takes at most: the second of two passes over a micro-batch, whose layers
    are not compiled, since that would take longer than it tells."""
    device, config = join_ranks(config.device), dataclasses.replace(config, compile=False)
    model = train.prepare_model(config, source.folder, device)
    micro_batch = steps[0][0][:1]
    for _ in range(2):
        started = time.monotonic()
        train.accumulate_gradients(model, None, dataset, micro_batch, config, 0)
        if device.type == "cuda":
            torch.cuda.synchronize()
    seconds = (time.monotonic() - started) / dataset.lengths[micro_batch[0][0]].sum()
    del model
    free_memory()
    return seconds


def counted_runs(runs: list[Run]) -> str:
    """'4 run(s) and the starting model'"""
    trained = sum(each.contender is not None for each in runs)
    return f"{trained} run(s)" + " and the starting model" * (trained < len(runs))


def announce(plan: Plan, source: train.Source, dataset: train.Dataset, steps: train.Steps, evaluated: int,
             jobs: int, todo: list[Run], done: int) -> None:
    """Say what is about to be run, and about how long it takes. evaluated: tokens of one evaluation, which
    take a third of those of training, the forward pass; done: runs that are finished."""
    total = train.count_steps(plan.base, steps.per_epoch)
    tokens = int(dataset.lengths[steps.usable].sum() * total / steps.per_epoch)
    evaluated *= sum(train.evaluation_due(plan.base, step, total) for step in range(total + 1))
    seconds = probe(plan.base, source, dataset, steps)
    trained = [each for each in todo if each.contender]
    in_all = timedelta(seconds=round(len(trained) * (tokens + evaluated / 3) * seconds / jobs))
    at_once = f", {jobs} runs at a time" if jobs > 1 else ""
    say(fit(f"{counted_runs(todo)} to do, {done} done: {tokens:,} tokens of training each, about {in_all} in "
            f"all, at {1 / seconds:,.0f} tokens/s{at_once} and not counting what is generated"))
    say(f"logs: {plan.folder}/runs/*/log.txt")


# ---------------------------------------------------------------- the program


def same_examples(plan: Plan, dataset: train.Dataset, usable: np.ndarray) -> None:
    """ValueError if a contender does not train on exactly the examples that the first one trains on."""
    for name, flags in plan.contenders.items():
        own = train.examples_to_train(dataclasses.replace(plan.base, **flags), dataset)
        if not np.array_equal(own, usable):
            only = np.setxor1d(own, usable)
            raise ValueError(f"contender {name}: {len(only)} example(s), the first from "
                             f"{dataset.where(int(only[0]))}, have nothing to train on under it or under the "
                             f"first contender; give it a weight for completions")


def check_examples(plan: Plan, dataset: train.Dataset, usable: np.ndarray, eval_sets: dict[str, train.Dataset]
                   ) -> None:
    """Say how many examples have an answer, which --max-length may cut off, and which data share first user
    messages. ValueError if a test file has no example with an answer, or the validation data fewer than FEW.
    eval_sets: of plan.base.eval_data, in its order."""
    parts = [f"{len(usable):,} of {dataset.report['records']:,} to train on"]
    for file, held_out in zip(plan.base.eval_data[:-1], eval_sets.values()):
        left, every = int((held_out.counts[:, COMPLETION] > 0).sum()), held_out.report["records"]
        parts.append(f"{left:,} of {every:,} of {ending(file, 40)}")
        least = FEW if file == plan.validation else 1
        if left < least:
            raise ValueError(f"{file}: {left} of {every:,} record(s) have an answer within --max-length "
                             f"{plan.base.max_length}, and {least} must; raise it, or give more records")
    say(fit("examples with an answer: " + ", ".join(parts)))
    *names, sample = eval_sets
    train.warn_of_known(dataset, usable, {name: eval_sets[name] for name in names})
    if plan.validation:
        *tests, validation = names
        groups = eval_sets[validation].groups
        for name in tests:
            if both := int(np.isin(eval_sets[name].groups, groups).sum()):
                say(fit(f"warning: {both:,} of the {len(eval_sets[name]):,} examples of {ending(name, 40)} "
                        "have the first user message of a validation example, so the choice of learning rate "
                        "and epoch sees them"))


def prepare(config: StudyConfig, contenders: dict[str, dict]) -> tuple[Plan, dict, Callable]:
    """Check everything, make the study's folder and tokenize: the plan, the settings to store, and announce()
    for (todo, done). ValueError for what is wrong."""
    out = Path(config.output_dir)
    for name, file in zip(train.result_names(config.eval_data), config.eval_data):
        if name in (TRAINING, VALIDATION):
            raise ValueError(f"--eval-data {file}: results call other data {name!r}; rename the file")
    # A study that is resumed tomorrow, or on another machine, trains on the same text and in the same dtype.
    before = read_settings(config)
    config.date = config.date or before.get("date", "")
    if config.dtype == "auto":
        config.dtype = before.get("identity", {}).get("dtype", "auto")
    source = train.open_source(dataclasses.replace(config, output_dir=str(out / "none")))
    train.settle(config, source)
    # The same for all contenders: the least, since some need more memory than others.
    device = join_ranks(config.device)
    config.micro_batch_tokens = min(
        train.micro_batch_tokens(dataclasses.replace(config, **flags), source.model_config, device, 1,
                                 config.jobs) for flags in contenders.values())
    identity = study_identity(config, source)
    if before:
        check_study(config, before, identity, contenders)
    train_files, validation, sample, new_files = prepare_data(config)
    base = train.Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(train.Config)})
    base.train_data, base.eval_generate = train_files, 0
    base.eval_data = [*config.eval_data, *([validation] if validation else []), sample]
    plan = Plan(out, base, contenders, config.eval_data, validation, sample, config.memorization,
                config.generate, task_flags(config), config.keep_weights)

    # Until here nothing has been written.
    lock_folder(out, say)
    (out / "data").mkdir(exist_ok=True)
    for file, text in new_files.items():
        if not before or not Path(file).is_file():
            write_text(file, text)
    first = dataclasses.replace(plan.base, **next(iter(contenders.values())))
    dataset, usable, eval_sets = train.load_data(first, source)
    same_examples(plan, dataset, usable)
    check_examples(plan, dataset, usable, eval_sets)
    steps = train.make_steps(first, dataset, usable, 0, 1)
    plan.base.eval_every = config.eval_every or steps.per_epoch
    settings = {"identity": identity, "date": config.date,
                "contenders": before.get("contenders", {}) | contenders}
    evaluated = sum(int(each.lengths.sum()) for each in eval_sets.values())
    return plan, settings, partial(announce, plan, source, dataset, steps, evaluated, config.jobs)


def conduct(config: StudyConfig) -> int:
    """Run what is missing of the study, then give the verdict. Returns the exit status."""
    started = time.monotonic()
    contenders, lrs = parse_contenders(config), parse_lrs(config)
    check(config, lrs)
    # The whole grid, seed by seed, so that a study that is stopped has whole seeds.
    grid = [Run(name, lr, seed) for seed, lr, name in product(
        range(config.seed, config.seed + config.seeds), lrs, contenders)]
    if config.memorization or config.generate or config.tasks:
        grid.insert(0, Run(None))
    file = Path(config.output_dir) / "runs.jsonl"
    # Reading the harness's tasks takes long, and a study that is finished needs none.
    if config.tasks and not read_runs(file).keys() >= {*grid}:
        harness.open_tasks(harness.parse_args(["--model", "x", *task_flags(config)]))
    for name, several in (("loss", "losses"), ("lr", "lrs")):
        value = getattr(config, name)
        if getattr(config, several) and value not in (getattr(Config, name), EMBEDDED.get(name)):
            say(f"warning: {flag_name(name)} {value} is not used, because {flag_name(several)} is given")
    if config.seeds == 1:
        say("warning: --seeds 1: intervals will be over examples, not over seeds")
    plan, settings, announce_runs = prepare(config, contenders)
    out = plan.folder

    lines = read_runs(file)
    write_runs(file, lines, grid)       # without one that a kill has cut off
    todo = [each for each in grid if each not in lines]
    if todo:
        announce_runs(todo, done=sum(each in lines for each in grid if each.contender))
    write_json(out / "settings.json", settings)
    status = run_all(plan, todo, lines, config, started)
    finished = write_runs(file, lines, grid)
    trained = any(each.contender for each in finished)
    if status >= 128 or not trained or (not status and len(finished) < len(grid)):
        return status
    give_verdict([lines[each] for each in finished], next(iter(contenders)), out)
    return status


def run_all(plan: Plan, todo: list[Run], lines: dict[Run, dict], config: StudyConfig, started: float) -> int:
    """Run what is to do, adding to lines and to runs.jsonl. Returns 0, 1 if a run failed, or 128 + signal
    number."""
    waiting, failed, status = iter(todo), [], 0
    bar = tqdm(total=len(todo), unit="run", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def next_run() -> Run | None:
        # If the starting model cannot be measured, no other can.
        if Run(None) in failed or config.deadline and time.monotonic() - started > config.deadline:
            return None
        return next(waiting, None)

    def report(run: Run, outcome: Outcome) -> None:
        nonlocal status
        kind, value = outcome
        if kind == "line":
            # In this order: a signal between the two must not lose the line.
            lines[run] = value
            append_line(plan.folder / "runs.jsonl", value)
            if run.contender and not plan.keep_weights:
                delete_weights(plan, run)
            say(f"{run}: {value['seconds']:.0f} s of training" if run.contender else f"{run}: measured")
            bar.update()
        elif kind == "error":
            failed.append(run)
            tqdm.write(f"error: {run}: {value} ({plan.run_folder(run)}/log.txt)", file=sys.stderr)
        else:
            status = value

    if config.jobs == 1:
        run_here(plan, next_run, report)
    else:
        run_in_workers(plan, config.jobs, next_run, report)
    bar.close()
    if left := [each for each in todo if each not in lines]:
        reason = "stopped" if status else f"{len(failed)} failed" if failed else "--deadline has passed"
        say(f"{reason}: {counted_runs(left)} left; the same command resumes")
    return status or (1 if failed else 0)


def give_verdict(lines: list[dict], baseline: str, out: Path) -> None:
    """Compute, print, write and draw it."""
    result = verdict(lines, baseline)
    write_json(out / "study.json", result)
    names = pictures(result, out)
    say(report_text(result))
    say(f"\nin {out}: all numbers in study.json,\n  pictures of them in {' and '.join(names)}")


def again(args: Namespace) -> int:
    """--from: the verdict of an existing runs.jsonl."""
    file = vars(args)["from"]       # a keyword of Python
    lines = read_objects(file, LINE, "a run's line")
    out = Path(args.output_dir or Path(file).parent)
    check_writable("--output-dir", out, folder=True)
    out.mkdir(parents=True, exist_ok=True)
    # Lines are in the order in which runs ended, where several ran at once or the study is not finished.
    baseline = args.baseline or ("it" if any(line["contender"] == "it" for line in lines) else "")
    give_verdict(lines, baseline, out)
    return 0


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    return conduct(args) if isinstance(args, StudyConfig) else again(args)


if __name__ == "__main__":
    run(main)
