"""lm-evaluation-harness on the trainer's own model: its tasks and options, and the numbers of its `hf` model.

    python -m eval.harness --model RUN/final --tasks arc_easy,gsm8k_cot --limit 100 --json result.json
    python -m eval.harness --model RUN/final --tasks mmlu --num_fewshot 5 --apply_chat_template
    python -m eval.harness --model RUN/final --tasks paper --output_path results

Options that are not listed here are the harness's own and mean what `lm-eval run --help` says. --batch_size
is how many answers are generated at once; log-likelihoods are packed into rows of --micro-batch-tokens, and
tokens that requests share are computed once (eval/likelihood.py). --tasks paper runs the paper's suite, each
task with its own number of examples (eval/paper_suite.py). --local TASK=FILE takes a task's documents from a
.json or .jsonl file, and --local TASK/SPLIT=FILE those of another split, such as the one that examples are
drawn from. Under torchrun the ranks share the documents. --use_cache FILE keeps answers as they come, for
this checkpoint alone, and a rerun goes on from there.

How it is done: the harness's own `run` command with the model eval.harness_model registers, and its call of
lm_eval.simple_evaluate led through evaluate() below.
"""
import argparse
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from eval import paper_suite, squad
from eval.common import Parser, gather, run, write_json
from runtime.distributed import is_main, world_size

MISSING = "needs lm-evaluation-harness: pip install -r requirements-eval.txt"


def harness_parser(own: Parser) -> argparse.ArgumentParser:
    """The harness's parser of its `run` command, which raises what our own raises."""
    from lm_eval._cli.run import Run
    commands = argparse.ArgumentParser().add_subparsers()
    Run.create(commands)
    parser = commands.choices["run"]
    parser.allow_abbrev, parser.error = False, own.error
    return parser


# ---------------------------------------------------------------- tasks


def change_task(manager: object, task: str, changes: Callable[[dict], dict]) -> None:
    """changes: a task's configuration -> the fields to replace in it. manager: the harness's TaskManager."""
    from lm_eval.tasks._yaml_loader import load_yaml
    entry = manager.task_index[task]
    config = entry.cfg if entry.yaml_path is None else load_yaml(entry.yaml_path, resolve_func=True)
    manager.task_index[task] = replace(entry, yaml_path=None, cfg={**config, **changes(config)})


def parse_local(words: list[str]) -> dict[str, dict[str | None, Path]]:
    """["gsm8k_cot=test.jsonl", "piqa/train=a.jsonl"] -> {task: {split, None for the one evaluated: file}}."""
    local: dict[str, dict[str | None, Path]] = {}
    for word in words:
        name, equals, file = word.partition("=")
        task, _, split = name.partition("/")
        if not (task and equals and file):
            raise ValueError(f"--local {word}: write TASK=FILE or TASK/SPLIT=FILE")
        check_documents(Path(file))
        local.setdefault(task, {})[split or None] = Path(file)
    return local


def check_documents(file: Path) -> None:
    """ValueError, with the line, unless the file holds JSON objects."""
    if file.suffix not in (".json", ".jsonl") or not file.is_file():
        raise ValueError(f"--local {file}: no such .json or .jsonl file")
    text = file.read_text(encoding="utf-8")
    documents = 0
    try:
        for number, line in enumerate(text.split("\n") if file.suffix == ".jsonl" else [text], 1):
            read = json.loads(line) if line.strip() else []
            read = [read] if isinstance(read, dict) else read
            if not all(isinstance(document, dict) for document in read):
                raise ValueError("not a JSON object")
            documents += len(read)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--local {file}:{number}: {error}") from None
    if not documents:
        raise ValueError(f"--local {file}: holds no document")


def local_dataset(task: str, files: dict[str | None, Path], shots: int | None, config: dict) -> dict:
    """The fields of a task's configuration that make it read these files. ValueError if its examples would
    come from a split that is not among them."""
    names = ("test_split", "validation_split", "training_split", "fewshot_split")
    evaluated = config.get("test_split") or config.get("validation_split")
    files = {split or evaluated: str(file.resolve()) for split, file in files.items()}
    examples = config.get("fewshot_config") or {}
    source = (examples.get("split") or config.get("fewshot_split") or config.get("training_split")
              or config.get("validation_split") or evaluated)
    shots = shots if shots is not None and config.get("num_fewshot") != 0 else config.get("num_fewshot") or 0
    if shots and not examples.get("samples") and source not in files:
        raise ValueError(f"--local {task}: its {shots} examples come from split {source}; give --local "
                         f"{task}/{source}=FILE too, or --num_fewshot 0")
    if evaluated not in files:
        raise ValueError(f"--local {task}: split {evaluated} is evaluated; give --local {task}=FILE")
    left_out = {name: None for name in names if config.get(name) not in files}
    if examples.get("split") and examples["split"] not in files:
        left_out["fewshot_config"] = {k: v for k, v in examples.items() if k != "split"} or None
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, **left_out}


def suite_members(manager: object) -> dict[str, list[str]]:
    """The paper's tasks -> the subtasks of those that are tags of the harness, the others themselves."""
    return {entry.task: sorted(manager.task_index[entry.task].tags) if entry.task in manager.all_tags
            else [entry.task] for entry in paper_suite.ENTRIES}


def load_suite(manager: object, members: dict[str, list[str]]) -> tuple[list, dict[str, str]]:
    """The paper's tasks that can be loaded here, on all ranks; and why each of the others cannot."""
    loaded, why_not = {}, {}
    for entry in paper_suite.ENTRIES:
        try:
            for task in members[entry.task]:
                if entry.shots is not None:
                    change_task(manager, task, lambda _: {"num_fewshot": entry.shots})
                found = manager.load([task])
                loaded.setdefault(entry.task, []).append(found["groups"].get(task) or found["tasks"][task])
        except Exception as error:      # a hub's, a file's or the task's own; the others are run all the same
            lines = str(error).strip().splitlines()
            why_not[entry.task] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:150]
    why_not = dict(gather(list(why_not.items())))
    if len(why_not) == len(paper_suite.ENTRIES):
        raise ValueError("--tasks paper: none of its tasks can be loaded; for one, "
                         "{}: {}".format(*next(iter(why_not.items()))))
    return [task for name, tasks in loaded.items() if name not in why_not for task in tasks], why_not


# ---------------------------------------------------------------- the harness's own command


@contextmanager
def simple_evaluate_is(replacement: Callable[..., dict | None]) -> Iterator[None]:
    """For the harness's `run` command, which looks it up when it is called."""
    import lm_eval
    lm_eval.simple_evaluate = replacement
    try:
        yield
    finally:
        del lm_eval.simple_evaluate     # the module finds its own again


def run_harness(settings: argparse.Namespace, model: object, local: dict[str, dict[str | None, Path]],
                suite: bool) -> tuple[dict | None, dict | None]:
    """The harness's `run` with these settings on this HarnessModel. Returns its results and the suite's
    summary(); None on ranks other than the first, and where there was no suite."""
    from lm_eval._cli.run import Run
    from lm_eval.evaluator import simple_evaluate
    results, members, why_not = None, {}, {}

    def evaluate(**asked: object) -> dict | None:
        nonlocal results, members, why_not
        manager = asked["task_manager"]
        members = suite_members(manager) if suite else {}
        shots = {task: entry.shots for entry in paper_suite.ENTRIES for task in members.get(entry.task, ())}
        for task, files in local.items():
            if task not in manager.all_subtasks:
                raise ValueError(f"--local {task}: the harness has no task of that name (lm-eval ls tasks)")
            change_task(manager, task, partial(local_dataset, task, files,
                                               shots.get(task, asked["num_fewshot"])))
        if suite:
            tasks, why_not = load_suite(manager, members)
            asked["tasks"] = [*tasks, *(name for name in asked["tasks"] if name not in
                                        {entry.task for entry in paper_suite.ENTRIES})]
        if asked["use_cache"]:
            asked["use_cache"] = f"{asked['use_cache']}_{model.identity}"
        results = simple_evaluate(**{**asked, "model": model})
        if results:
            results["config"]["model"] = asked["model"]
        return results

    with simple_evaluate_is(evaluate):
        Run._execute(settings)
    return results, paper_suite.summary(results, members, why_not) if suite and results else None


def main(argv: list[str]) -> None:
    parser = Parser("harness", __doc__)
    parser.add_model_flags()
    parser.set_defaults(template=None)
    parser.add_argument("--local", nargs="+", default=[], metavar="TASK=FILE",
                        help="documents of a task from a .json or .jsonl file")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096,
                        help="tokens of a row of log-likelihoods")
    parser.epilog = ("All options of `lm-eval run` work too, among them --tasks, --num_fewshot, --limit, "
                     "--include_path, --gen_kwargs, --output_path, --log_samples, --use_cache, --batch_size, "
                     "--apply_chat_template, --fewshot_as_multiturn and --system_instruction.")
    own, rest = parser.parse_known_args(argv)
    try:
        from lm_eval.utils import handle_non_serializable, setup_logging

        from eval import harness_model
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from None
    settings = harness_parser(parser).parse_args(["--batch_size", str(harness_model.ANSWERS), *rest])
    check(own, settings)
    chat = getattr(settings, "apply_chat_template", False)
    settings.model, settings.device = "spantune", own.device
    settings.model_args = {"pretrained": own.model, "dtype": own.dtype, "date": own.date,
                           "micro_batch_tokens": own.micro_batch_tokens,
                           **({"template": own.template or "auto"} if chat else {}),
                           **(settings.model_args or {})}
    suite = "paper" in (settings.tasks or [])
    if suite:
        settings.tasks = [*(name for name in settings.tasks if name != "paper"),
                          *(entry.task for entry in paper_suite.ENTRIES)]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    setup_logging(logging.WARNING if is_main() else logging.ERROR)
    if suite or "coqa" in (settings.tasks or []):
        squad.provide()
    local = parse_local([word for words in own.local for word in words.split(",")])
    try:
        model = harness_model.HarnessModel(**settings.model_args, batch_size=settings.batch_size,
                                           device=own.device)
    except TypeError as error:      # an argument that it does not have
        raise ValueError(f"--model_args: {error}") from None
    results, found = run_harness(settings, model, local, suite)
    if found:
        print(f"\nThe paper's suite\n{paper_suite.table(found)}")
    if results:
        write_json(own.json, json.loads(json.dumps({**results, **({"paper": found} if found else {})},
                                                   default=handle_non_serializable)))


def check(own: argparse.Namespace, settings: argparse.Namespace) -> None:
    """ValueError for what does not go together."""
    tasks = settings.tasks or []
    if not tasks and not settings.config:
        raise ValueError("--tasks: name at least one (lm-eval ls tasks), or paper")
    if own.template and not getattr(settings, "apply_chat_template", False):
        raise ValueError(f"--template {own.template}: is used only with --apply_chat_template; give that too")
    if settings.max_batch_size is not None:
        raise ValueError("--max_batch_size: no batch size is looked for here; give --batch_size")
    if settings.cache_requests and own.local:
        raise ValueError("--cache_requests: the prompts that it keeps do not say which --local file they are "
                         "from; leave it out")
    if settings.limit is not None and 1 <= settings.limit < world_size():
        raise ValueError(f"--limit {settings.limit:g}: must be at least {world_size()}, one for each rank")
    if "paper" in tasks and settings.num_fewshot is not None:
        raise ValueError(f"--num_fewshot {settings.num_fewshot}: the tasks of --tasks paper have their own; "
                         "leave it out")


if __name__ == "__main__":
    run(main)
