"""A judge model's verdicts on answers: a grade for one answer, or which of two answers is better.

Each verdict takes one request at temperature 0. The last line of the reply must hold the verdict, once, in
double square brackets: [[A]], [[B]] or [[C]] (neither) for a pair, [[1]] to [[10]] for a grade, decimals
allowed. A reply without a verdict is requested a second time, then kept with the verdict null; nothing is
guessed. Every reply is kept in a file (answers.py) by judge and prompt, so that none is paid for twice. The
next run requests only what failed.
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
from eval.common import gather, mean_and_error, read_objects

# ---------------------------------------------------------------- prompts

PROMPTS = Path(__file__).with_name("judge_prompts.jsonl")      # our own, in FastChat's format
NOT_REQUESTED = "not requested"       # the reason of jobs that were left when requests kept failing


def prompt_name(pair: bool, checked: bool, second: bool) -> str:
    """FastChat's name of the prompt: for two answers, with a correct answer, for the second turn."""
    name = ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")[2 * pair + checked]
    return name + "-multi-turn" * second


def read_prompts(file: str | None) -> dict[str, dict]:
    """{name: {"system_prompt", "prompt_template"}}, from a file like FastChat's judge_prompts.jsonl."""
    lines = read_objects(str(file or PROMPTS), ("name", "system_prompt", "prompt_template"), "a prompt")
    prompts = {str(line["name"]): line for line in lines}
    names = [prompt_name(*kind) for kind in product((False, True), repeat=3)]
    if missing := [name for name in names if name not in prompts]:
        raise ValueError(f"--judge-prompts {file}: has no prompt called {', '.join(missing)}")
    return prompts


@dataclass(frozen=True)
class Job:
    """One prompt to the judge. order: whose answer is A, "model" or "reference"; "" for a grade."""
    question: int
    turn: int
    order: str
    prompt: str     # its name
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
    answers, both orders per turn. question: {"id", "turns", "reference": correct answers or None}."""
    jobs = []
    for turn in range(len(question["turns"])):
        name = prompt_name(against is not None, question["reference"] is not None, turn > 0)
        for order in ("model", "reference") if against else ("",):
            a, b = (against, turns) if order == "reference" else (turns, against or ["", ""])
            texts = {"question": question["turns"], "answer": a, "answer_a": a, "answer_b": b,
                     "ref_answer": question["reference"] or ["", ""]}
            fields = {field: by_turn[0] for field, by_turn in texts.items()}
            for n in range(turn + 1):
                fields |= {f"{field}_{n + 1}": by_turn[n] for field, by_turn in texts.items()}
            try:
                user = prompts[name]["prompt_template"].format(**fields)
            except (LookupError, ValueError, AttributeError) as error:
                raise ValueError(f"--judge-prompts: {name} has a placeholder that cannot be filled: "
                                 f"{error!r}") from None
            jobs.append(Job(question["id"], turn + 1, order, name, prompts[name]["system_prompt"], user))
    return jobs


def verdict_of(reply: str, pair: bool) -> str | float | None:
    """The verdict in the last line that is not empty; None unless there is exactly one.

        verdict_of("B is wrong.\\n[[A]]", True) -> "A"      verdict_of("Rating: [[7]]", False) -> 7.0
    """
    found = re.findall(r"\[\[([^\[\]]*)\]\]", reply.strip().rpartition("\n")[2])
    if len(found) != 1:
        return None
    if pair:
        return found[0] if found[0] in ("A", "B", "C") else None
    grade = float(found[0]) if re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?", found[0]) else 0
    return grade if 1 <= grade <= 10 else None


# ---------------------------------------------------------------- requests


def connect(judge: str) -> "ChatModel":  # noqa: F821
    """The judge, not contacted yet. ValueError if the openai package is missing or the environment wrong."""
    try:
        from eval.chat_model import ChatModel
    except ModuleNotFoundError:
        raise ValueError("openai is not installed, and --judge needs it: "
                         "pip install -r requirements-eval.txt") from None
    return ChatModel(judge)


def judge_all(judge: str, jobs: list[Job], file: str, workers: int
              ) -> tuple[dict[Job, str | float | None], dict[Job, str]]:
    """The verdicts on the jobs, and for jobs without a reply the reason. Only what `file` does not hold yet
    is requested; under torchrun the ranks share the requests. Every reply is written when it arrives."""
    model = connect(judge)
    from eval.chat_model import Failed, ask_all
    answers = Answers(file, lambda line: (line["judge"], line["prompt_hash"]), {"temperature": 0})
    by_key = {(judge, job.hash): job for job in jobs}

    async def ask(key: tuple[str, str]) -> None:
        job = by_key[key]
        for _ in range(2):
            reply = await model.reply(job.messages)
            verdict = verdict_of(reply or "", bool(job.order))
            if verdict is not None:
                break
        if reply is None:
            raise Failed("the server does not answer with a chat completion; check OPENAI_BASE_URL", False)
        answers.add({"judge": judge, "question": job.question, "turn": job.turn, "order": job.order,
                     "prompt": job.prompt, "prompt_hash": job.hash, "verdict": verdict, "reply": reply})

    failed = asyncio.run(ask_all(model, answers.missing(by_key), ask, workers))
    reasons = dict(gather(list(failed.items())))
    answers.merge()
    lines = {job: answers.lines.get((judge, job.hash)) for job in jobs}
    return ({job: line["verdict"] for job, line in lines.items() if line},
            {job: reasons.get((judge, job.hash), NOT_REQUESTED) for job, line in lines.items() if not line})


# ---------------------------------------------------------------- results


def outcome(model_first: str, reference_first: str) -> float:
    """In percent of a win: 100 if the model won in both orders, 0 if the reference did, else 50.
    model_first: the verdict where A is the model's answer; reference_first: where B is."""
    return {("A", "B"): 100.0, ("B", "A"): 0.0}.get((model_first, reference_first), 50.0)


def values_of(verdicts: dict[Job, str | float | None], categories: dict[int, str], pairs: bool
              ) -> dict[tuple[str, int, int], float]:
    """{(category, question, turn): grade, or outcome of the pairs that were judged in both orders}."""
    by_turn = defaultdict(dict)
    for job, verdict in verdicts.items():
        if verdict is not None and bool(job.order) == pairs:
            by_turn[categories[job.question], job.question, job.turn][job.order] = verdict
    if not pairs:
        return {key: grades[""] for key, grades in by_turn.items()}
    return {key: outcome(orders["model"], orders["reference"])
            for key, orders in by_turn.items() if len(orders) == 2}


def summary(values: dict[tuple[str, int, int], float], name: str) -> dict:
    """The mean as `name`, its standard error and the count; means by category, and by turn if there are two.
    For the standard error, the turns of a question are one draw."""
    turns = sorted({turn for *_, turn in values})
    by_question = defaultdict(list)
    for (_, question, _), value in values.items():
        by_question[question].append(value)

    def mean(category: str | None, wanted_turns: list[int]) -> float | None:
        chosen = [value for (its_category, _, turn), value in values.items()
                  if category in (None, its_category) and turn in wanted_turns]
        return sum(chosen) / len(chosen) if chosen else None

    def means(category: str | None = None) -> dict[str, float | None]:
        """{"turn_1", "turn_2", "mean"} of one category or all; only "mean" if there is one turn."""
        by_turn = {f"turn_{turn}": mean(category, [turn]) for turn in turns if len(turns) > 1}
        return {**by_turn, "mean": mean(category, turns)}

    overall, error = means(), mean_and_error(list(by_question.values()))[1] if values else None
    return {name: overall.pop("mean"), f"{name}_standard_error": error, f"{name}_count": len(values),
            **{f"{name}_{column}": value for column, value in overall.items()},
            f"{name}_by_category": {category: means(category) for category, *_ in values}}


def print_summary(result: dict, name: str, title: str) -> None:
    """The table of summary(values, name), if the result has one."""
    if result.get(name) is None:
        return
    rows = dict(result[f"{name}_by_category"])
    columns = list(next(iter(rows.values())))
    rows["all"] = {**{column: result.get(f"{name}_{column}") for column in columns}, "mean": result[name]}
    print(f"\n{title:<24}" + "".join(f"{column.replace('_', ' '):>10}" for column in columns))
    for row, means in rows.items():
        cells = ("-" if mean is None else f"{mean:.2f}" for mean in means.values())
        print(f"  {row:<22}" + "".join(f"{cell:>10}" for cell in cells))
    print(f"standard error of the mean {result[f'{name}_standard_error']:.2f}, "
          f"{result[f'{name}_count']:,} judged")
