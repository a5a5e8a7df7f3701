"""Python functions written by a checkpoint and tried: HumanEval's pass@k.

    python -m eval.humaneval --model RUN/final --data HumanEval.jsonl.gz --output samples.jsonl --execute
    python -m eval.humaneval --model RUN/final --data ... --samples 20 --temperature 0.8 --k 1 10 --execute

Without --execute programs are written but not run. With it each runs isolated (eval/sandbox.py), which needs
bwrap. --format chat asks for the function in a code block of the answer; with text the checkpoint, which then
needs no chat template, continues the problem's own text until the function ends. --output gets the samples as
they come, so that the same command resumes, and then their outcomes. Under torchrun the ranks share the
problems.

pass@k is the unbiased estimator of arXiv 2107.03374: of n samples to a problem, c of them right, the chance
that k drawn without replacement hold a right one, 1 - C(n - c, k) / C(n, k), and its mean over the problems.
"""
import math
import os
from argparse import Namespace

from eval.flags import Parser, answer_command, check_paths
from runtime.flags import number


def pass_at_k(samples: int, right: int, k: int) -> float:
    """pass_at_k(4, 1, 2) -> 0.5. ValueError if k is not from 1 to the number of samples."""
    if not 1 <= k <= samples:
        raise ValueError(f"--k {k}: must be from 1 to the samples of a problem, --samples {samples}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def parse_args(argv: list[str]) -> Namespace:
    parser = Parser("humaneval", __doc__)
    parser.add_model_flags()
    parser.add_argument("--data", required=True, metavar="FILE", help="the problems, .jsonl or .jsonl.gz")
    parser.add_argument("--format", choices=("chat", "text"), default="chat")
    parser.add_answer_flags(max_new_tokens=512)
    parser.add_sampling_flags()
    parser.add_argument("--k", type=number(int, 1, 10**4), nargs="+", default=[1], help="of pass@k")
    parser.add_argument("--output", required=True, metavar="FILE", help="samples, .jsonl; resumed if present")
    parser.add_argument("--execute", action="store_true", help="run the programs, isolated")
    parser.add_argument("--seconds", type=number(float, 1, 86_400), default=10.0, help="a program may take")
    parser.add_argument("--megabytes", type=number(int, 64, 2**20), default=1024, help="a program may use")
    parser.add_argument("--workers", type=number(int, 1, 1024), default=os.cpu_count() or 1,
                        help="programs run at once")
    args = parser.parse_args(argv)
    check_paths(args, "output", "json")
    if args.samples > 1 and not args.temperature:
        raise ValueError("--temperature 0 writes the same program each time; give 0.8 with --samples")
    for k in args.k:
        pass_at_k(args.samples, 0, k)
    if args.json and not args.execute:
        raise ValueError(f"--json {args.json}: without --execute there is no result to write; give that too")
    return args


answer_command(__name__, parse_args)

import re
from concurrent.futures import ThreadPoolExecutor

from eval.answers import Answers, made_with
from eval.common import Loaded, load, mean_and_error, progress, read_objects, run, start_ranks, write_result
from eval.engine import Sampling
from eval.sandbox import run_python
from runtime.distributed import is_main
from runtime.report import counted, say
from runtime.start import fit

FIELDS = dict.fromkeys(("task_id", "prompt", "test", "entry_point"), str)
ASK = ("Complete the following Python function. Answer with the whole function in one code block.\n\n"
       "```python\n{}\n```")
# A block of code, closed or not. The line of the fence may name a language, with space around it.
BLOCK = re.compile(r"```(?:[^\S\n]*[\w+#.-]*[^\S\n]*\n)?(.*?)(?:```|\Z)", re.S)
# what ends a function at the start of a line
AFTER = re.compile(r"^(?:class |def |if |print|assert |@|#|```|<)", re.M)


def read_problems(file: str, limit: int | None) -> list[dict]:
    """Objects with FIELDS. ValueError names the file, and the line or the problem."""
    problems = read_objects(file, FIELDS, "a problem", limit)
    for problem in problems:
        if not definitions(problem["entry_point"], problem["prompt"]):
            raise ValueError(f"{file}: problem {problem['task_id']}: the prompt must define the entry_point, "
                             f"{problem['entry_point']}")
    return problems


def definitions(name: str, code: str) -> list[int]:
    """Where functions of this name are defined."""
    return [match.start() for match in re.finditer(rf"\bdef {re.escape(name)}\b", code)]


def program_of(problem: dict, answer: str, chat: bool) -> str:
    """The function as a program: what stands before it in the problem, and what the checkpoint wrote."""
    prompt, name = problem["prompt"], problem["entry_point"]
    if not chat:
        end = AFTER.search(answer)
        return prompt.rstrip() + (answer[:end.start()] if end else answer)
    blocks = BLOCK.findall(answer) or [answer]
    code = next((block for block in blocks if definitions(name, block)), blocks[0])
    before = prompt[:definitions(name, prompt)[-1]]     # imports and helpers, which answers tend to leave out
    return f"{before}\n{code}" if definitions(name, code) else prompt + code


def passes(problem: dict, program: str, seconds: float, megabytes: int) -> tuple[bool, str]:
    """Whether the program comes through the problem's tests, and if not, why."""
    test = f"{problem['test']}\ncheck({problem['entry_point']})"
    return run_python([program, test], seconds, megabytes)[:2]


def sample(loaded: Loaded, problems: list[dict], args: Namespace) -> Answers:
    """Lines of {"index", "sample", "task_id", "output"}, generated now or found in --output."""
    names = ("model", "data", "format", "dtype", "max_new_tokens", "temperature", "top_p", "seed")
    answers = Answers(args.output, lambda line: (line["index"], line["sample"]),
                      made_with(args, names, loaded.tokenizer, loaded.template, args.data))
    missing = answers.missing((i, n) for i in range(len(problems)) for n in range(args.samples))
    prompts = [prompt_ids(loaded, problems[i]["prompt"], args.format == "chat") for i, _ in missing]
    generated = loaded.engine.answers(prompts, loaded.stop_ids, args.max_new_tokens, args.batch_size,
                                      Sampling(args.temperature, args.top_p, 0, args.seed), missing)
    for position, ids, _ in progress(generated, len(missing), "sample"):
        i, n = missing[position]
        answers.add({"index": i, "sample": n, "task_id": problems[i]["task_id"],
                     "output": loaded.answer(ids) if args.format == "chat" else loaded.tokenizer.decode(ids)})
    answers.merge()
    return answers


def prompt_ids(loaded: Loaded, text: str, chat: bool) -> list[int]:
    """The problem's text as a request, or as it is."""
    if chat:
        return loaded.prompt([{"role": "user", "content": ASK.format(text.strip())}])
    tokenizer = loaded.tokenizer
    # Without the line break at its end: an indented line begins with it, as one token.
    start = [tokenizer.special[tokenizer.bos_token]] if tokenizer.adds_bos else []
    return start + tokenizer.at_start.encode(text.rstrip(), add_special_tokens=False).ids


def execute(lines: list[dict], problems: list[dict], args: Namespace) -> None:
    """Runs the samples in `lines` and adds {"passed", "why"} to each."""
    def attempt(line: dict) -> None:
        problem = problems[line["index"]]
        program = program_of(problem, line["output"], args.format == "chat")
        line["passed"], line["why"] = passes(problem, program, args.seconds, args.megabytes)

    pool = ThreadPoolExecutor(args.workers)
    try:
        list(progress(pool.map(attempt, lines), len(lines), "program"))
    finally:
        pool.shutdown(cancel_futures=True)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    problems = read_problems(args.data, args.limit)
    if args.execute:
        # before hours of sampling: can programs be isolated at all?
        run_python([], args.seconds, args.megabytes)
    loaded = load(args.model, args, start_ranks(args), cast=True, chat=args.format == "chat")
    answers = sample(loaded, problems, args)
    lines = [answers.lines[i, n] for i in range(len(problems)) for n in range(args.samples)]
    if not is_main():
        return
    if not args.execute:
        say(fit(f"{counted(len(lines), 'program')} in {args.output}; none was run (--execute runs them, "
                "isolated)"))
        return
    execute(lines, problems, args)
    answers.write()
    right = [sum(answers.lines[i, n]["passed"] for n in range(args.samples)) for i in range(len(problems))]
    result = {"model": args.model, "problems": len(problems), "samples": args.samples, "format": args.format,
              "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    for k in args.k:
        mean, error = mean_and_error([[pass_at_k(args.samples, n, k)] for n in right])
        result[f"pass@{k}"], result[f"pass@{k}_standard_error"] = mean, error
        shown = "unknown" if error is None else f"{error:.1%}"
        say(f"pass@{k}: {mean:.1%} (standard error {shown}) of {counted(len(problems), 'problem')}, "
            f"{counted(args.samples, 'sample')} each")
    write_result(args.json, result, [args.model])


if __name__ == "__main__":
    run(main)
