"""Answers to AlpacaEval's and MT-Bench's questions, as their own tools read them, and a judge's verdicts.

    python -m eval.open_ended alpaca --model RUN/final --questions alpaca_eval.json --output outputs.json
    python -m eval.open_ended mt-bench --model RUN/final --questions question.jsonl --output NAME.jsonl
    python -m eval.open_ended ... --judge MODEL [--reference OTHER]

alpaca: greedy answers in a file for `alpaca_eval --model_outputs`, version 1 or 2. mt-bench: two turns, the
second in a conversation that holds the first answer, at FastChat's temperature for the question's category,
in a file for FastChat's data/mt_bench/model_answer. A sample depends on --seed, question and turn, not on
what runs beside it. Answers are kept in OUTPUT.answers as they come, and the same command goes on from
there; under torchrun the ranks share the work.

--judge has a model of $OPENAI_BASE_URL's judge them (judge.py). Pairs are judged in both orders; verdicts
that are not for the same side make a tie. The win rate is wins and half the ties, in percent of the pairs
with both verdicts. alpaca: against the outputs in the question file, or in --reference FILE;
length-controlled win rates are left to alpaca_eval. mt-bench: a grade from 1 to 10 a turn, and pairs against
the answers in --reference FILE if it is given; mathematics, coding and reasoning with the question's
reference answers at hand where it has some. Our prompts are not the benchmarks', nor then are the figures:
--judge-prompts takes FastChat's own. Verdicts are kept in OUTPUT.judgments.
"""
import json
import time
from argparse import Namespace
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import torch

from chat import Tokenizer, load_template, render, tokenize
from eval.answers import Answers, as_line, made_with
from eval.chat_completions import ChatModel
from eval.common import (Loaded, Parser, check_values, load, progress, read_objects, run,
                         start_ranks, write_json)
from eval.engine import Sampling
from eval.judge import Job, judge_all, make_jobs, print_summary, read_prompts, summary, values_of
from runtime.files import write_text
from runtime.weights import resolve_model
from runtime.distributed import is_main

# FastChat's, by category (its fastchat/llm_judge/common.py); 0.7 for any other
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
                "humanities": 0.1}
CHECKED = ("math", "coding", "reasoning")   # categories that FastChat judges with a correct answer at hand


def read_questions(args: Namespace) -> list[dict]:
    """[{"id", "turns": [text], "category", "temperature", "reference": correct answers or None}]."""
    if args.benchmark == "alpaca":
        lines = read_objects(args.questions, ("instruction",), "a question", args.limit)
        if wrong := [i for i, line in enumerate(lines) if not isinstance(line["instruction"], str)]:
            raise ValueError(f"{args.questions}: the instruction of question {wrong[0]} is no text")
        return [{"id": i, "turns": [line["instruction"]], "category": line.get("dataset", ""),
                 "temperature": 0.0, "reference": None} for i, line in enumerate(lines)]
    questions = []
    for line in read_objects(args.questions, ("question_id", "category", "turns"), "a question", args.limit):
        name, turns, given = line["question_id"], line["turns"], line.get("reference") or []
        if not (isinstance(name, int) and name >= 0 and isinstance(turns, list) and len(turns) in (1, 2)
                and all(isinstance(text, str) for text in turns)):
            raise ValueError(f"{args.questions}: question {name!r} must have a whole number as its "
                             "question_id, and one or two turns of text")
        checked = line["category"] in CHECKED and len(given) >= len(turns)
        questions.append({"id": name, "turns": turns, "category": line["category"],
                          "temperature": TEMPERATURES.get(line["category"], 0.7),
                          "reference": given if checked else None})
    if len({question["id"] for question in questions}) < len(questions):
        raise ValueError(f"{args.questions}: has several questions of one question_id")
    return questions


# ---------------------------------------------------------------- answers


def answer(questions: list[dict], args: Namespace, device: torch.device) -> dict[int, list[dict]]:
    """{question: [{"question", "turn", "output", "tokens", "finished", "time"}, one a turn]}, made now or
    found beside --output."""
    tokenizer = Tokenizer(resolve_model(args.model))
    template = load_template(args.template, tokenizer, args.date)
    names = ["benchmark", "model", "dtype", "max_new_tokens"] + ["seed"] * (args.benchmark == "mt-bench")
    answers = Answers(f"{args.output}.answers", lambda line: (line["question"], line["turn"]),
                      made_with(args, names, template, args.questions))
    asked = {(question["id"], turn): question
             for question in questions for turn in range(len(question["turns"]))}
    loaded = None
    for turn in (0, 1):     # the second ones need the first
        mine = answers.missing(key for key in asked if key[1] == turn)
        if mine:
            loaded = loaded or load(args.model, args, device, cast=True)
            for line in progress(answer_turn(loaded, mine, asked, answers, args), len(mine), "answer"):
                answers.add(line)
        answers.merge()
    return {question["id"]: [answers.lines[question["id"], turn] for turn in range(len(question["turns"]))]
            for question in questions}


def answer_turn(loaded: Loaded, keys: list[tuple[int, int]], asked: dict[tuple[int, int], dict],
                answers: Answers, args: Namespace) -> Iterator[dict]:
    """The lines of keys, (question, turn), as they are done, those of one temperature after the other."""
    for temperature in sorted({asked[key]["temperature"] for key in keys}):
        some = [key for key in keys if asked[key]["temperature"] == temperature]
        prompts = [prompt_of(loaded, asked[key], key[1], answers, args) for key in some]
        made = loaded.engine.answers(prompts, loaded.stop_ids, args.max_new_tokens, args.batch_size,
                                     Sampling(temperature, seed=args.seed), some)
        for i, ids, finished in made:
            yield {"question": some[i][0], "turn": some[i][1],
                   "output": loaded.answer(ids).strip(),
                   "tokens": len(ids), "finished": finished, "time": time.time()}


def prompt_of(loaded: Loaded, question: dict, turn: int, answers: Answers, args: Namespace) -> list[int]:
    """The conversation up to this turn, with the answers that came before it, as ids."""
    messages = []
    for n, text in enumerate(question["turns"][:turn + 1]):
        messages.append({"role": "user", "content": text})
        if n < turn:
            messages.append({"role": "assistant", "content": answers.lines[question["id"], n]["output"]})
    try:
        return tokenize(render(messages, loaded.template, add_generation_prompt=True), loaded.tokenizer)[0]
    except ValueError as error:
        raise ValueError(f"{args.questions}: question {question['id']}, turn {turn + 1}: {error}") from None


def alpaca_outputs(questions: list[dict], answers: dict[int, list[dict]], name: str) -> str:
    """The text of AlpacaEval's model_outputs.json."""
    outputs = [{"dataset": question["category"], "instruction": question["turns"][0],
                "output": answers[question["id"]][0]["output"], "generator": name} for question in questions]
    return json.dumps(outputs, indent=2, ensure_ascii=False) + "\n"


def fastchat_answers(questions: list[dict], answers: dict[int, list[dict]], name: str) -> str:
    """The text of a file of FastChat's model_answer. answer_id, random there, is a hash here."""
    text = ""
    for lines in (answers[question["id"]] for question in questions):
        number, turns = lines[0]["question"], [line["output"] for line in lines]
        identity = sha256(json.dumps([name, number, turns]).encode()).hexdigest()[:22]
        text += as_line({"question_id": number, "answer_id": identity, "model_id": name,
                         "choices": [{"index": 0, "turns": turns}], "tstamp": lines[-1]["time"]})
    return text


# ---------------------------------------------------------------- judgement


def read_reference(args: Namespace, questions: list[dict]) -> dict[int, list[str]] | None:
    """{question: the turns of the answers to compare with}, or None if there is nothing to compare with."""
    if args.benchmark == "mt-bench":
        if not args.reference:
            return None
        lines = read_objects(args.reference, ("question_id", "choices"), "an answer")
        try:
            found = {line["question_id"]: line["choices"][0]["turns"] for line in lines}
        except (LookupError, TypeError):
            raise ValueError(f"--reference {args.reference}: an answer must have choices, the first of which "
                             "has turns") from None
        wanted = {question["id"]: question["id"] for question in questions}
    else:
        file = args.reference or args.questions
        found = {line["instruction"]: [line["output"]]
                 for line in read_objects(file, ("instruction", "output"), "a model output")}
        wanted = {question["id"]: question["turns"][0] for question in questions}
    for question in questions:
        if len(found.get(wanted[question["id"]], [])) < len(question["turns"]):
            raise ValueError(f"--reference {args.reference or args.questions}: has no answer to question "
                             f"{question['id']}: {question['turns'][0][:60]!r}")
    return {number: found[key] for number, key in wanted.items()}


def judge(questions: list[dict], answers: dict[int, list[dict]], args: Namespace
          ) -> tuple[dict, dict[Job, str]]:
    """What to report of the verdicts, and the jobs that have none, with the reasons."""
    prompts, against = read_prompts(args.judge_prompts), read_reference(args, questions)
    jobs: list[Job] = []
    for question in questions:
        turns = [line["output"] for line in answers[question["id"]]]
        if args.benchmark == "mt-bench":
            jobs += make_jobs(question, turns, None, prompts)
        if against:
            jobs += make_jobs(question, turns, against[question["id"]], prompts)
    verdicts, refused = judge_all(args.judge, jobs, f"{args.output}.judgments", args.judge_workers)
    categories = {question["id"]: question["category"] for question in questions}
    result = {"judge": args.judge, "judge_prompts": args.judge_prompts, "verdicts": len(verdicts),
              "unparsable": list(verdicts.values()).count(None), "missing": len(refused)}
    if args.benchmark == "mt-bench":
        result |= summary(values_of(verdicts, categories, pairs=False), "score")
    if against:
        result |= summary(values_of(verdicts, categories, pairs=True), "win_rate")
    return result, refused


# ---------------------------------------------------------------- the program


def parse_args(argv: list[str]) -> Namespace:
    parser = Parser("open_ended", __doc__)
    parser.add_argument("benchmark", choices=("alpaca", "mt-bench"))
    parser.add_model_flags()
    parser.add_argument("--questions", required=True, metavar="FILE",
                        help="AlpacaEval's (instruction, dataset, output), or FastChat's question.jsonl")
    parser.add_argument("--output", required=True, metavar="FILE",
                        help=".json for alpaca, .jsonl for mt-bench; what is beside it is gone on from")
    parser.add_argument("--name", help="of the model in the output; default: its folder's, RUN for RUN/final")
    parser.add_argument("--limit", type=int, help="only so many questions")
    parser.add_argument("--batch-size", type=int, default=16, help="answers at once")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer; default: 2048 and 1024, as theirs")
    parser.add_argument("--seed", type=int, default=0, help="of sampled answers (mt-bench)")
    parser.add_argument("--judge", metavar="MODEL", help="let it judge: a model of $OPENAI_BASE_URL's")
    parser.add_argument("--judge-workers", type=int, default=8, help="requests at once, of each rank")
    parser.add_argument("--judge-prompts", metavar="FILE", help="like FastChat's judge_prompts.jsonl")
    parser.add_argument("--reference", metavar="FILE", help="answers to compare with, of --output's format")
    args = parser.parse_args(argv)
    if args.max_new_tokens is None:
        args.max_new_tokens = 2048 if args.benchmark == "alpaca" else 1024
    check_values(args, ("output", "json"), limit=1, batch_size=1, max_new_tokens=1, seed=0, judge_workers=1)
    ending = ".json" if args.benchmark == "alpaca" else ".jsonl"
    if not args.output.endswith(ending):
        raise ValueError(f"--output {args.output}: must end in {ending}, by which {args.benchmark}'s own "
                         "tool knows it")
    if Path(args.output).exists() and not Path(f"{args.output}.answers").exists():
        raise ValueError(f"--output {args.output}: is there, but no {args.output}.answers to go on from; "
                         "name another file")
    if not args.judge and (args.reference or args.judge_prompts):
        raise ValueError("--reference and --judge-prompts need --judge; give it or leave them out")
    folder = Path(args.model.partition("@")[0]).absolute()
    args.name = args.name or (folder.parent.name if folder.name == "final" else folder.name)
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    device, questions = start_ranks(args), read_questions(args)
    if args.judge:      # what can be wrong with it, before anything is answered
        ChatModel(args.judge), read_prompts(args.judge_prompts), read_reference(args, questions)
    answers = answer(questions, args, device)
    lines = [line for turns in answers.values() for line in turns]
    result = {"model": args.model, "name": args.name, "benchmark": args.benchmark, "output": args.output,
              "questions": len(questions), "finished": sum(line["finished"] for line in lines),
              "mean_tokens": sum(line["tokens"] for line in lines) / len(lines),
              "mean_characters": sum(len(line["output"]) for line in lines) / len(lines),
              "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    if is_main():
        as_text = alpaca_outputs if args.benchmark == "alpaca" else fastchat_answers
        write_text(args.output, as_text(questions, answers, args.name))
        print(f"{args.output}: {len(lines):,} answers of {args.name} to {len(questions):,} questions, "
              f"{result['mean_tokens']:.0f} tokens\non average; {result['finished']:,} ended within "
              f"--max-new-tokens {args.max_new_tokens}", flush=True)
    refused: dict[Job, str] = {}
    if args.judge:
        verdicts, refused = judge(questions, answers, args)
        result |= verdicts
    if is_main():
        print_summary(result, "score", "grade, 1 to 10")
        print_summary(result, "win_rate", "win rate, %")
        if result.get("unparsable"):
            print(f"{result['unparsable']:,} replies hold no verdict and are not counted: see "
                  f"{args.output}.judgments")
    write_json(args.json, result)
    if refused:
        some = "; ".join(f"{job}: {why}" for job, why in list(refused.items())[:3])
        some += "; ..." * (len(refused) > 3)
        raise ValueError(f"--judge {args.judge}: {len(refused):,} of {len(refused) + result['verdicts']:,} "
                         f"verdicts are missing ({some}); the same command asks for them alone")


if __name__ == "__main__":
    run(main)
