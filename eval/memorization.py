"""How much of its training targets a checkpoint reproduces: BLEU, exact matches, shared prefixes.

    python -m eval.memorization --model RUN/it RUN/im --data train.jsonl --output outputs.jsonl
    torchrun --nproc-per-node 2 -m eval.memorization --model ...        the same, on two ranks

Greedy answers to training prompts are compared with the training targets, as in Table 2 of arXiv 2405.14394.
BLEU needs `pip install -r requirements-eval.txt`. A record's target is its last assistant message that is
trained on (no "weight": 0) and not empty. Its prompt is everything before that. Records without such a
message, or with nothing before it, are skipped, and so are records whose target ends behind token
--max-length, where training cuts them.

  BLEU-4          of the corpus, by sacrebleu, of the texts without surrounding whitespace
  exact match     share of records whose answer is the target and ends there, surrounding whitespace aside
  shared prefix   mean over records of: tokens before the first difference / tokens of the target, without
                  its end of turn

An answer is cut one token behind its target's length, so BLEU says little about longer answers;
--max-new-tokens sets another limit. --output saves each answer as it comes, and the same command resumes from
there. Resumed prompts share batches with other prompts, which may change a near tie in bf16. Intervals are
bootstrap percentiles over records.
"""
import argparse

from eval.flags import Parser, answer_command, check_paths, need
from runtime.flags import number


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("memorization", __doc__)
    parser.add_model_flags(several=True)
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="the training records")
    parser.add_columns_flag()
    parser.add_argument("--limit", type=number(int, 0), default=0, metavar="N",
                        help="use only the first N records; 0: all")
    parser.add_max_length_flag()
    parser.add_argument("--max-new-tokens", type=number(int, 0, 10**6), default=0,
                        help="the most tokens of an answer; 0: one more than its target has")
    parser.add_batch_flag()
    parser.add_argument("--output", metavar="FILE.jsonl", help="save answers there and resume from them")
    parser.add_bootstrap_flags()
    args = parser.parse_args(argv)
    check_paths(args, "json", "output")
    need("sacrebleu", "BLEU")
    return args


answer_command(__name__, parse_args)

import hashlib
import json

import numpy as np

from chat import COMPLETION, Template, is_trained_answer, render, tokenize
from runtime.tokenizer import Tokenizer
from eval.answers import Answers
from eval.bootstrap import interval, resampled_sums
from eval.common import Loaded, load, open_checkpoint, progress, run, start_ranks, write_result
from eval.likelihood import shared_prefix
from records import naming, read_all
from runtime.distributed import is_main
from runtime.report import counted, say
from runtime.start import fit
from runtime.weights import model_fingerprint

METRICS = {"bleu": "BLEU-4", "exact_match": "exact match, %", "shared_prefix": "shared prefix, %"}


def read_targets(args: argparse.Namespace, tokenizer: Tokenizer, template: Template
                 ) -> tuple[list[dict], dict[str, int]]:
    """Returns [{"data", "line", "prompt", "target", "text"}] and how many records were skipped. prompt and
    target are ids, the target without its end of turn. ValueError if no record is left."""
    records, skipped = [], {"skipped_without_target": 0, "skipped_overlong": 0}
    for messages, file, line in read_all(args.data, args.columns):
        if len(records) == args.limit and args.limit:
            break
        last = max((i for i, m in enumerate(messages) if is_trained_answer(m)
                    and (m["content"].strip() or m.get("tool_calls"))), default=0)
        if not last:
            skipped["skipped_without_target"] += 1
            continue
        # Earlier answers become context, so that only the target's ids are of kind COMPLETION.
        before = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages[:last]]
        answered = [*before, messages[last]]
        with naming(f"{file}:{line}"):
            ids, kinds = tokenize(render(answered, template), tokenizer)
            prompt, _ = tokenize(render(before, template, add_generation_prompt=True), tokenizer)
        *target, end_of_turn = (i for i, kind in enumerate(kinds) if kind == COMPLETION)
        if not target or end_of_turn >= args.max_length:
            skipped["skipped_overlong" if target else "skipped_without_target"] += 1
            continue
        records.append({"data": file, "line": line, "prompt": prompt, "target": [ids[i] for i in target],
                        "text": template.expected(answered).strip()})
    if not records:
        raise ValueError(f"{', '.join(args.data)}: no record has a target within --max-length "
                         f"{args.max_length}: {skipped['skipped_without_target']:,} have none, and of "
                         f"{skipped['skipped_overlong']:,} it is beyond; raise --max-length, or give records "
                         "with answers")
    return records, skipped


def answer_key(row: dict) -> tuple[str, str, int]:
    return row["model"], row["data"], row["line"]


def answer(loaded: Loaded, records: list[dict], answers: Answers, args: argparse.Namespace) -> list[dict]:
    """Generates the answers that `answers` does not have yet. Returns a row for each record, in order."""
    by_key = {answer_key({"model": loaded.name, **record}): record for record in records}
    missing = [by_key[key] for key in answers.missing(by_key)]
    limits = [args.max_new_tokens or len(record["target"]) + 1 for record in missing]
    generated = loaded.engine.answers([record["prompt"] for record in missing], loaded.stop_ids,
                                      max(limits, default=0), args.batch_size,
                                      done=lambda i, ids: len(ids) >= limits[i])
    for i, ids, ended in progress(generated, len(missing), "record"):
        record, output = missing[i], loaded.answer(ids).strip()
        answers.add({"model": loaded.name, "data": record["data"], "line": record["line"], "output": output,
                     "target": record["text"], "exact": ended and output == record["text"],
                     "shared_tokens": shared_prefix(ids, record["target"]),
                     "target_tokens": len(record["target"])})
    answers.merge()
    return [answers.lines[key] for key in by_key]


def score(rows: list[dict], resamples: int, confidence: float, seed: int) -> dict:
    """METRICS of the rows in percent, each with X_interval, [low, high] or None, and sacrebleu's signature.

    BLEU is a function of sums over records, so a resample needs no second look at the texts."""
    from sacrebleu.metrics import BLEU
    sentence, statistics = BLEU(effective_order=True), []
    for row in rows:
        bleu = sentence.sentence_score(row["output"], [row["target"]])
        statistics.append([*bleu.counts, *bleu.totals, bleu.sys_len, bleu.ref_len, row["exact"],
                           row["shared_tokens"] / row["target_tokens"]])

    def metrics(sums: np.ndarray) -> list[float]:
        *ngrams, answer_words, target_words = sums[:10].astype(int).tolist()
        bleu = BLEU.compute_bleu(ngrams[:4], ngrams[4:], answer_words, target_words, smooth_method="exp")
        return [bleu.score, *(100 * sums[10:] / len(rows))]

    result = {"records": len(rows), **dict(zip(METRICS, metrics(np.sum(statistics, 0))))}
    draws = np.array([metrics(sums) for sums in resampled_sums(statistics, resamples, seed)])   # (R, metrics)
    for i, name in enumerate(METRICS):
        known = len(draws) and len(rows) > 1
        result[f"{name}_interval"] = interval(draws[:, i], confidence) if known else None
    # sacrebleu's own number, and with it the signature, which needs a corpus.
    corpus = BLEU()
    outputs, targets = [row["output"] for row in rows], [row["target"] for row in rows]
    result["bleu"] = corpus.corpus_score(outputs, [targets]).score
    return {**result, "signature": str(corpus.get_signature())}


def say_result(result: dict, confidence: float) -> None:
    say(fit(f"{result['model']}: {counted(result['records'], 'record')}; skipped "
            f"{result['skipped_without_target']:,} without a target, "
            f"{result['skipped_overlong']:,} too long"))
    for metric, label in METRICS.items():
        bounds = result[f"{metric}_interval"]
        text = f"  {100 * confidence:g}% [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""
        say(f"  {label:<28}{result[metric]:>8.2f}{text}")


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    device = start_ranks(args)
    settings = {name: getattr(args, name) for name in ("limit", "max_new_tokens", "max_length", "template",
                                                       "dtype")}
    # All checkpoints and their records first, so that bad input is found before the first answer.
    targets = []
    for name in args.model:
        folder, tokenizer, template = open_checkpoint(name, args)
        targets.append(read_targets(args, tokenizer, template))
        asked = hashlib.sha256(json.dumps(targets[-1][0]).encode()).hexdigest()[:32]
        settings[name] = {"weights": model_fingerprint(folder), "tokenizer": tokenizer.fingerprint,
                          "records": asked}
    answers = Answers(args.output, answer_key, settings)
    results = []
    for name, (records, skipped) in zip(args.model, targets):
        rows = answer(load(name, args, device, cast=True), records, answers, args)
        if is_main():
            scores = score(rows, args.bootstrap, args.confidence, args.seed)
            results.append({"model": name, **scores, **skipped})
            say_result(results[-1], args.confidence)
    if is_main():
        say(f"BLEU: {results[0]['signature']}")
    flags = ("data", "limit", "max_length", "max_new_tokens", "template", "dtype", "bootstrap", "confidence",
             "seed")
    write_result(args.json, {**{name: getattr(args, name) for name in flags}, "results": results}, args.model)


if __name__ == "__main__":
    run(main)
