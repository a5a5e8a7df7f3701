"""eval/generate.py beside transformers' generate: the same tokens in fp32, and speed in bf16.

    python -m bench.generation --model DIR --data FILE [--prompts 50] [--batch-size 16] [--max-new-tokens 256]

Greedy, with the same prompts and the same stop. Every run is a process of its own. First in fp32, batched and
one by one: how many answers are equal token by token. Then in bf16, in turn and back, because a machine's
speed drifts: ratios are between runs of one round. "no guesses" is ours without guessed tokens; how many
guesses are right depends on the answers: a small model's greedy ones repeat themselves.
transformers gets prompts of like length together, padded on the left. new tokens/s counts the answers' tokens
with their stops, over the time from the prompts to the last answer; loading and a short warm-up are outside.
The last line printed is one JSON object with all of it.
"""
import argparse
import json
import statistics
import time
from itertools import islice
from pathlib import Path

from bench.common import cores, hardware, json_child, print_table


def run_here(args: argparse.Namespace) -> dict:
    """One run, in the child: {"outputs": ids without the stop, "seconds", "new_tokens"}."""
    import torch

    from chat import Tokenizer, load_template, read_records, render, tokenize
    from model import load_model
    from runtime.weights import resolve_model
    folder, dtype = resolve_model(args.model), getattr(torch, args.dtype)
    tokenizer = Tokenizer(folder)
    template = load_template(args.template, tokenizer)
    questions = [messages[:-1] if messages[-1]["role"] == "assistant" else messages
                 for messages, _ in islice(read_records(args.data), args.prompts)]
    prompts = [tokenize(render(question, template, add_generation_prompt=True), tokenizer)[0]
               for question in questions]
    stop = tokenizer.special[template.end_of_turn]
    if args.run != "transformers":
        from eval.common import make_engine
        from eval.engine import LOOKUP
        from runtime.machine import keep_freed_memory
        keep_freed_memory(shapes=1024)      # as eval.generate does
        engine = make_engine(load_model(folder).requires_grad_(False).to(dtype))

        def answer(some: list[list[int]], tokens: int) -> list[list[int]]:
            made = engine.answers(some, {stop}, tokens, args.batch_size,
                                  lookup=LOOKUP if args.run == "ours" else 0)
            return [ids for _, ids, _ in sorted(made)]
    else:
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

        def answer(some: list[list[int]], tokens: int) -> list[list[int]]:
            order, outputs = sorted(range(len(some)), key=lambda i: len(some[i])), [[] for _ in some]
            for start in range(0, len(order), args.batch_size):
                group = order[start:start + args.batch_size]
                longest = max(len(some[i]) for i in group)
                ids = torch.tensor([[stop] * (longest - len(some[i])) + some[i] for i in group])
                real = torch.tensor([[0] * (longest - len(some[i])) + [1] * len(some[i]) for i in group])
                made = model.generate(ids, attention_mask=real, do_sample=False, max_new_tokens=tokens,
                                      eos_token_id=stop, pad_token_id=stop)[:, longest:].tolist()
                for i, output in zip(group, made):
                    outputs[i] = output[:output.index(stop)] if stop in output else output
            return outputs

    answer(prompts[:2], 2)
    started = time.perf_counter()
    outputs = answer(prompts, args.max_new_tokens)
    seconds = time.perf_counter() - started
    new = sum(len(output) + (len(output) < args.max_new_tokens) for output in outputs)
    return {"outputs": outputs, "seconds": seconds, "new_tokens": new,
            "prompt_tokens": sum(map(len, prompts))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="records whose last assistant turn is answered")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--only", choices=("equality", "speed"))
    parser.add_argument("--run", choices=("ours", "no guesses", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        Path(args.result).write_text(json.dumps(run_here(args)))
        return

    def apart(who: str, dtype: str, batch_size: int) -> dict:
        return json_child(["-m", "bench.generation", "--run", who, "--dtype", dtype, "--batch-size",
                           str(batch_size), "--model", args.model, "--data", args.data, "--template",
                           args.template, "--prompts", str(args.prompts), "--max-new-tokens",
                           str(args.max_new_tokens)], args.threads)

    result: dict = {"prompts": args.prompts, "batch_size": args.batch_size,
                    "max_new_tokens": args.max_new_tokens, **hardware("transformers")}
    if args.only != "speed":
        runs = {(who, size): apart(who, "float32", size)["outputs"]
                for who in ("ours", "transformers") for size in (args.batch_size, 1)}
        pairs = [("ours", args.batch_size, "transformers", args.batch_size), ("ours", 1, "transformers", 1),
                 ("ours", args.batch_size, "ours", 1), ("transformers", args.batch_size, "transformers", 1)]
        result["equal"] = {f"{a} x {m} = {b} x {n}": sum(x == y for x, y in zip(runs[a, m], runs[b, n]))
                           for a, m, b, n in pairs}
        print_table(["fp32, prompts at once", "equal", "of"],
                    [[name, str(count), str(args.prompts)] for name, count in result["equal"].items()],
                    [44, 8, 6])
    if args.only != "equality":
        speeds: dict[str, list[float]] = {"ours": [], "no guesses": [], "transformers": []}
        for i in range(args.rounds):
            for who in list(speeds) if i % 2 == 0 else reversed(speeds):
                run = apart(who, "bfloat16", args.batch_size)
                speeds[who].append(run["new_tokens"] / run["seconds"])
        ratios = {who: [a / b for a, b in zip(speeds[who], speeds["transformers"])]
                  for who in ("ours", "no guesses")}
        result.update(new_tokens_per_second=speeds, ratios=ratios, prompt_tokens=run["prompt_tokens"],
                      ratio={who: statistics.median(values) for who, values in ratios.items()})
        print_table(["bf16, new tokens/s", *(f"round {i + 1}" for i in range(args.rounds))],
                    [[who, *(f"{x:.1f}" for x in values)] for who, values in speeds.items()]
                    + [[f"ratio, {who}", *(f"{x:.2f}" for x in values)] for who, values in ratios.items()],
                    [24] + [10] * args.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
