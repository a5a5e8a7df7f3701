"""Answers of a checkpoint, greedy or sampled: to the records of a file, to one prompt, or in a conversation.

    python -m eval.generate --model RUN/final --data test.jsonl --output answers.jsonl
    python -m eval.generate --model RUN/final --prompt "Name three colours."
    python -m eval.generate --model RUN/final --chat

--output is appended to as answers come, and the same command resumes where it was interrupted. Under torchrun
the ranks divide the records. engine.py has how tokens are generated.
"""
from argparse import Namespace

from eval.flags import LOOKUP, Parser, answer_command, check_paths
from runtime.flags import number
from runtime.start import world_size


def parse_args(argv: list[str]) -> Namespace:
    parser = Parser("generate", __doc__)
    parser.add_model_flags()
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="FILE", help="records, in any layout that train.py reads")
    what.add_argument("--prompt", metavar="TEXT")
    what.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_columns_flag()
    parser.add_argument("--system", metavar="TEXT", help="system message for --prompt and --chat")
    parser.add_answer_flags()
    parser.add_sampling_flags()
    parser.add_argument("--top-k", type=number(int, 0), default=0,
                        help="sample from so many likeliest; 0: all")
    parser.add_argument("--prompt-lookup-num-tokens", type=number(int, 0), default=LOOKUP, metavar="N",
                        help="the most tokens to guess in a step from what stands before; changes speed only")
    parser.add_argument("--output", metavar="FILE", help="JSONL, resumed if it is there; default: print")
    args = parser.parse_args(argv)
    check_paths(args, "output", "json")
    if not args.temperature and (args.top_p < 1 or args.top_k or args.samples > 1):
        raise ValueError("--temperature 0 takes the likeliest token, so --top-p, --top-k and --samples "
                         "change nothing; give --temperature 1")
    if args.data and args.system is not None:
        raise ValueError("--system: with --data the records hold the system messages; leave it out")
    if not args.data and (args.limit or args.output or args.json or args.samples > 1 or world_size() > 1):
        raise ValueError("--limit, --samples, --output, --json and torchrun need --data; leave them out")
    return args


answer_command(__name__, parse_args)

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice

from chat import Template, is_trained_answer, render, tokenize, tokenize_batch
from runtime.tokenizer import Tokenizer
from eval.answers import Answers, as_line, made_with
from eval.common import Loaded, load, progress, run, start_ranks, write_result
from eval.engine import Engine, Sampling
from eval.likelihood import shared_prefix
from model import Llama
from records import naming, read_all, to_messages
from runtime.distributed import is_main
from runtime.foreign import printable
from runtime.report import say


def generate(engine: Engine, prompts: list[list[int]], stop: set[int], max_new_tokens: int,
             batch_size: int = 64, progress: Callable = iter) -> list[list[int]]:
    """The greedy continuation of each prompt, in order, up to and excluding the first id of `stop`. progress:
    wraps what ends one after the other, as tqdm does."""
    outputs: list[list[int]] = [[] for _ in prompts]
    for i, ids, _ in progress(engine.answers(prompts, stop, max_new_tokens, batch_size)):
        outputs[i] = ids
    return outputs


def answer_records(model: Llama, tokenizer: Tokenizer, template: Template, names: list[str], limit: int,
                   columns: Iterable[str] = ()) -> list[dict]:
    """Answers to the last turn of the first `limit` records that end with an assistant's message of a weight
    above 0, as [{"prompt", "expected", "output", "correct"}]; correct: equal but for surrounding whitespace.
    names, columns: as for records.read_all()."""
    answers, prompts, longest = [], [], 1
    for messages, file, line in read_all(names, columns):
        if len(answers) == limit:
            break
        if len(messages) < 2 or not is_trained_answer(messages[-1]):
            continue
        with naming(f"{file}:{line}"):
            pieces = render(messages[:-1], template, add_generation_prompt=True)
            prompts.append(tokenize(pieces, tokenizer)[0])
            whole = tokenize(render(messages, template), tokenizer)[0]
        # A longer answer could not be right. (The prompt may end with what is not in the whole conversation.)
        longest = max(longest, len(whole) - shared_prefix(whole, prompts[-1]))
        answers.append({"prompt": messages[-2]["content"], "expected": template.expected(messages).strip()})
    stop = {tokenizer.special[template.end_of_turn]}
    outputs = generate(Engine(model), prompts, stop, longest)
    for answer, ids in zip(answers, outputs):
        answer["output"] = template.content(tokenizer.decode(ids)).strip()
        answer["correct"] = answer["output"] == answer["expected"]
    return answers


# ---------------------------------------------------------------- one prompt, or a conversation


class Text:
    """Decodes ids as they come, and holds characters back until they are complete."""

    def __init__(self, tokenizer: Tokenizer):
        self.decode, self.ids = tokenizer.decode, []
        # ids[start:shown] are decoded again, for the spaces between words.
        self.start = self.shown = 0

    def add(self, token: int | None) -> str:
        """The text that can be shown after this token; None: all that remains."""
        self.ids += [] if token is None else [token]
        before, text = self.decode(self.ids[self.start:self.shown]), self.decode(self.ids[self.start:])
        if token is not None and text.endswith("\ufffd"):
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return text[len(before):]


def reply(loaded: Loaded, messages: list[dict], args: Namespace, turn: int = 0) -> str:
    """Print the answer as it is generated, and return it. In a conversation Ctrl-C ends the answer."""
    prompt = loaded.prompt(to_messages({"messages": messages}))
    text, parts = Text(loaded.tokenizer), []

    def show(token: int | None) -> None:
        parts.append(text.add(token))
        print(printable(parts[-1]), end="", flush=True)

    try:
        for _ in loaded.engine.answers([prompt], loaded.stop_ids, args.max_new_tokens, 1, sampling(args),
                                       [(turn, 0)], lambda _, token: show(token),
                                       lookup=args.prompt_lookup_num_tokens):
            pass
    except KeyboardInterrupt:
        if not args.chat:
            raise
    show(None)
    print(flush=True)
    return loaded.template.content("".join(parts))


def chat(loaded: Loaded, messages: list[dict], args: Namespace) -> None:
    with suppress(ImportError):
        # Gives input() line editing.
        import readline  # noqa: F401
    print("/reset starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer or else ends", file=sys.stderr)
    start = messages
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        if text.strip() == "/quit":
            return
        if text.strip() == "/reset":
            messages = start
        elif text.strip():
            asked = [*messages, {"role": "user", "content": text}]
            try:
                messages = [*asked, {"role": "assistant",
                                     "content": reply(loaded, asked, args, len(messages))}]
            # From the template, or for text that is not UTF-8.
            except ValueError as error:
                print(f"error: {printable(str(error))}", file=sys.stderr)


# ---------------------------------------------------------------- a file of records


def name_of(line: dict) -> tuple[int, int]:
    return line["index"], line.get("sample", 0)


def read_questions(args: Namespace, template: Template) -> tuple[list[tuple[list[dict], str | None]], list]:
    """The records as (messages to answer, the record's own answer), and the messages' pieces. The last
    assistant message is the answer; a record that ends with another message, or with one of weight 0, has
    none."""
    asked, pieces = [], []
    for messages, file, line in islice(read_all([args.data], args.columns), args.limit):
        answered = messages[-1]["role"] == "assistant"
        question = messages[:-1] if answered else messages
        with naming(f"{file}:{line}"):
            if not question:
                raise ValueError("an assistant's message alone: there is nothing to answer")
            pieces.append(render(question, template, add_generation_prompt=True))
            asked.append((question, template.expected(messages) if is_trained_answer(messages[-1]) else None))
    return asked, pieces


def answer_file(loaded: Loaded, args: Namespace) -> dict:
    """Write or print the answers, and return what to report. The ranks divide the work."""
    template = loaded.template
    asked, pieces = read_questions(args, template)
    prompts = [ids for ids, _ in tokenize_batch(pieces, loaded.tokenizer)]
    names = ("model", "data", "columns", "dtype", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
    settings = made_with(args, names, loaded.tokenizer, template, args.data) if args.output else {}
    answers = Answers(args.output, name_of, settings)
    missing = answers.missing((i, sample) for i in range(len(asked)) for sample in range(args.samples))
    started = time.monotonic()
    made = loaded.engine.answers([prompts[index] for index, _ in missing], loaded.stop_ids,
                                 args.max_new_tokens, args.batch_size, sampling(args), missing,
                                 lookup=args.prompt_lookup_num_tokens)
    for i, ids, finished in progress(made, len(missing), "answer"):
        (index, sample), (question, expected) = missing[i], asked[missing[i][0]]
        answers.add({"index": index, **({"sample": sample} if args.samples > 1 else {}),
                     "prompt": question[-1]["content"], "expected": expected,
                     "output": loaded.answer(ids), "tokens": len(ids),
                     "finished": finished})
    new = answers.merge()
    seconds = time.monotonic() - started
    if not args.output:
        say(printable("".join(map(as_line, new)).removesuffix("\n")))
    tokens = sum(answer["tokens"] + answer["finished"] for answer in new)       # with each one's stop
    return {"model": args.model, "dtype": args.dtype, "answers": len(asked) * args.samples,
            "new_answers": len(new), "finished": sum(answer["finished"] for answer in new),
            "new_tokens": tokens, "seconds": seconds, "new_tokens_per_second": tokens / seconds}


# ---------------------------------------------------------------- the program


def sampling(args: Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_p, args.top_k, args.seed)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    loaded = load(args.model, args, start_ranks(args), cast=True)
    if args.data:
        result = answer_file(loaded, args)
        write_result(args.json, result, [args.model])
        if is_main():
            print(f"{result['new_answers']:,} answers of {result['new_tokens']:,} tokens in "
                  f"{result['seconds']:.1f} s, {result['new_tokens_per_second']:.0f} tokens/s; "
                  f"{result['finished']:,} ended by themselves", file=sys.stderr)
        return
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    if args.chat:
        chat(loaded, messages, args)
    else:
        reply(loaded, [*messages, {"role": "user", "content": args.prompt}], args)


if __name__ == "__main__":
    run(main)
