"""eval/harness.py next to lm-evaluation-harness's own `hf` model: equal numbers in fp32, and speed.

    python -m bench.harness --model DIR --data FILE [--questions 24] [--batch-size 4] [--dtype fp32 bf16]

The task is multiple choice with long contexts, made from records with short answers. A context is as many
instructions with their answers as make --context tokens, and one more instruction, which is to be answered.
Its choices are its own answer and those of three other questions. Every run is a process of its own, and the
two take turns, because the speed of a machine drifts: a ratio compares two runs of one round. hf runs
--batch-size inputs at once, ours rows of --micro-batch-tokens.

Seconds are those of the model's answer to all requests, with tokenization; loading and building the requests
do not count. Differences are between the log-likelihoods of the first round, in nats. The last line printed
is one JSON object with all of it.
"""
import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from bench.common import (add_contest_flags, hardware, in_rounds, json_child, make_parser, print_machine,
                          print_table)
from runtime.start import run_program

CONTENDERS = "ours", "hf"
TASK = """task: long_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def make_task(args: argparse.Namespace, folder: Path) -> int:
    """Write the task and its questions. Returns the tokens of their contexts; ValueError for too few records.
    """
    from records import read_records
    from runtime.tokenizer import Tokenizer
    from runtime.model_folder import resolve_model
    encode, chosen, total, text = Tokenizer(resolve_model(args.model)).reference.encode, [], 0, ""
    for messages, _ in read_records(args.data):
        if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
            continue
        text, answer = text + messages[-2]["content"], messages[-1]["content"].strip()
        size = len(encode(text).ids)
        if size < args.context or not answer:
            text += f"\nAnswer: {answer}\n\n"
            continue
        chosen.append((text, answer))
        total, text = total + size, ""
        if len(chosen) == args.questions:
            break
    else:
        raise ValueError(f"--questions {args.questions}: {args.data} is enough for {len(chosen)} of "
                         f"--context {args.context} tokens; lower one of them")
    rng, answers = random.Random(0), sorted({answer for _, answer in chosen})
    if len(answers) < 4:
        raise ValueError(f"--questions {args.questions}: they have {len(answers)} different answers, and a "
                         "choice needs 4; raise it")
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as out:
        for question, answer in chosen:
            choices = rng.sample([other for other in answers if other != answer], 3) + [answer]
            rng.shuffle(choices)
            out.write(json.dumps({"question": question, "choices": choices,
                                  "label": choices.index(answer)}) + "\n")
    (folder / "task.yaml").write_text(TASK.format(file=folder / "questions.jsonl"))
    return total


def run_one(args: argparse.Namespace) -> dict:
    """One run, in the child: {"seconds", "accuracy", "values": a log-likelihood for each choice}."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    dtype = args.dtype[0]
    if args.run == "ours":
        from eval.harness_model import HarnessModel
        model = HarnessModel(args.model, dtype=dtype, device="cpu",
                             micro_batch_tokens=args.micro_batch_tokens)
    else:
        from lm_eval.models.huggingface import HFLM
        model = HFLM(args.model, device="cpu", dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
                     batch_size=args.batch_size)
    answer, seconds = model.loglikelihood, []

    def timed(requests: list) -> list:
        answer(requests[:4])    # a short warm-up
        started = time.perf_counter()
        found = answer(requests)
        seconds.append(time.perf_counter() - started)
        return found

    model.loglikelihood = timed
    results = simple_evaluate(model=model, tasks=["long_choice"], bootstrap_iters=0,
                              task_manager=TaskManager(include_path=args.task, include_defaults=False))
    return {"seconds": seconds[0], "accuracy": results["results"]["long_choice"]["acc,none"],
            "values": [value for sample in results["samples"]["long_choice"]
                       for ((value, _),) in sample["resps"]]}


def main(argv: list[str]) -> None:
    parser = make_parser("harness", __doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="records with long instructions and short answers")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--context", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--task", help=argparse.SUPPRESS)
    add_contest_flags(parser, CONTENDERS)
    args = parser.parse_args(argv)
    if args.run:
        Path(args.result).write_text(json.dumps(run_one(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_task(args, Path(folder))
        machine = hardware("transformers", "lm_eval")
        print_machine(machine, args.threads)
        result: dict = {"hardware": machine, "questions": args.questions, "context_tokens": tokens,
                        "batch_size": args.batch_size}

        def run(who: str) -> dict:
            return json_child(["-m", "bench.harness", "--run", who, "--dtype", dtype, "--task", folder,
                               "--model", args.model, "--data", args.data,
                               "--batch-size", str(args.batch_size),
                               "--micro-batch-tokens", str(args.micro_batch_tokens)], args.threads)

        for dtype in args.dtype:
            runs = in_rounds(CONTENDERS, args.rounds, run)
            ratios = [hf["seconds"] / ours["seconds"] for ours, hf in zip(*runs.values())]
            largest = max(abs(a - b) for a, b in zip(*(of_who[0]["values"] for of_who in runs.values())))
            result[dtype] = {"seconds": {who: [each["seconds"] for each in runs[who]] for who in runs},
                             "ratios": ratios, "ratio": statistics.median(ratios),
                             "largest_difference": largest,
                             "accuracy": {who: runs[who][0]["accuracy"] for who in runs}}
            rows = [[who, *(f"{each['seconds']:.1f}" for each in of_who), f"{of_who[0]['accuracy']:.3f}"]
                    for who, of_who in runs.items()]
            print_table([f"{dtype}, seconds", *(f"round {i + 1}" for i in range(args.rounds)), "accuracy"],
                        [*rows, ["ratio", *(f"{x:.2f}" for x in ratios), ""]],
                        [24] + [10] * (args.rounds + 1))
            print(f"largest difference of a log-likelihood: {largest:.1e} nats\n")
    print(json.dumps(result))


if __name__ == "__main__":
    run_program(main)
