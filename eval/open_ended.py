"""Answers to AlpacaEval's and MT-Bench's questions, for their own tools, and a judge's verdicts on them.

    python -m eval.open_ended alpaca --model RUN/final --questions alpaca_eval.json --output outputs.json
    python -m eval.open_ended mt-bench --model RUN/final --questions question.jsonl --output NAME.jsonl
    python -m eval.open_ended ... --judge MODEL [--reference OTHER]

alpaca: greedy answers, for `alpaca_eval --model_outputs`. mt-bench: two turns at FastChat's temperatures, for
its data/mt_bench/model_answer. Answers are written to OUTPUT.answers as they come, verdicts (judge.py) to
OUTPUT.judgments; the same command resumes from there. Under torchrun the ranks share the work.

Pairs are judged in both orders, and verdicts that disagree make a tie. The win rate is wins plus half the
ties, in percent of the pairs with both verdicts. alpaca: against the outputs in the question file or in
--reference. mt-bench: a grade from 1 to 10 per turn, and pairs against the answers in --reference.
"""
import json
import time
from argparse import Namespace
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import torch

from chat import load_template, render, tokenize
from runtime.tokenizer import Tokenizer
from eval.answers import Answers, as_line, made_with
from eval.common import (Loaded, Parser, check_values, load, progress, read_objects, run, start_ranks,
                         write_json)
from eval.engine import Sampling
from eval.judge import (NOT_REQUESTED, Job, connect, judge_all, make_jobs, print_summary, read_prompts,
                        summary, values_of)
from runtime.distributed import is_main
from runtime.files import write_text
from runtime.weights import resolve_model

# FastChat's temperatures by category (its fastchat/llm_judge/common.py); 0.7 for any other
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
                "humanities": 0.1}
# categories that FastChat judges with a correct answer at hand
CHECKED = ("math", "coding", "reasoning")


def are_texts(values: object, least: int, most: int) -> bool:
    return (isinstance(values, list) and least <= len(values) <= most
            and all(isinstance(value, str) for value in values))


def read_questions(args: Namespace) -> list[dict]:
    """[{"id", "turns": [text], "category", "temperature", "reference": correct answers or None}]."""
    questions = []
    if args.benchmark == "alpaca":
        for i, line in enumerate(read_objects(args.questions, ("instruction",), "a question", args.limit)):
            if not are_texts([line["instruction"], line.get("dataset", "")], 2, 2):
                raise ValueError(f"{args.questions}: instruction and dataset of question {i} must be text")
            questions.append({"id": i, "turns": [line["instruction"]], "category": line.get("dataset", ""),
                              "temperature": 0.0, "reference": None})
        return questions
    for line in read_objects(args.questions, ("question_id", "category", "turns"), "a question", args.limit):
        number, category, turns = line["question_id"], line["category"], line["turns"]
        if not (isinstance(number, int) and number >= 0 and are_texts([category], 1, 1)
                and are_texts(turns, 1, 2)):
            raise ValueError(f"{args.questions}: question {number!r} must have a whole number as its "
                             "question_id, one or two turns of text, and text as its category")
        checked = category in CHECKED and are_texts(line.get("reference"), len(turns), 2)
        questions.append({"id": number, "turns": turns, "category": category,
                          "temperature": TEMPERATURES.get(category, 0.7),
                          "reference": line["reference"] if checked else None})
    if len({question["id"] for question in questions}) < len(questions):
        raise ValueError(f"{args.questions}: several questions have the same question_id")
    return questions


# ---------------------------------------------------------------- answers


def answer(questions: list[dict], args: Namespace, device: torch.device) -> dict[int, list[dict]]:
    """{question: [{"question", "turn", "output", "tokens", "finished", "time"}, one per turn]}; read from
    OUTPUT.answers or generated."""
    tokenizer = Tokenizer(resolve_model(args.model))
    template = load_template(args.template, tokenizer, args.date)
    flags = ["benchmark", "model", "dtype", "max_new_tokens"] + ["seed"] * (args.benchmark == "mt-bench")
    answers = Answers(f"{args.output}.answers", lambda line: (line["question"], line["turn"]),
                      made_with(args, flags, template, args.questions))
    by_key = {(question["id"], turn): question
              for question in questions for turn in range(len(question["turns"]))}
    loaded = None
    # All first turns before any second one, which continues the first.
    for turn in (0, 1):
        missing = answers.missing(key for key in by_key if key[1] == turn)
        if missing:
            loaded = loaded or load(args.model, args, device, cast=True)
            for line in progress(answer_turn(loaded, missing, by_key, answers, args), len(missing), "answer"):
                answers.add(line)
        answers.merge()
    return {question["id"]: [answers.lines[question["id"], turn] for turn in range(len(question["turns"]))]
            for question in questions}


def answer_turn(loaded: Loaded, keys: list[tuple[int, int]], by_key: dict[tuple[int, int], dict],
                answers: Answers, args: Namespace) -> Iterator[dict]:
    """The lines for keys, (question, turn), as they are generated, one temperature after the other."""
    for temperature in sorted({by_key[key]["temperature"] for key in keys}):
        batch = [key for key in keys if by_key[key]["temperature"] == temperature]
        prompts = [prompt_of(loaded, by_key[key], key[1], answers, args) for key in batch]
        generated = loaded.engine.answers(prompts, loaded.stop_ids, args.max_new_tokens, args.batch_size,
                                          Sampling(temperature, seed=args.seed), batch)
        for i, ids, finished in generated:
            question, turn = batch[i]
            yield {"question": question, "turn": turn, "output": loaded.answer(ids).strip(),
                   "tokens": len(ids), "finished": finished, "time": time.time()}


def prompt_of(loaded: Loaded, question: dict, turn: int, answers: Answers, args: Namespace) -> list[int]:
    """The token ids of the conversation up to this turn, earlier answers included."""
    messages = []
    for n, text in enumerate(question["turns"][:turn + 1]):
        messages.append({"role": "user", "content": text})
        if n < turn:
            messages.append({"role": "assistant", "content": answers.lines[question["id"], n]["output"]})
    try:
        return tokenize(render(messages, loaded.template, add_generation_prompt=True), loaded.tokenizer)[0]
    except ValueError as error:
        raise ValueError(f"{args.questions}: question {question['id']}, turn {turn + 1}: {error}") from None


def output_text(questions: list[dict], answers: dict[int, list[dict]], args: Namespace) -> str:
    """AlpacaEval's model_outputs.json, or a file for FastChat's model_answer, as text."""
    outputs, lines = [], []
    for question in questions:
        turns = [line["output"] for line in answers[question["id"]]]
        outputs.append({"dataset": question["category"], "instruction": question["turns"][0],
                        "output": turns[0], "generator": args.name})
        # random in FastChat, but a rerun should write the same file
        answer_id = sha256(json.dumps([args.name, question["id"], turns]).encode()).hexdigest()[:22]
        lines.append(as_line({"question_id": question["id"], "answer_id": answer_id, "model_id": args.name,
                              "choices": [{"index": 0, "turns": turns}],
                              "tstamp": answers[question["id"]][-1]["time"]}))
    if args.benchmark == "alpaca":
        return json.dumps(outputs, indent=2, ensure_ascii=False) + "\n"
    return "".join(lines)


# ---------------------------------------------------------------- verdicts


def read_reference(args: Namespace, questions: list[dict]) -> dict[int, list[str]] | None:
    """{question: the turns of the answer to compare with}; None for mt-bench without --reference."""
    file = args.reference or (args.questions if args.benchmark == "alpaca" else None)
    if not file:
        return None
    try:
        if args.benchmark == "alpaca":
            outputs = {line["instruction"]: [line["output"]]
                       for line in read_objects(file, ("instruction", "output"), "a model output")}
            reference = {question["id"]: outputs.get(question["turns"][0]) for question in questions}
        else:
            reference = {line["question_id"]: line["choices"][0]["turns"]
                         for line in read_objects(file, ("question_id", "choices"), "an answer")}
    except (LookupError, TypeError) as error:
        raise ValueError(f"--reference {file}: is not in the format of {args.benchmark}'s answers ({error!r})"
                         ) from None
    for question in questions:
        if not are_texts(reference.get(question["id"]), len(question["turns"]), 2):
            raise ValueError(f"--reference {file}: has no answer to question {question['id']}: "
                             f"{question['turns'][0][:60]!r}")
    return reference


def judge(questions: list[dict], answers: dict[int, list[dict]], args: Namespace
          ) -> tuple[dict, dict[Job, str]]:
    """What to report of the verdicts, and the jobs without one, with the reasons."""
    prompts, reference = read_prompts(args.judge_prompts), read_reference(args, questions)
    jobs: list[Job] = []
    for question in questions:
        turns = [line["output"] for line in answers[question["id"]]]
        if args.benchmark == "mt-bench":
            jobs += make_jobs(question, turns, None, prompts)
        if reference:
            jobs += make_jobs(question, turns, reference[question["id"]], prompts)
    verdicts, failed = judge_all(args.judge, jobs, f"{args.output}.judgments", args.judge_workers)
    categories = {question["id"]: question["category"] for question in questions}
    result = {"judge": args.judge, "judge_prompts": args.judge_prompts, "verdicts": len(verdicts),
              "unparsable": list(verdicts.values()).count(None), "missing": len(failed)}
    if args.benchmark == "mt-bench":
        result |= summary(values_of(verdicts, categories, pairs=False), "score")
    if reference:
        result |= summary(values_of(verdicts, categories, pairs=True), "win_rate")
    return result, failed


# ---------------------------------------------------------------- the program


def parse_args(argv: list[str]) -> Namespace:
    parser = Parser("open_ended", __doc__)
    parser.add_argument("benchmark", choices=("alpaca", "mt-bench"))
    parser.add_model_flags()
    parser.add_argument("--questions", required=True, metavar="FILE",
                        help="AlpacaEval's (instruction, dataset, output), or FastChat's question.jsonl")
    parser.add_argument("--output", required=True, metavar="FILE",
                        help=".json for alpaca, .jsonl for mt-bench; resumed if OUTPUT.answers exists")
    parser.add_argument("--name", help="of the model in the output; default: its folder, RUN for RUN/final")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT questions")
    parser.add_argument("--batch-size", type=int, default=16, help="answers generated at once")
    parser.add_argument("--max-new-tokens", type=int, help="default: 2048 for alpaca, 1024 for mt-bench")
    parser.add_argument("--seed", type=int, default=0, help="for sampled answers (mt-bench)")
    parser.add_argument("--judge", metavar="MODEL", help="judge the answers with this model")
    parser.add_argument("--judge-workers", type=int, default=8, help="requests at once, per rank")
    parser.add_argument("--judge-prompts", metavar="FILE", help="a file like FastChat's judge_prompts.jsonl")
    parser.add_argument("--reference", metavar="FILE", help="answers to compare with, in --output's format")
    args = parser.parse_args(argv)
    if args.max_new_tokens is None:
        args.max_new_tokens = 2048 if args.benchmark == "alpaca" else 1024
    check_values(args, ("output", "json"), limit=1, batch_size=1, max_new_tokens=1, seed=0, judge_workers=1)
    ending = ".json" if args.benchmark == "alpaca" else ".jsonl"
    if not args.output.endswith(ending):
        raise ValueError(f"--output {args.output}: must end in {ending}, as {args.benchmark}'s tool expects")
    if Path(args.output).exists() and not Path(f"{args.output}.answers").exists():
        raise ValueError(f"--output {args.output}: exists, but without {args.output}.answers to resume from; "
                         "name another file")
    if not args.judge and (args.reference or args.judge_prompts):
        raise ValueError("--reference and --judge-prompts need --judge; give it or leave them out")
    folder = Path(args.model.partition("@")[0]).absolute()
    args.name = args.name or (folder.parent.name if folder.name == "final" else folder.name)
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    device, questions = start_ranks(args), read_questions(args)
    if args.judge:
        # Wrong settings and files are reported before anything is generated.
        connect(args.judge), read_prompts(args.judge_prompts), read_reference(args, questions)
    answers = answer(questions, args, device)
    lines = [line for turns in answers.values() for line in turns]
    result = {"model": args.model, "name": args.name, "benchmark": args.benchmark, "output": args.output,
              "questions": len(questions), "finished": sum(line["finished"] for line in lines),
              "mean_tokens": sum(line["tokens"] for line in lines) / len(lines),
              "mean_characters": sum(len(line["output"]) for line in lines) / len(lines),
              "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    if is_main():
        write_text(args.output, output_text(questions, answers, args))
        print(f"{args.output}: {len(lines):,} answers of {args.name} to {len(questions):,} questions, "
              f"{result['mean_tokens']:.0f} tokens\non average; {result['finished']:,} ended within "
              f"--max-new-tokens {args.max_new_tokens}", flush=True)
    failed: dict[Job, str] = {}
    if args.judge:
        verdicts, failed = judge(questions, answers, args)
        result |= verdicts
    if is_main():
        print_summary(result, "score", "grade, 1 to 10")
        print_summary(result, "win_rate", "win rate, %")
        if result.get("unparsable"):
            print(f"{result['unparsable']:,} replies hold no verdict and are not counted: see "
                  f"{args.output}.judgments")
    write_json(args.json, result)
    if failed:
        reasons = [f"{job}: {reason}" for job, reason in failed.items() if reason != NOT_REQUESTED]
        reasons = reasons[:3] + ["..."] * (len(failed) > 3)
        raise ValueError(f"--judge {args.judge}: {len(failed):,} of {len(failed) + result['verdicts']:,} "
                         f"verdicts are missing ({'; '.join(reasons)}); the same command requests only those")


if __name__ == "__main__":
    run(main)
