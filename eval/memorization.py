"""How much of its training targets a checkpoint writes by itself: BLEU, exact matches, shared prefixes.

    python -m eval.memorization --model RUN/it RUN/im --data train.jsonl --output outputs.jsonl
    torchrun --nproc-per-node 2 -m eval.memorization --model ...        the same, on two ranks

Greedy answers to training prompts against the training targets, as in Table 2 of arXiv 2405.14394. BLEU needs
`pip install -r requirements-eval.txt`. One turn of a record counts: the last message of an assistant's that
is trained on (no "weight": 0) and not empty. Its prompt is all that stands before it, earlier answers as the
record has them; what follows it is left out. Records without such a message, or with nothing before it, are
skipped, and so are those in which it ends behind token --max-length, since training cuts them there.

  BLEU-4          of the corpus, by sacrebleu, of the texts without whitespace around them
  exact match     share of records whose output is the target, end of turn included, but for such whitespace
  shared prefix   tokens before the first that differs / tokens of the target, end of turn not counted:
                  mean over records, and over all tokens of the corpus

An answer that has not ended one token behind its target's length is cut there (--max-new-tokens sets another
limit), so BLEU sees little of what a checkpoint writes beyond. --output keeps every answer as it comes, and
the same command goes on from there; prompts then share batches otherwise, which may turn a near tie in bf16.
Intervals: percentiles of the scores of records drawn anew, with replacement; a draw whose answers are all
shorter than four words has BLEU 0, so with few and short targets that interval says little.
"""
import argparse
import hashlib
import json

import numpy as np

from runtime.weights import model_fingerprint
from chat import COMPLETION, Template, Tokenizer, load_template, read_records, render, tokenize
from eval.answers import Answers
from eval.bootstrap import add_bootstrap_flags, check_flags, interval, resampled_sums
from eval.common import Loaded, Parser, load, progress, run, start_ranks, write_json
from eval.generate import generate
from runtime.weights import resolve_model
from runtime.distributed import is_main

METRICS = {"bleu": "BLEU-4", "exact_match": "exact match, %",
           "prefix_record_mean": "shared prefix, %: records",
           "prefix_token_mean": "shared prefix, %: tokens"}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("memorization", __doc__)
    parser.add_model_flags(several=True)
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="what was trained on")
    parser.add_argument("--limit", type=int, default=0, help="take the first N records that count; 0: all")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens an example may have; training's")
    parser.add_argument("--max-new-tokens", type=int, default=0,
                        help="of an answer; 0: as many as the target has with its end of turn")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts answered at once")
    parser.add_argument("--output", metavar="FILE.jsonl", help="keep the answers there, and go on from it")
    add_bootstrap_flags(parser)
    args = parser.parse_args(argv)
    check_flags(args, ("json", "output"), limit=0, max_length=2, max_new_tokens=0, batch_size=1)
    return args


def import_bleu() -> type:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise ValueError("sacrebleu is not installed, and BLEU needs it: "
                         "pip install -r requirements-eval.txt") from None
    return BLEU


def read_targets(args: argparse.Namespace, tokenizer: Tokenizer, template: Template
                 ) -> tuple[list[dict], dict[str, int]]:
    """[{"data", "line", "prompt", "target", "text"}] of the records that count, prompt and target as ids, the
    target without its end of turn; and how many were skipped."""
    records, skipped = [], {"skipped_without_target": 0, "skipped_overlong": 0}
    for file in args.data:
        for messages, line in read_records(file):
            if len(records) == args.limit and args.limit:
                break
            last = max((i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)
                        and m["content"].strip()), default=0)
            if not last:
                skipped["skipped_without_target"] += 1
                continue
            # earlier answers as context, so that this turn's ids are the only ones of kind COMPLETION
            before = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages[:last]]
            try:
                ids, kinds = tokenize(render([*before, messages[last]], template), tokenizer)
                prompt = tokenize(render(before, template, add_generation_prompt=True), tokenizer)[0]
            except ValueError as error:
                raise ValueError(f"{file}:{line}: {error}") from None
            *target, end = (i for i, kind in enumerate(kinds) if kind == COMPLETION)    # places in ids
            if not target or end >= args.max_length:
                skipped["skipped_overlong" if target else "skipped_without_target"] += 1
                continue
            records.append({"data": file, "line": line, "prompt": prompt, "target": [ids[i] for i in target],
                            "text": messages[last]["content"].strip()})
    if not records:
        raise ValueError(f"{', '.join(args.data)}: no record has a turn that counts within --max-length "
                         f"{args.max_length}: {skipped}")
    return records, skipped


def shared_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def name_of(row: dict) -> tuple[str, str, int]:
    return row["model"], row["data"], row["line"]


def answer(loaded: Loaded, records: list[dict], answers: Answers, args: argparse.Namespace) -> list[dict]:
    """The records' rows in order: answered now, unless `answers` has them."""
    wanted = {(loaded.name, r["data"], r["line"]): r for r in records}
    todo = sorted(wanted, key=lambda name: (len(wanted[name]["target"]), len(wanted[name]["prompt"])))
    todo = [wanted[name] for name in answers.missing(todo)]     # sorted: like lengths end together
    with progress(None, len(todo), "record") as bar:
        for start in range(0, len(todo), args.batch_size):
            some = todo[start:start + args.batch_size]
            limits = [args.max_new_tokens or len(r["target"]) + 1 for r in some]
            outputs = generate(loaded.engine, [r["prompt"] for r in some], loaded.stop_ids, max(limits),
                               batch_size=args.batch_size)
            for r, limit, ids in zip(some, limits, outputs):
                output = loaded.answer(ids[:limit]).strip()
                answers.add({"model": loaded.name, "data": r["data"], "line": r["line"], "output": output,
                             "target": r["text"], "exact": len(ids) < limit and output == r["text"],
                             "shared_tokens": shared_prefix(ids[:limit], r["target"]),
                             "target_tokens": len(r["target"])})
            bar.update(len(some))
    answers.merge()
    return [answers.lines[name] for name in wanted]


def score(rows: list[dict], resamples: int, confidence: float, seed: int) -> dict:
    """METRICS of the rows, in percent, each with X_interval, [low, high] or None; sacrebleu's signature.
    BLEU is a function of sums over records, so resamples need no second look at the texts."""
    BLEU = import_bleu()
    corpus, sentence = BLEU(), BLEU(effective_order=True)
    bleu = corpus.corpus_score([r["output"] for r in rows], [[r["target"] for r in rows]])
    columns = []
    for r in rows:
        s = sentence.sentence_score(r["output"], [r["target"]])
        columns.append([*s.counts, *s.totals, s.sys_len, s.ref_len, r["exact"], r["shared_tokens"],
                        r["target_tokens"], r["shared_tokens"] / r["target_tokens"]])

    def metrics(sums: np.ndarray) -> list[float]:
        *counts, exact, shared, tokens, ratio = sums.tolist()
        counts = list(map(int, counts))
        value = BLEU.compute_bleu(counts[:4], counts[4:8], *counts[8:], smooth_method="exp")
        return [value.score, 100 * exact / len(rows), 100 * ratio / len(rows), 100 * shared / tokens]

    values = dict(zip(METRICS, metrics(np.sum(columns, 0)))) | {"bleu": bleu.score}
    draws = np.array([metrics(sums) for sums in resampled_sums(columns, resamples, seed)])     # (R, 4)
    bounds = {f"{name}_interval": interval(draws[:, i], confidence) if len(draws) and len(rows) > 1 else None
              for i, name in enumerate(METRICS)}
    return {"records": len(rows), **values, **bounds, "signature": str(corpus.get_signature())}


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    import_bleu()
    device = start_ranks(args)
    targets, settings = [], {"limit": args.limit, "max_new_tokens": args.max_new_tokens,
                             "max_length": args.max_length, "template": args.template, "dtype": args.dtype}
    for name in args.model:  # what can be wrong with them, before the first one is asked
        tokenizer = Tokenizer(folder := resolve_model(name))
        targets.append(read_targets(args, tokenizer, load_template(args.template, tokenizer, args.date)))
        asked = hashlib.sha256(json.dumps(targets[-1][0]).encode()).hexdigest()[:32]
        settings[name] = {"weights": model_fingerprint(folder), "records": asked}
    answers = Answers(args.output, name_of, settings, header=True)
    results = []
    for name, (records, skipped) in zip(args.model, targets):
        rows = answer(load(name, args, device, cast=True), records, answers, args)
        if not is_main():
            continue
        result = {"model": name, **score(rows, args.bootstrap, args.confidence, args.seed), **skipped}
        print(f"{name}: {len(records):,} records; skipped {skipped['skipped_without_target']:,} without a "
              f"target, {skipped['skipped_overlong']:,} too long")
        for metric, label in METRICS.items():
            bounds = result[f"{metric}_interval"]
            shown = f"  {100 * args.confidence:g}% [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""
            print(f"  {label:<28}{result[metric]:>8.2f}{shown}", flush=True)
        results.append(result)
    if is_main():
        print(f"BLEU: {results[0]['signature']}")
    flags = ("data", "limit", "max_length", "max_new_tokens", "template", "dtype", "bootstrap", "confidence",
             "seed")
    write_json(args.json, {**{name: getattr(args, name) for name in flags}, "results": results})


if __name__ == "__main__":
    run(main)
