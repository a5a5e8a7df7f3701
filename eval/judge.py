"""A judge model's verdicts on answers: a grade for one answer, or which of two answers is better.

Each verdict takes one request at temperature 0. The last line of the reply must hold the verdict, once, in
double square brackets: [[A]], [[B]] or [[C]] (neither) for a pair, [[1]] to [[10]] for a grade, decimals
allowed. A reply without a verdict is kept with the verdict null; nothing is guessed. Every reply is kept in a
file (answers.py) by judge and prompt, so that none is paid for twice. The next run requests only what failed.
"""
import asyncio
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path

from eval.answers import Answers
from eval.chat_model import ChatModel, Failed
from eval.common import gather, mean_and_error, progress, read_objects
from runtime.foreign import printable

PROMPTS = Path(__file__).with_name("judge_prompts.jsonl")      # our own, in FastChat's format
# FastChat's placeholders: a name alone is the first turn's text, _1 and _2 are that of either turn.
PLACEHOLDERS = [name + turn for name in ("question", "answer", "answer_a", "answer_b", "ref_answer")
                for turn in ("", "_1", "_2")]
GRADE = r"10(\.0+)?|[1-9](\.[0-9]+)?"
# The verdict where the model's answer is A, the one where it is B: percent of a win. All else is a tie.
OUTCOMES = {("A", "B"): 100.0, ("B", "A"): 0.0}


def prompt_name(pair: bool, checked: bool, second: bool) -> str:
    """FastChat's name of the prompt: for two answers, with a correct answer, for the second turn."""
    name = ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")[2 * pair + checked]
    return name + "-multi-turn" * second


def read_prompts(file: str | None) -> dict[str, dict]:
    """{name: {"system_prompt", "prompt_template"}}, from a file like FastChat's judge_prompts.jsonl."""
    fields = dict.fromkeys(("name", "system_prompt", "prompt_template"), str)
    prompts = {line["name"]: line for line in read_objects(str(file or PROMPTS), fields, "a prompt")}
    for name in (prompt_name(*kind) for kind in product((False, True), repeat=3)):
        if name not in prompts:
            raise ValueError(f"--judge-prompts {file}: has no prompt called {name}")
        try:
            prompts[name]["prompt_template"].format(**dict.fromkeys(PLACEHOLDERS, ""))
        except (LookupError, ValueError, AttributeError) as error:
            raise ValueError(f"--judge-prompts {file}: {name} has a placeholder that cannot be filled: "
                             f"{error!r}") from None
    return prompts


@dataclass(frozen=True)
class Job:
    """One prompt to the judge. order: whose answer is A, "model" or "reference"; "" for a grade."""
    category: str
    question: int
    turn: int
    order: str
    system: str
    user: str

    @property
    def messages(self) -> list[dict]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]

    @property
    def hash(self) -> str:
        return sha256(json.dumps(self.messages).encode()).hexdigest()[:32]

    def __str__(self) -> str:
        return f"question {self.question}, turn {self.turn}" + (f", {self.order} first" if self.order else "")


def make_jobs(question: dict, turns: list[str], against: list[str] | None, prompts: dict[str, dict]
              ) -> list[Job]:
    """The prompts that judge `turns`, the answers to a question: one grade per turn or, against other
    answers, both orders per turn. question: {"id", "category", "turns", "correct": answers or []}."""
    jobs = []
    for turn in range(len(question["turns"])):
        prompt = prompts[prompt_name(bool(against), bool(question["correct"]), turn > 0)]
        for order in ("model", "reference") if against else ("",):
            a, b = (against, turns) if order == "reference" else (turns, against or [])
            fields = dict.fromkeys(PLACEHOLDERS, "")
            for field, texts in {"question": question["turns"], "answer": a, "answer_a": a, "answer_b": b,
                                 "ref_answer": question["correct"]}.items():
                fields |= {f"{field}_{n}": text for n, text in enumerate(texts, 1)}
                fields[field] = fields[f"{field}_1"]
            jobs.append(Job(question["category"], question["id"], turn + 1, order, prompt["system_prompt"],
                            prompt["prompt_template"].format(**fields)))
    return jobs


def verdict_of(reply: str, pair: bool) -> str | float | None:
    """The verdict in the last line that is not empty; None unless there is exactly one.

        verdict_of("B is wrong.\\n[[A]]", True) -> "A"      verdict_of("Rating: [[7]]", False) -> 7.0
    """
    found = re.findall(r"\[\[([^\[\]]*)\]\]", reply.strip().rpartition("\n")[2])
    if len(found) != 1 or not re.fullmatch("[ABC]" if pair else GRADE, found[0]):
        return None
    return found[0] if pair else float(found[0])


def judge_all(model: ChatModel, jobs: list[Job], file: str, workers: int
              ) -> tuple[dict[Job, str | float | None], dict[Job, str]]:
    """The verdicts on the jobs, and why requests failed. Only what `file` does not hold yet is requested,
    `workers` at a time; under torchrun the ranks share the requests. Every reply is written when it arrives.
    No more are sent once as many fail in a row as there are workers, or three."""
    answers = Answers(file, lambda line: (line["judge"], line["prompt_hash"]), {"temperature": 0})
    by_key = {(model.name, job.hash): job for job in jobs}
    missing, reasons, failed_in_a_row = answers.missing(by_key), {}, 0

    async def ask(key: tuple[str, str], slots: asyncio.Semaphore) -> None:
        nonlocal failed_in_a_row
        job = by_key[key]
        async with slots:
            if failed_in_a_row >= max(3, workers):
                return
            try:
                reply = await model.reply(job.messages)
            except Failed as error:
                reasons[key] = str(error)
                failed_in_a_row += 1
                return
            failed_in_a_row = 0
            answers.add({"judge": model.name, "question": job.question, "turn": job.turn, "order": job.order,
                         "prompt_hash": job.hash, "verdict": verdict_of(reply, bool(job.order)),
                         "reply": reply})

    async def ask_all() -> None:
        slots = asyncio.Semaphore(workers)
        async with model.client:
            requests = [asyncio.create_task(ask(key, slots)) for key in missing]
            for request in progress(asyncio.as_completed(requests), len(requests), "verdict"):
                await request

    asyncio.run(ask_all())
    answers.merge()
    verdicts = {job: answers.lines[model.name, job.hash]["verdict"] for job in jobs
                if (model.name, job.hash) in answers.lines}
    return verdicts, {by_key[key]: reason for key, reason in gather(list(reasons.items()))}


def values_of(verdicts: dict[Job, str | float | None], pairs: bool) -> dict[tuple[str, int, int], float]:
    """{(category, question, turn): grade, or outcome of the pairs that were judged in both orders}."""
    by_turn = defaultdict(dict)
    for job, verdict in verdicts.items():
        if verdict is not None:
            by_turn[job.category, job.question, job.turn][job.order] = verdict
    if pairs:
        return {key: OUTCOMES.get((orders["model"], orders["reference"]), 50.0)
                for key, orders in by_turn.items() if {"model", "reference"} <= orders.keys()}
    return {key: orders[""] for key, orders in by_turn.items() if "" in orders}


def summary(values: dict[tuple[str, int, int], float], name: str) -> dict:
    """The mean as `name`, its standard error and the count, and the means by category and by turn. For the
    standard error, the turns of a question are one draw."""
    by_question, by_category, by_turn = defaultdict(list), defaultdict(list), defaultdict(list)
    for (category, question, turn), value in values.items():
        by_question[question].append(value)
        by_category[category].append(value)
        by_turn[f"turn {turn}"].append(value)
    mean, error = mean_and_error(list(by_question.values())) if values else (None, None)
    return {name: mean, f"{name}_standard_error": error, f"{name}_count": len(values),
            f"{name}_by_category": {label: sum(group) / len(group) for label, group in by_category.items()},
            f"{name}_by_turn": {label: sum(group) / len(group) for label, group in by_turn.items()}}


def table(result: dict, name: str) -> str:
    """summary(values, name), of at least one value, in lines."""
    rows = [*result[f"{name}_by_category"].items(), *result[f"{name}_by_turn"].items(), ("all", result[name])]
    error = result[f"{name}_standard_error"]
    return "\n".join([*(f"  {printable(label):<22}{mean:>10.2f}" for label, mean in rows),
                      f"standard error of the mean {'unknown' if error is None else f'{error:.2f}'}, "
                      f"{result[f'{name}_count']:,} judged"])
