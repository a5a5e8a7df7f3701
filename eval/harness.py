"""Tasks of lm-evaluation-harness on the trainer's own model, with the numbers of the harness's `hf` model.

    python -m eval.harness --model RUN/final --tasks arc_easy,gsm8k_cot --limit 100 --json result.json
    python -m eval.harness --model RUN/final --tasks mmlu --num_fewshot 5 --apply_chat_template
    python -m eval.harness --model RUN/final --tasks paper --output_path results

Options with underscores are the harness's and mean what `lm-eval run --help` says. --batch_size is the number
of answers generated at once; log-likelihoods are computed in rows of --micro-batch-tokens, and tokens that
requests share at their start only once (eval/likelihood.py). --tasks paper runs the paper's suite, each task
with its own number of examples (eval/paper_suite.py). --local TASK=FILE reads a task's documents from a .json
or .jsonl file; --local TASK/SPLIT=FILE those of another split, such as the one that examples come from. Under
torchrun the ranks share the documents. --use_cache FILE saves answers as they come, for this checkpoint only;
the same command then resumes from them.
"""
import json
import logging
import os
import tempfile
from argparse import Namespace
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from eval import paper_suite
from eval.common import Parser, run, write_json
from runtime.distributed import is_main, world_size

# The options that lm_eval.simple_evaluate takes by the same name.
PASSED_ON = ("model_args", "num_fewshot", "batch_size", "limit", "samples", "write_out", "log_samples",
             "predict_only", "gen_kwargs", "system_instruction", "apply_chat_template",
             "fewshot_as_multiturn", "confirm_run_unsafe_code", "metadata")


def parse_args(argv: list[str]) -> Namespace:
    def settings(text: str) -> dict | str:
        return json.loads(text) if text.startswith("{") else text

    def yes(text: str) -> bool:
        return text.lower() in ("true", "1", "yes")

    def seeds(text: str) -> list[int | None]:
        return [None if word == "None" else int(word) for word in text.split(",")]

    parser = Parser("harness", __doc__)
    parser.add_model_flags()
    parser.set_defaults(template=None)
    parser.add_argument("--local", nargs="+", default=[], metavar="TASK=FILE",
                        help="read a task's documents from a .json or .jsonl file")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096,
                        help="tokens of a row of log-likelihoods")
    flag = parser.add_argument_group("options of lm-evaluation-harness (see lm-eval run --help)").add_argument
    flag("--tasks", nargs="+", required=True, metavar="TASK",
         help="names, patterns or .yaml files, with commas or spaces between; paper: the paper's suite")
    flag("--include_path", metavar="DIR", help="a folder of further tasks")
    flag("--num_fewshot", type=int, help="examples in front of each question")
    flag("--limit", type=float, help="use only so many documents of each task; below 1: that share")
    flag("--samples", metavar="JSON", help="use only {task: [numbers of documents]}, or a file that says so")
    flag("--batch_size", default="auto", help="answers generated at once; auto: 16")
    flag("--model_args", type=settings, metavar="NAME=VALUE,...", help="max_length=N: tokens of an input")
    flag("--gen_kwargs", type=settings, metavar="NAME=VALUE,...", help="change how tasks generate")
    flag("--apply_chat_template", action="store_true", help="write prompts as conversations, by --template")
    flag("--fewshot_as_multiturn", type=yes, nargs="?", const=True, metavar="true|false",
         help="write examples as turns; default: true with --apply_chat_template")
    flag("--system_instruction", metavar="TEXT", help="a system message, or text in front of the prompt")
    flag("--use_cache", metavar="FILE", help="save answers there and resume from them")
    flag("--output_path", metavar="DIR", help="write results there")
    flag("--log_samples", action="store_true", help="write each document's answers there too")
    flag("--predict_only", action="store_true", help="write only the answers, without metrics")
    flag("--write_out", action="store_true", help="print each task's first prompts")
    flag("--seed", type=seeds, metavar="N[,N,N,N]", help="for random, numpy, torch and choosing examples")
    flag("--metadata", type=settings, metavar="NAME=VALUE,...", help="for tasks that ask for it")
    flag("--confirm_run_unsafe_code", action="store_true", help="run tasks that execute a model's code")
    args = parser.parse_args(argv)
    args.tasks = [task for word in args.tasks for task in word.split(",")]
    if args.template and not args.apply_chat_template:
        raise ValueError(f"--template {args.template}: needs --apply_chat_template; give that too")
    if args.limit is not None and 1 <= args.limit < world_size():
        raise ValueError(f"--limit {args.limit:g}: must be at least {world_size()}, one for each rank")
    if "paper" in args.tasks and args.num_fewshot is not None:
        raise ValueError(f"--num_fewshot {args.num_fewshot}: the tasks of --tasks paper have their own; "
                         "leave it out")
    return args


# ---------------------------------------------------------------- documents from files


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
        raise ValueError(f"--local {file}: is not a .json or .jsonl file")
    text, count = file.read_text(encoding="utf-8"), 0
    for number, line in enumerate(text.split("\n") if file.suffix == ".jsonl" else [text], 1):
        try:
            documents = json.loads(line) if line.strip() else []
        except ValueError as error:
            raise ValueError(f"--local {file}:{number}: {error}") from None
        documents = documents if isinstance(documents, list) else [documents]
        if not all(isinstance(document, dict) for document in documents):
            raise ValueError(f"--local {file}:{number}: not a JSON object")
        count += len(documents)
    if not count:
        raise ValueError(f"--local {file}: holds no document")


def local_fields(task: str, files: dict[str | None, Path], shots: int | None, config: dict) -> dict:
    """The fields to replace in a task's configuration so that it reads these files. shots: its number of
    examples where it is not the task's own. ValueError if documents or examples would come from elsewhere."""
    evaluated = config.get("test_split") or config.get("validation_split")
    files = {split or evaluated: str(file.resolve()) for split, file in files.items()}
    if evaluated not in files:
        raise ValueError(f"--local {task}: split {evaluated} is evaluated; give --local {task}=FILE")
    fewshot = config.get("fewshot_config") or {}
    split = fewshot.get("split") or config.get("fewshot_split")
    source = split or config.get("training_split") or config.get("validation_split") or evaluated
    own = config.get("num_fewshot")
    shots = own if own == 0 or shots is None else shots
    if shots and source not in files and (split or not fewshot.get("samples")):
        raise ValueError(f"--local {task}: its {shots} examples come from split {source}; give --local "
                         f"{task}/{source}=FILE too, or --num_fewshot 0")
    missing = {name: None for name in ("test_split", "validation_split", "training_split", "fewshot_split")
               if config.get(name) not in files}
    if fewshot.get("split") and fewshot["split"] not in files:
        missing["fewshot_config"] = None
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, **missing}


def write_local_tasks(folder: str, index: dict, local: dict[str, dict[str | None, Path]],
                      shots: dict[str, int | None], tasks: Collection[str]) -> None:
    """Writes a .yaml file for each task of `local`, which includes the task's own one and reads the files.
    index: the harness's tasks by name, of which `tasks` are not groups; shots: local_fields(), by task."""
    for number, (task, files) in enumerate(local.items()):
        if task not in tasks:
            raise ValueError(f"--local {task}: the harness has no task of that name (lm-eval ls tasks)")
        # Without tags: a tag named here would lose its other tasks.
        config = {"include": str(index[task].yaml_path), "tag": None,
                  **local_fields(task, files, shots.get(task), index[task].cfg)}
        Path(folder, f"{number}.yaml").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


# ---------------------------------------------------------------- the run


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval.tasks
        from lm_eval.config.evaluate_config import EvaluatorConfig
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.utils import handle_non_serializable, setup_logging

        from eval.harness_model import HarnessModel
    except ImportError as error:
        raise ValueError("needs lm-evaluation-harness: pip install -r requirements-eval.txt "
                         f"({error})") from None
    setup_logging(logging.WARNING if is_main() else logging.ERROR)
    local = parse_local([word for words in args.local for word in words.split(",")])
    suite = "paper" in args.tasks
    if suite:
        args.tasks = [task for task in args.tasks if task not in ("paper", *paper_suite.ENTRIES)]
    # The harness parses, completes and checks its options.
    config = EvaluatorConfig.from_cli(Namespace(**{
        field.name: getattr(args, field.name) for field in fields(EvaluatorConfig)
        if field.name in args and field.name not in ("model", "device")}))
    config.model_args = {"pretrained": args.model, "dtype": args.dtype, "date": args.date,
                         "micro_batch_tokens": args.micro_batch_tokens, **config.model_args}
    if args.apply_chat_template:
        config.model_args["template"] = args.template or "auto"
    try:
        model = HarnessModel(**config.model_args, batch_size=args.batch_size, device=args.device)
    except TypeError as error:
        # An argument that it does not have.
        raise ValueError(f"--model_args: {error}") from None

    manager = config.process_tasks(config.model_args | config.metadata)
    with tempfile.TemporaryDirectory() as folder:
        if local:
            shots = paper_suite.shots_by_task(manager) if suite else dict.fromkeys(local, args.num_fewshot)
            write_local_tasks(folder, manager.task_index, local, shots, manager.all_subtasks)
            paths = [args.include_path, folder] if args.include_path else [folder]
            manager = lm_eval.tasks.TaskManager(include_path=paths, metadata=config.metadata)
        tasks, members, why_not = paper_suite.load_tasks(manager) if suite else ([], {}, {})
        tracker = EvaluationTracker(output_path=args.output_path)
        random, numpy, torch, fewshot = config.seed
        results = lm_eval.simple_evaluate(
            model=model, tasks=[*tasks, *config.tasks], task_manager=manager, evaluation_tracker=tracker,
            use_cache=f"{args.use_cache}_{model.identity}" if args.use_cache else None,
            random_seed=random, numpy_random_seed=numpy, torch_random_seed=torch, fewshot_random_seed=fewshot,
            **{name: getattr(config, name) for name in PASSED_ON})
    # The other ranks have none.
    if results:
        results["config"]["model"] = "spantune"
        if suite:
            results["paper"] = paper_suite.summary(results, members, why_not)
        report(results, tracker)
        write_json(args.json, json.loads(json.dumps(results, default=handle_non_serializable)))


def report(results: dict, tracker: object) -> None:
    """Writes the files of --output_path with the harness's EvaluationTracker, and prints the tables."""
    from lm_eval.utils import make_table
    samples = results.pop("samples", {})
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    for table in ("results", "groups"):
        if table in results:
            print(make_table(results, table))
    if "paper" in results:
        print(f"\nThe paper's suite\n{paper_suite.table(results['paper'])}")


if __name__ == "__main__":
    run(main)
