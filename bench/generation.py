"""Generation of eval/generate.py next to transformers' generate: equal tokens in fp32, and speed.

    python -m bench.generation --model DIR --data FILE [--prompts 50] [--batch-size 16] [--max-new-tokens 256]

Greedy, with the same prompts and the same stop token. Every run is a process of its own. First fp32, batched
and one by one: how many answers are equal, token by token. Then speed, in what --dtype auto is. Contenders
take turns, because the speed of a machine drifts: a ratio compares two runs of one round. "no guesses" is
ours without guessed tokens. How many guesses are right depends on the answers: a small model's greedy ones
repeat themselves.

transformers gets prompts of similar length together, padded on the left. New tokens/s counts the tokens of
the answers with their stops, from the prompts to the last answer; loading and a short warm-up do not count.
The last line printed is one JSON object with all of it.
"""
import argparse
import json
import operator
import statistics
import time
from itertools import islice
from pathlib import Path

from bench.common import (add_contest_flags, hardware, in_rounds, json_child, make_parser, print_machine,
                          print_table)
from runtime.start import run_program

CONTENDERS = "ours", "no guesses", "transformers"


def run_one(args: argparse.Namespace) -> dict:
    """One run, in the child: {"outputs": ids without the stop, "seconds", "new_tokens", "prompt_tokens"}."""
    import torch

    from chat import render, tokenize
    from eval.common import load, start_ranks
    from eval.engine import LOOKUP
    from records import read_records
    args.date, args.device = "", "cpu"
    # transformers runs as it comes, without our settings of the allocator.
    device = torch.device("cpu") if args.run == "transformers" else start_ranks(args)
    loaded = load(args.model, args, device, cast=True)
    stop = loaded.tokenizer.special[loaded.template.end_of_turn]
    questions = [messages[:-1] if messages[-1]["role"] == "assistant" else messages
                 for messages, _ in islice(read_records(args.data), args.prompts)]
    prompts = [tokenize(render(question, loaded.template, add_generation_prompt=True), loaded.tokenizer)[0]
               for question in questions]

    def answer(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        answers = loaded.engine.answers(prompts, {stop}, tokens, args.batch_size,
                                        lookup=LOOKUP if args.run == "ours" else 0)
        return [ids for _, ids, _ in sorted(answers)]

    def answer_by_transformers(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        order, outputs = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [[] for _ in prompts]
        for start in range(0, len(order), args.batch_size):
            group = order[start:start + args.batch_size]
            longest = max(len(prompts[i]) for i in group)
            padding = [longest - len(prompts[i]) for i in group]
            ids = torch.tensor([[stop] * n + prompts[i] for n, i in zip(padding, group)])
            mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
            generated = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens,
                                       eos_token_id=stop, pad_token_id=stop)[:, longest:].tolist()
            for i, output in zip(group, generated):
                outputs[i] = output[:output.index(stop)] if stop in output else output
        return outputs

    if args.run == "transformers":
        from transformers import AutoModelForCausalLM
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
        model = AutoModelForCausalLM.from_pretrained(loaded.tokenizer.folder, dtype=dtype).eval()
        answer = answer_by_transformers
    answer(prompts[:2], 2)
    began = time.perf_counter()
    outputs = answer(prompts, args.max_new_tokens)
    seconds = time.perf_counter() - began
    new = sum(len(output) + (len(output) < args.max_new_tokens) for output in outputs)
    return {"outputs": outputs, "seconds": seconds, "new_tokens": new,
            "prompt_tokens": sum(map(len, prompts))}


def main(argv: list[str]) -> None:
    parser = make_parser("generation", __doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="records whose last assistant turn is answered")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--only", choices=("equality", "speed"))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help=argparse.SUPPRESS)
    add_contest_flags(parser, CONTENDERS)
    args = parser.parse_args(argv)
    if args.run:
        Path(args.result).write_text(json.dumps(run_one(args)))
        return

    def run(who: str, dtype: str, batch_size: int) -> dict:
        # The last of two values of a flag counts.
        return json_child(["-m", "bench.generation", *argv, "--run", who, "--dtype", dtype, "--batch-size",
                           str(batch_size)], args.threads)

    machine = hardware("transformers")
    print_machine(machine, args.threads)
    result: dict = {"hardware": machine, "batch_size": args.batch_size,
                    "max_new_tokens": args.max_new_tokens}
    if args.only != "speed":
        outputs = {(who, size): run(who, "fp32", size)["outputs"]
                   for who in ("ours", "transformers") for size in (args.batch_size, 1)}
        result["prompts"] = prompts = len(outputs["ours", 1])   # the file may have fewer than --prompts
        pairs = [("ours", args.batch_size, "transformers", args.batch_size), ("ours", 1, "transformers", 1),
                 ("ours", args.batch_size, "ours", 1), ("transformers", args.batch_size, "transformers", 1)]
        result["equal"] = {f"{a} x {m} = {b} x {n}": sum(map(operator.eq, outputs[a, m], outputs[b, n]))
                           for a, m, b, n in pairs}
        print_table(["fp32, prompts at once", "equal", "of"],
                    [[name, str(count), str(prompts)] for name, count in result["equal"].items()],
                    [44, 8, 6])
    if args.only != "equality":
        from runtime.machine import resolve_dtype
        dtype = resolve_dtype("auto", "cpu")
        runs = in_rounds(CONTENDERS, args.rounds, lambda who: run(who, dtype, args.batch_size))
        speeds = {who: [each["new_tokens"] / each["seconds"] for each in runs[who]] for who in CONTENDERS}
        ratios = {who: [a / b for a, b in zip(speeds[who], speeds["transformers"])]
                  for who in ("ours", "no guesses")}
        [first, *_] = runs["ours"]
        result.update(new_tokens_per_second=speeds, ratios=ratios, prompts=len(first["outputs"]),
                      prompt_tokens=first["prompt_tokens"],
                      ratio={who: statistics.median(values) for who, values in ratios.items()})
        print_table([f"{dtype}, new tokens/s", *(f"round {i + 1}" for i in range(args.rounds))],
                    [[who, *(f"{x:.1f}" for x in values)] for who, values in speeds.items()]
                    + [[f"ratio, {who}", *(f"{x:.2f}" for x in values)] for who, values in ratios.items()],
                    [24] + [10] * args.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    run_program(main)
