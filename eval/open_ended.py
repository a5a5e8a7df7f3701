"""Answers to AlpacaEval's and MT-Bench's questions, for their own tools, and a judge's verdicts on them.

    python -m eval.open_ended alpaca --model RUN/final --questions alpaca_eval.json --output outputs.json
    python -m eval.open_ended mt-bench --model RUN/final --questions question.jsonl --output NAME.jsonl
    python -m eval.open_ended ... --judge MODEL [--reference OTHER]

alpaca: greedy answers, for `alpaca_eval --model_outputs`. mt-bench: two turns at FastChat's temperatures, for
its data/mt_bench/model_answer. Answers are written to OUTPUT.answers as they come, verdicts (judge.py) to
OUTPUT.judgments; the same command resumes from there. Under torchrun the ranks share the work.

alpaca: pairs against the outputs in the question file or in --reference. mt-bench: a grade from 1 to 10 per
turn, and pairs against the answers in --reference. docs/evaluation.md says how pairs are counted.
"""
from argparse import Namespace
from pathlib import Path

from eval.flags import Parser, answer_command, check_paths
from runtime.flags import flag_name, number

# benchmark: the ending of the output's name, as its tool expects; the default of --max-new-tokens
BENCHMARKS = {"alpaca": (".json", 2048), "mt-bench": (".jsonl", 1024)}


def parse_args(argv: list[str]) -> Namespace:
    parser = Parser("open_ended", __doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_model_flags()
    parser.add_argument("--questions", required=True, metavar="FILE",
                        help="AlpacaEval's (instruction, dataset, output), or FastChat's question.jsonl")
    parser.add_argument("--output", required=True, metavar="FILE",
                        help=".json for alpaca, .jsonl for mt-bench; resumed if OUTPUT.answers exists")
    parser.add_argument("--name", help="of the model in the output; default: its folder, RUN for RUN/final")
    parser.add_answer_flags(None, "default: 2048 for alpaca, 1024 for mt-bench")
    parser.add_argument("--judge", metavar="MODEL", help="judge the answers with this model")
    parser.add_argument("--judge-workers", type=number(int, 1, 10**4), default=8,
                        help="requests at once, per rank")
    parser.add_argument("--judge-prompts", metavar="FILE", help="a file like FastChat's judge_prompts.jsonl")
    parser.add_argument("--reference", metavar="FILE", help="answers to compare with, in --output's format")
    args = parser.parse_args(argv)
    ending, max_new_tokens = BENCHMARKS[args.benchmark]
    if args.max_new_tokens is None:
        args.max_new_tokens = max_new_tokens
    check_paths(args, "output", "json")
    if not args.output.endswith(ending):
        raise ValueError(f"--output {args.output}: must end in {ending}, as {args.benchmark}'s tool expects")
    if Path(args.output).exists() and not Path(f"{args.output}.answers").exists():
        raise ValueError(f"--output {args.output}: exists, but without {args.output}.answers to resume from; "
                         "name another file")
    for name in ("reference", "judge_prompts") if not args.judge else ():
        if value := getattr(args, name):
            raise ValueError(f"{flag_name(name)} {value}: needs --judge; give that too, or leave it out")
    folder = Path(args.model.partition("@")[0]).absolute()
    args.name = args.name or (folder.parent.name if folder.name == "final" else folder.name)
    return args


answer_command(__name__, parse_args)

import json
import time

import torch

from eval.answers import Answers, as_line, made_with
from eval.chat_model import ChatModel
from eval.common import load, open_checkpoint, progress, read_objects, run, start_ranks, write_result
from eval.engine import Sampling
from eval.judge import Job, judge_all, make_jobs, read_prompts, summary, table, values_of
from records import naming
from runtime.distributed import is_main
from runtime.files import write_text
from runtime.report import counted, say
from runtime.start import fit

# FastChat's temperatures by category (its fastchat/llm_judge/common.py); 0.7 for any other
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
                "humanities": 0.1}
# categories that FastChat judges with a correct answer at hand
CHECKED = ("math", "coding", "reasoning")


def are_turns(texts: object, least: int = 1) -> bool:
    return (isinstance(texts, list) and least <= len(texts) <= 2
            and all(isinstance(text, str) for text in texts))


def read_questions(args: Namespace) -> list[dict]:
    """[{"id", "turns": [text], "category", "temperature", "correct": answers or []}]."""
    if args.benchmark == "alpaca":
        lines = read_objects(args.questions, {"instruction": str}, "a question", args.limit)
        return [{"id": i, "turns": [line["instruction"]], "category": str(line.get("dataset", "")),
                 "temperature": 0.0, "correct": []} for i, line in enumerate(lines)]
    fields = {"question_id": int, "category": str, "turns": list}
    questions: dict[int, dict] = {}
    for line in read_objects(args.questions, fields, "a question", args.limit):
        name, category, turns = line["question_id"], line["category"], line["turns"]
        if name < 0 or name in questions or not are_turns(turns):
            raise ValueError(f"{args.questions}: question {name} must have a number of its own, 0 or more, "
                             "and one or two turns of text")
        checked = category in CHECKED and are_turns(line.get("reference"), len(turns))
        questions[name] = {"id": name, "turns": turns, "category": category,
                             "temperature": TEMPERATURES.get(category, 0.7),
                             "correct": line["reference"] if checked else []}
    return list(questions.values())


def read_reference(args: Namespace, questions: list[dict]) -> dict[int, list[str]]:
    """{question: the turns of the answer to compare with}; empty for mt-bench without --reference."""
    alpaca = args.benchmark == "alpaca"
    file = args.reference or (args.questions if alpaca else None)
    if not file:
        return {}
    fields = {"instruction": str, "output": str} if alpaca else {"question_id": int, "choices": list}
    fix = "" if args.reference else "; give --reference FILE, answers to compare with"
    try:
        lines = read_objects(file, fields, "an answer")
        found: dict[object, list] = {}
        for line in lines:
            if alpaca:
                # An instruction may occur several times, each with an output of its own.
                found.setdefault(line["instruction"], []).append([line["output"]])
            else:
                found[line["question_id"]] = [line["choices"][0]["turns"]]
    except ValueError as error:
        raise ValueError(f"{'--reference' if args.reference else '--questions'} {error}{fix}") from None
    except (LookupError, TypeError):
        raise ValueError(f"--reference {file}: not FastChat's answers, choices must be "
                         '[{"turns": [text, ...]}]') from None
    reference = {}
    for question in questions:
        own = found.get(question["turns"][0] if alpaca else question["id"], [None])
        reference[question["id"]] = turns = own.pop(0) if len(own) > 1 else own[0]
        if not are_turns(turns, len(question["turns"])):
            # Of a question file every question has an answer.
            raise ValueError(f"--reference {file}: has no answer to question {question['id']}: "
                             f"{question['turns'][0][:60]!r}")
    return reference


def answer(questions: list[dict], args: Namespace, device: torch.device) -> dict[int, list[dict]]:
    """{question: [{"question", "turn", "output", "tokens", "finished"}, one per turn]}; read from
    OUTPUT.answers or generated."""
    _, tokenizer, template = open_checkpoint(args.model, args)
    flags = ("benchmark", "model", "dtype", "max_new_tokens", "seed")
    answers = Answers(f"{args.output}.answers", lambda line: (line["question"], line["turn"]),
                      made_with(args, flags, tokenizer, template, args.questions))
    loaded, conversations = None, {question["id"]: [] for question in questions}
    # All first turns before any second one, which continues the first.
    for turn in (0, 1):
        by_key = {(question["id"], turn): question for question in questions if turn < len(question["turns"])}
        for (name, _), question in by_key.items():
            conversations[name].append({"role": "user", "content": question["turns"][turn]})
        missing = answers.missing(by_key)
        if missing:
            loaded = loaded or load(args.model, args, device, cast=True)
        for temperature in sorted({by_key[key]["temperature"] for key in missing}):
            keys = [key for key in missing if by_key[key]["temperature"] == temperature]
            prompts = []
            for name, _ in keys:
                with naming(f"{args.questions}: question {name}"):
                    prompts.append(loaded.prompt(conversations[name]))
            generated = loaded.engine.answers(prompts, loaded.stop_ids, args.max_new_tokens, args.batch_size,
                                              Sampling(temperature, seed=args.seed), keys)
            for i, ids, finished in progress(generated, len(keys), "answer"):
                answers.add({"question": keys[i][0], "turn": turn, "output": loaded.answer(ids).strip(),
                             "tokens": len(ids), "finished": finished})
        answers.merge()
        for name, _ in by_key:
            output = answers.lines[name, turn]["output"]
            conversations[name].append({"role": "assistant", "content": output})
    return {question["id"]: [answers.lines[question["id"], turn] for turn in range(len(question["turns"]))]
            for question in questions}


def output_text(questions: list[dict], answers: dict[int, list[dict]], args: Namespace) -> str:
    """AlpacaEval's model_outputs.json, or a file for FastChat's model_answer, as text."""
    texts = {question: [line["output"] for line in lines] for question, lines in answers.items()}
    if args.benchmark == "alpaca":
        outputs = [{"dataset": question["category"], "instruction": question["turns"][0],
                    "output": texts[question["id"]][0], "generator": args.name} for question in questions]
        return json.dumps(outputs, indent=2, ensure_ascii=False) + "\n"
    return "".join(as_line({"question_id": question, "answer_id": f"{args.name}-{question}",
                            "model_id": args.name, "choices": [{"index": 0, "turns": turns}],
                            "tstamp": time.time()}) for question, turns in texts.items())


def judge(model: ChatModel, questions: list[dict], answers: dict[int, list[dict]], prompts: dict[str, dict],
          reference: dict[int, list[str]], args: Namespace) -> tuple[dict, dict[Job, str]]:
    """What to report of the verdicts, and why some are missing."""
    jobs: list[Job] = []
    for question in questions:
        turns = [line["output"] for line in answers[question["id"]]]
        if args.benchmark == "mt-bench":
            jobs += make_jobs(question, turns, None, prompts)
        if reference:
            jobs += make_jobs(question, turns, reference[question["id"]], prompts)
    verdicts, reasons = judge_all(model, jobs, f"{args.output}.judgments", args.judge_workers)
    result = {"judge": args.judge, "judge_prompts": args.judge_prompts, "verdicts": len(verdicts),
              "unparsable": list(verdicts.values()).count(None), "missing": len(jobs) - len(verdicts)}
    if args.benchmark == "mt-bench":
        result |= summary(values_of(verdicts, pairs=False), "score")
    if reference:
        result |= summary(values_of(verdicts, pairs=True), "win_rate")
    return result, reasons


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    device, questions = start_ranks(args), read_questions(args)
    if args.judge:
        # Wrong settings and files are reported before anything is generated.
        model, prompts = ChatModel(args.judge), read_prompts(args.judge_prompts)
        reference = read_reference(args, questions)
    answers = answer(questions, args, device)
    lines = [line for turns in answers.values() for line in turns]
    result = {"model": args.model, "name": args.name, "benchmark": args.benchmark, "output": args.output,
              "questions": len(questions), "finished": sum(line["finished"] for line in lines),
              "mean_tokens": sum(line["tokens"] for line in lines) / len(lines),
              "mean_characters": sum(len(line["output"]) for line in lines) / len(lines),
              "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    if is_main():
        write_text(args.output, output_text(questions, answers, args))
        say(fit(f"{args.output}: {counted(len(lines), 'answer')} of {args.name} to "
                f"{counted(len(questions), 'question')}, {result['mean_tokens']:.0f} tokens on average; "
                f"{result['finished']:,} ended within --max-new-tokens {args.max_new_tokens}"))
    if args.judge:
        verdicts, reasons = judge(model, questions, answers, prompts, reference, args)
        result |= verdicts
        for name, title in (("score", "grade, 1 to 10"), ("win_rate", "win rate, %")):
            if result.get(name) is not None:
                say(f"\n{title}\n{table(result, name)}")
        if result["unparsable"]:
            say(fit(f"{result['unparsable']:,} replies hold no verdict and are not counted: see "
                    f"{args.output}.judgments"))
    write_result(args.json, result, [args.model])
    if result.get("missing"):
        shown = "; ".join(f"{job}: {reason}" for job, reason in list(reasons.items())[:3])
        raise ValueError(f"--judge {args.judge}: {result['missing']:,} verdicts are missing ({shown}"
                         f"{'; ...' * (result['missing'] > 3)}); the same command requests only those")


if __name__ == "__main__":
    run(main)
