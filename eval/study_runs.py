"""The runs of a study: each is train.main() in this process or in a worker, then measurements of its model.

A run has a folder of its own, which tells how far it has come:

    flags.json              the run's flags: python train.py --config flags.json repeats it
    log.txt                 what train.py printed
    evaluations/N.json      after N steps: NLL sums of every example's completion, by file
    train/                  train.py's own folder; its checkpoints resume a run that was stopped or killed
"""
import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train
from chat import COMPLETION
from data import Dataset
from eval import harness, memorization
from eval.answers import Answers
from eval.common import load
from eval.generate import answer_records
from eval.results import scores
from runtime.cpu import cpu_name
from runtime.files import read_json, write_text
from runtime.folder import is_step, read_log
from runtime.machine import keep_freed_memory, return_freed_memory
from runtime.distributed import join_ranks
from runtime.start import stop_signals


class Run(NamedTuple):
    """A cell of the grid. contender: None for the model that all runs start from, which is only measured."""
    contender: str | None
    lr: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.contender} lr {self.lr:g} seed {self.seed}" if self.contender else "the starting model"

    @property
    def folder_name(self) -> str:
        if not self.contender:
            return "start"
        # Windows has no ":" in names.
        return f"{self.contender.replace(':', '=')}-lr{self.lr:g}-seed{self.seed}"


@dataclass
class Plan:
    """What all runs of a study have in common."""
    folder: Path                            # of the study
    base: train.Config                      # the flags; contender, lr and seed are put over it
    contenders: dict[str, dict]             # by name, the flags that make it differ
    # base.eval_data holds these three, in this order:
    tests: list[str]                        # the test files
    validation: str                         # the validation data, "" for none
    sample: str                             # a sample of the training records
    memorization: int                       # prompts
    generate: int                           # prompts of each test file
    tasks: list[str]                        # eval.harness's flags, or nothing
    keep_weights: bool

    def config(self, run: Run) -> train.Config:
        return dataclasses.replace(self.base, **self.contenders[run.contender], lr=run.lr, seed=run.seed,
                                   output_dir=str(self.run_folder(run) / "train"))

    def run_folder(self, run: Run) -> Path:
        return self.folder / "runs" / run.folder_name


class Stopped(BaseException):
    """A signal asked the study to stop. args: the exit status."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """stop_signals() raise Stopped in here. While train.py is in its loop it answers them itself."""
    def stop(number: int, _: object) -> None:
        raise Stopped(128 + number)

    before = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- one run


def perform(plan: Plan, run: Run) -> dict:
    """Train where needed, measure, and return the run's line of runs.jsonl. Output goes to the run's log.
    Raises Stopped if a signal ended it; the next call resumes."""
    folder = plan.run_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    line = {"contender": run.contender, "flags": plan.contenders.get(run.contender, {}), "lr": run.lr,
            "seed": run.seed, "steps": 0, "tokens": {}, "evaluations": [], "seconds": 0.0}
    model = plan.base.model
    with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log):
        try:
            if run.contender:
                config = plan.config(run)
                train_to_the_end(plan, config, folder)
                line |= trained_line(config, folder)
                model = str(Path(config.output_dir) / "final")
            line["end"] = measure(plan, model, folder)
        except Exception:
            traceback.print_exc()
            raise
    on_gpu = plan.base.device != "cpu" and torch.cuda.is_available()
    return line | {"commit": commit(), "torch": torch.__version__,
                   "device": torch.cuda.get_device_name() if on_gpu else cpu_name()}


def train_to_the_end(plan: Plan, config: train.Config, folder: Path) -> None:
    """train.main() with these flags, resumed if it has begun. Raises Stopped."""
    out = Path(config.output_dir)
    # final/ is whole once it exists, and is written after the last evaluation.
    if (out / "final").is_dir():
        return
    # It was measured and its weights deleted, but its line was lost. Train from scratch.
    if "finished_after" in read_json(out / "identity.json"):
        shutil.rmtree(out)
    write_text(folder / "flags.json", json.dumps(
        {name: value for name, value in dataclasses.asdict(config).items()
         if value not in (None, "", []) and name not in ("resume", "overwrite")}, indent=2))
    status = train.main(["--config", str(folder / "flags.json")],
                        partial(record_evaluation, plan, folder / "evaluations"))
    free_memory()
    if status:
        raise Stopped(status)


def free_memory() -> None:
    """Free models that are no longer used, so that two are never in memory at once, and return their memory,
    which several processes may share."""
    gc.collect()
    return_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def record_evaluation(plan: Plan, folder: Path, step: int, eval_sets: dict[str, Dataset],
                      sums: dict[str, np.ndarray]) -> None:
    """Write NLL sums, in nats to five digits, and numbers of tokens of every completion, by file. A resumed
    run writes an evaluation a second time, with the same numbers."""
    folder.mkdir(exist_ok=True)
    nll, tokens = {}, {}
    for name, dataset in eval_sets.items():
        counts = dataset.counts[:, COMPLETION]
        tokens[name] = counts[counts > 0].tolist()
        nll[name] = [float(f"{x:.5g}") for x in sums[name][counts > 0, COMPLETION]]
    evaluation = {"nll": by_role(plan, nll), "tokens": by_role(plan, tokens)}
    write_text(folder / f"{step}.json", json.dumps(evaluation))


def by_role(plan: Plan, of_file: dict[str, list]) -> dict:
    """{name: values}, in the order of --eval-data -> {"test": {name: values}, "validation": values, "train":
    values}; without validation data, [] for it."""
    values, tests = list(of_file.values()), train.result_names(plan.tests)
    return {"test": dict(zip(tests, values)), "validation": values[len(tests)] if plan.validation else [],
            "train": values[-1]}


def trained_line(config: train.Config, folder: Path) -> dict:
    """What training adds to a run's line."""
    file = Path(config.output_dir) / "metrics.jsonl"
    metrics, _ = read_log(file, is_step)
    if not metrics:
        raise ValueError(f"{file}: holds no step of a run; delete {folder} to repeat it")
    last = metrics[-1]
    per_epoch = last["step"] / last["epoch"]
    evaluations = []
    for step in sorted(int(file.stem) for file in (folder / "evaluations").glob("*.json")):
        of_step = read_json(folder / "evaluations" / f"{step}.json")
        evaluations.append({"step": step, "epoch": round(step / per_epoch, 4), **of_step["nll"]})
    return {"steps": last["step"], "tokens": of_step["tokens"], "evaluations": evaluations,
            "seconds": round(sum(row["seconds"] for row in metrics), 3)}


def measure(plan: Plan, model: str, folder: Path) -> dict:
    """What a model generates, and its scores: the "end" of a run's line."""
    end: dict[str, dict] = {}
    base = plan.base
    if plan.memorization or plan.generate:
        keep_freed_memory(shapes=1024)      # generation has a new one with almost every step
        args = Namespace(template=base.template, date=base.date, dtype=base.dtype, data=[plan.sample],
                         columns=[], limit=plan.memorization, max_length=base.max_length, max_new_tokens=0,
                         batch_size=16)
        loaded = load(model, args, join_ranks(base.device), cast=True)
    if plan.memorization:
        records, _ = memorization.read_targets(args, loaded.tokenizer, loaded.template)
        rows = memorization.answer(loaded, records, Answers(None, memorization.answer_key, {}), args)
        result = memorization.score(rows, 0, 0.95, 0)
        end["memorization"] = {
            "exact": [int(row["exact"]) for row in rows],
            "prefix": [round(row["shared_tokens"] / row["target_tokens"], 5) for row in rows],
            "bleu": round(result["bleu"], 5)}
    if plan.generate:
        end["generate"] = {}
        for name, file in zip(train.result_names(plan.tests), plan.tests):
            answers = answer_records(loaded.model, loaded.tokenizer, loaded.template, [file], plan.generate,
                                     columns=base.columns)
            end["generate"][name] = [int(answer["correct"]) for answer in answers]
    if plan.tasks:
        file = folder / "tasks.json"
        harness.main(["--model", model, "--dtype", base.dtype, "--device", base.device, "--json", str(file),
                      *plan.tasks])
        end["tasks"] = {f"{task} {score}": round(cell["value"], 6)
                        for task, values in read_json(file)["results"].items()
                        for score, cell in scores(values).items() if isinstance(cell["value"], float)}
    return end


def commit() -> str:
    """The repository's commit, with a mark if files differ from it."""
    command = ["git", "-C", str(Path(train.__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:     # git is not installed
        return "unknown"


# ---------------------------------------------------------------- several runs


Outcome = tuple[str, object]    # ("line", dict), ("error", its text) or ("stopped", the exit status)


def attempt(plan: Plan, run: Run) -> Outcome:
    try:
        return "line", perform(plan, run)
    except Stopped as stopped:
        return "stopped", stopped.args[0]
    except Exception as error:
        return "error", str(error).strip().partition("\n")[0] or repr(error)


def run_here(plan: Plan, next_run: Callable[[], Run | None], report: Callable[[Run, Outcome], None]) -> None:
    """The runs one after another in this process, until next_run() has no more or a signal comes."""
    with stoppable():
        try:
            while run := next_run():
                outcome = attempt(plan, run)
                report(run, outcome)
                if outcome[0] == "stopped":
                    return
        except Stopped as stopped:      # between two runs
            report(Run(None), ("stopped", stopped.args[0]))


def serve(connection: object, plan: Plan, threads: int) -> None:
    """A worker: runs in, outcomes out."""
    torch.set_num_threads(threads)

    def watch() -> None:
        # If the study is killed, nobody else ends its workers.
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with stoppable(), contextlib.suppress(Stopped, EOFError, BrokenPipeError):
        while run := connection.recv():
            connection.send(attempt(plan, run))


def why_it_died(worker: multiprocessing.Process) -> str:
    """Waits for the end of a worker that has closed its connection."""
    worker.join()
    if worker.exitcode == -signal.SIGKILL:
        return ("its process was killed, as a system does that is out of memory; give fewer --jobs, or a "
                "smaller --micro-batch-tokens")
    return f"its process died (exit code {worker.exitcode})"


def run_in_workers(plan: Plan, jobs: int, next_run: Callable[[], Run | None],
                   report: Callable[[Run, Outcome], None]) -> None:
    """As run_here(), in `jobs` processes. A thread for each of them hands out runs; a process that dies is
    replaced. report is called by one thread at a time."""
    context, lock, workers = multiprocessing.get_context("spawn"), threading.Lock(), set()
    ended, faults = [], []
    threads = max(1, torch.get_num_threads() // jobs)

    def start() -> tuple:
        connection, other = context.Pipe()
        worker = context.Process(target=serve, args=(other, plan, threads))
        worker.start()
        # Only the worker holds this end now, so its death closes the connection.
        other.close()
        workers.add(worker)
        return worker, connection

    def lane() -> None:
        worker = None
        try:
            while not ended:
                with lock:
                    run = next_run()
                if not run:
                    break
                if not worker:
                    worker, connection = start()
                try:
                    connection.send(run)
                    outcome = connection.recv()
                except (EOFError, OSError):
                    outcome = "error", why_it_died(worker)
                    workers.discard(worker)
                    worker = None
                with lock:
                    if outcome[0] == "stopped":
                        ended.append(outcome[1])
                    # A signal may also have ended the worker itself, which is not the run's error.
                    if outcome[0] != "error" or not ended:
                        report(run, outcome)
        except Exception as error:
            # Such as a full disk. It is raised below, when the runs of the other lanes have ended.
            faults.append(error)
            ended.append(1)
        finally:
            if worker:
                with contextlib.suppress(OSError):
                    connection.send(None)
                worker.join()

    lanes = [threading.Thread(target=lane) for _ in range(jobs)]
    with stoppable():
        try:
            for thread in lanes:
                thread.start()
            for thread in lanes:
                thread.join()
        except Stopped as stopped:
            ended.append(stopped.args[0])
            # Ctrl-C has reached the workers already, SIGTERM has not. A second signal changes nothing there.
            for worker in list(workers):
                with contextlib.suppress(ProcessLookupError, ValueError):
                    os.kill(worker.pid, signal.SIGTERM)
            for thread in lanes:
                thread.join()
            report(Run(None), ("stopped", stopped.args[0]))
    if faults:
        raise faults[0]


def delete_weights(plan: Plan, run: Run) -> None:
    """Delete a measured run's weights, but not its logs."""
    for name in ("final", "checkpoints"):
        shutil.rmtree(plan.run_folder(run) / "train" / name, ignore_errors=True)
