"""Tasks of lm-evaluation-harness on the trainer's own model, with the numbers of the harness's `hf` model.

    python -m eval.harness --model RUN/final --tasks arc_easy,gsm8k_cot --limit 100 --json result.json
    python -m eval.harness --model RUN/final --tasks mmlu --num_fewshot 5 --apply_chat_template
    python -m eval.harness --model RUN/final --tasks paper --output_path results

Options with underscores are the harness's and mean what `lm-eval run --help` says. --batch_size is the number
of answers generated at once; log-likelihoods are computed in rows of --micro-batch-tokens, and tokens that
requests share at their start only once (eval/likelihood.py). --tasks paper runs the paper's suite, each task
with its own number of examples (eval/paper_suite.py). --local TASK=FILE reads the documents that are
evaluated from a .json or .jsonl file, --local TASK/SPLIT=FILE those of another split, such as the one that
examples come from. Under torchrun the ranks share the documents. --use_cache FILE saves answers as they come,
for this checkpoint only, and the same command resumes from them.
"""
import json
from argparse import Namespace
from pathlib import Path

from eval.flags import Parser, answer_command, check_paths, need
from records import naming
from runtime.flags import number
from runtime.start import world_size

SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def parse_args(argv: list[str]) -> Namespace:
    def at_once(text: str) -> int:
        return 16 if text == "auto" else number(int, 1)(text)

    parser = Parser("harness", __doc__)
    parser.add_model_flags()
    parser.set_defaults(template=None)
    parser.add_argument("--local", nargs="+", default=[], metavar="TASK=FILE",
                        help="read a task's documents from a .json or .jsonl file")
    parser.add_argument("--micro-batch-tokens", type=number(int, 1), default=4096,
                        help="tokens of a row of log-likelihoods")
    flag = parser.add_argument_group("options of lm-evaluation-harness (see lm-eval run --help)").add_argument
    flag("--tasks", nargs="+", required=True, metavar="TASK",
         help="names, patterns or .yaml files, with commas or spaces between; paper: the paper's suite")
    flag("--include_path", metavar="DIR", help="a folder of further tasks")
    flag("--num_fewshot", type=number(int, 0), help="examples in front of each question")
    flag("--limit", type=number(float, 1e-6),
         help="use only so many documents of each task; below 1: that share")
    flag("--batch_size", default="auto", type=at_once, help="answers generated at once; auto: 16")
    flag("--model_args", default="", metavar="max_length=N", help="the most tokens of an input")
    flag("--gen_kwargs", metavar="NAME=VALUE,...", help="change how tasks generate; or a JSON object")
    flag("--apply_chat_template", action="store_true", help="write prompts as conversations, by --template")
    flag("--fewshot_as_multiturn", choices=("true", "false"), nargs="?", default="true", const="true",
         help="with --apply_chat_template: write examples as turns")
    flag("--system_instruction", metavar="TEXT", help="a system message, or text in front of the prompt")
    flag("--use_cache", metavar="FILE", help="save answers there and resume from them")
    flag("--output_path", metavar="DIR", help="write results there")
    flag("--log_samples", action="store_true", help="write each document's prompt and answers there too")
    flag("--seed", type=number(int, 0), help="for random, numpy, torch and choosing examples")
    flag("--confirm_run_unsafe_code", action="store_true", help="run tasks that execute a model's code")
    args = parser.parse_args(argv)
    if args.gen_kwargs and args.gen_kwargs.startswith("{"):
        with naming(f"--gen_kwargs {args.gen_kwargs}"):
            args.gen_kwargs = json.loads(args.gen_kwargs)
    args.tasks = [task for word in args.tasks for task in word.split(",")]
    if args.template and not args.apply_chat_template:
        raise ValueError(f"--template {args.template}: needs --apply_chat_template; give that too")
    if args.log_samples and not args.output_path:
        raise ValueError("--log_samples: needs --output_path DIR to write them to; give that too")
    if args.include_path and not Path(args.include_path).is_dir():
        raise ValueError(f"--include_path {args.include_path}: is not a folder; give the one of your tasks")
    if args.limit is not None and 1 <= args.limit < world_size():
        raise ValueError(f"--limit {args.limit:g}: must be at least {world_size()}, one for each rank")
    if "paper" in args.tasks and args.num_fewshot is not None:
        raise ValueError(f"--num_fewshot {args.num_fewshot}: the tasks of --tasks paper have their own; "
                         "leave it out")
    check_paths(args, "json")
    need("lm_eval", "eval.harness")
    return args


answer_command(__name__, parse_args)

import logging
import os
import tempfile

from eval import paper_suite
from eval.common import read_objects, run, write_result
from runtime.distributed import is_main
from runtime.report import say


def open_tasks(args: Namespace) -> tuple[object, list[str], dict]:
    """The harness's TaskManager; the names that the patterns of --tasks stand for, .yaml files as they are,
    without "paper"; and the arguments of HarnessModel. ValueError for a task that does not exist, and where
    packages are missing."""
    try:
        import lm_eval.loggers  # noqa: F401
        import lm_eval.tasks
        from lm_eval.utils import simple_parse_args_string
    except ImportError as error:
        # It is there, but not all that it needs.
        raise ValueError(f"eval.harness: {error}: pip install -r requirements-eval.txt") from None
    given = simple_parse_args_string(args.model_args)
    # Others would replace what the flags say.
    if given.keys() - {"max_length"} or not all(isinstance(n, int) and n > 0 for n in given.values()):
        raise ValueError(f"--model_args {args.model_args}: must be max_length=N with N 1 or more; "
                         "everything else has a flag of its own")
    model_args = {"pretrained": args.model, "dtype": args.dtype, "date": args.date,
                  "template": (args.template or "auto") if args.apply_chat_template else None,
                  "micro_batch_tokens": args.micro_batch_tokens, **given}
    manager = lm_eval.tasks.TaskManager(include_path=args.include_path, metadata=model_args)
    found = []
    for word in args.tasks:
        if word == "paper":
            continue
        is_file = word.endswith(".yaml") and Path(word).is_file()
        names = [word] if is_file else manager.match_tasks([word])
        if not names:
            raise ValueError(f"--tasks {word}: the harness has no such task (lm-eval ls tasks lists them)")
        found += names
    return manager, list(dict.fromkeys(found)), model_args


# ---------------------------------------------------------------- documents from files


def read_from_files(words: list[str], manager: object, folder: str, shots: int | None) -> None:
    """Makes tasks of `manager`, the harness's TaskManager, read their documents from files.

    words: TASK=FILE or TASK/SPLIT=FILE; folder: where to write a .yaml file for each task, which includes the
    task's own one; shots: examples in front of each question, None: as many as the task says."""
    local: dict[str, dict[str, str]] = {}
    for word in words:
        name, _, file = word.partition("=")
        task, _, split = name.partition("/")
        if not (task and file.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz"))):
            raise ValueError(f"--local {word}: write TASK=FILE or TASK/SPLIT=FILE, a .json or .jsonl "
                             "file")
        if task not in manager.all_subtasks:
            raise ValueError(f"--local {task}: the harness has no task of that name (lm-eval ls tasks)")
        # The harness reads it later. This says what is wrong with it, and in which line.
        read_objects(file, {}, "a JSON object")
        local.setdefault(task, {})[split] = str(Path(file).resolve())
    for task, files in local.items():
        entry = manager.task_index[task]
        config = {"include": str(entry.yaml_path), **local_fields(task, files, entry.cfg, shots)}
        entry.yaml_path = Path(folder, f"{task}.yaml")
        entry.yaml_path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def local_fields(task: str, files: dict[str, str], config: dict, shots: int | None) -> dict:
    """The fields to replace in a task's configuration so that it reads {split, "" for the one evaluated:
    file}. ValueError if documents or examples would come from elsewhere."""
    evaluated = config.get("test_split") or config.get("validation_split")
    files = {split or evaluated: file for split, file in files.items()}
    if evaluated not in files:
        raise ValueError(f"--local {task}: split {evaluated} is evaluated; give --local {task}=FILE")
    fields = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    # Where the harness takes examples from, in its order.
    fewshot, own = config.get("fewshot_config") or {}, config.get("num_fewshot")
    source = fewshot.get("split") or config.get("fewshot_split")
    if not source and not fewshot.get("samples"):
        source = config.get("training_split") or config.get("validation_split") or evaluated
    if not source or source in files:
        return fields
    # As the harness counts them: a task that has none on purpose keeps none.
    if own if own == 0 or shots is None else shots:
        raise ValueError(f"--local {task}: its examples come from split {source}; give --local "
                         f"{task}/{source}=FILE too, or --num_fewshot 0")
    # The harness would open the split of the examples even if it needs none.
    return {**fields, "fewshot_split": None, "fewshot_config": {"samples": []}}


# ---------------------------------------------------------------- the run


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager, tasks, model_args = open_tasks(args)
    import jinja2
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import handle_non_serializable, make_table, setup_logging

    from eval.harness_model import HarnessModel
    setup_logging(logging.WARNING if is_main() else logging.ERROR)
    model = HarnessModel(**model_args, batch_size=args.batch_size, device=args.device)
    paper = "paper" in args.tasks
    tracker = EvaluationTracker(output_path=args.output_path)
    with tempfile.TemporaryDirectory() as folder:
        # Most of the suite's tasks have examples, so all of them need the split that theirs come from.
        read_from_files(args.local, manager, folder, 1 if paper else args.num_fewshot)
        suite, why_not = paper_suite.load_tasks(manager) if paper else ([], {})
        try:
            results = lm_eval.simple_evaluate(
                model=model, model_args=model_args, tasks=suite + tasks, task_manager=manager,
                evaluation_tracker=tracker, num_fewshot=args.num_fewshot, limit=args.limit,
                batch_size=args.batch_size, gen_kwargs=args.gen_kwargs,
                apply_chat_template=args.apply_chat_template, system_instruction=args.system_instruction,
                fewshot_as_multiturn=args.apply_chat_template and args.fewshot_as_multiturn == "true",
                use_cache=f"{args.use_cache}_{model.identity}" if args.use_cache else None,
                log_samples=args.log_samples, confirm_run_unsafe_code=args.confirm_run_unsafe_code,
                **(dict.fromkeys(SEEDS, args.seed) if args.seed is not None else {}))
        except (jinja2.UndefinedError, KeyError) as error:
            # What reads a document's fields are the task's templates and functions.
            if not args.local:
                raise
            raise ValueError(f"--local {' '.join(args.local)}: a document lacks a field that its task reads: "
                             f"{error}; give the records that the task is made for") from None
        except AssertionError as error:
            if "fewshot" not in str(error):
                raise
            raise ValueError(f"a task has too few examples to put in front of its questions ({error}); give "
                             "a smaller --num_fewshot") from None
    # The other ranks have none.
    if not results:
        return
    results["config"]["model"] = "spantune"
    if paper:
        results["paper"] = paper_suite.summary(results["results"], why_not)
    samples = results.pop("samples", {})
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    for table in ("results", "groups"):
        if table in results:
            say(make_table(results, table))
    if paper:
        say(f"\nThe paper's suite\n{paper_suite.table(results['paper'])}")
    write_result(args.json, json.loads(json.dumps(results, default=handle_non_serializable)), [args.model])


if __name__ == "__main__":
    run(main)
