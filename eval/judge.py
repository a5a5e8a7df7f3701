"""Verdicts of a model (chat_completions.py) on answers: grades, or which of two is better.

Each is one prompt at temperature 0. The verdict stands in the last line of the reply, once, between double
square brackets: [[A]], [[B]] or [[C]] (neither) for pairs, [[1]] to [[10]], decimals allowed, for grades. A
reply without one is asked for once more, then kept with the verdict null: nothing is guessed. All replies
are kept in a file (answers.py), by judge and prompt, so that none is paid for twice; what was refused the
next run asks for.
"""
import json
import re
import threading
from collections import defaultdict
from dataclasses import dataclass
from hashlib import sha256
from itertools import product

from eval.answers import Answers
from eval.chat_completions import ChatModel, ask_all
from eval.common import gather, mean_and_error, read_objects

VERDICT = re.compile(r"\[\[([^\[\]]*)\]\]")

# ---------------------------------------------------------------- what is asked

WHAT = ("What counts is that it does what was asked for, that what it says is right, that nothing needed is "
        "missing, and that it can be followed; ")
HOW = {     # by whether two answers are compared
    False: "An assistant answered a request. Grade the answer with a number from 1, of no use to the one who "
           f"asked, to 10, hardly to be improved. {WHAT}length counts for nothing. First name its strengths "
           "and faults in a few sentences. Then write a last line that holds only the grade in double square "
           "brackets, such as [[4]].",
    True: "Two assistants, A and B, answered the same request. Find out which answer serves the one who "
          f"asked better. {WHAT}neither length nor which one stands first counts. First say in a few "
          "sentences what sets the two apart. Then write a last line that holds only the verdict: [[A]] if "
          "A's is better, [[B]] if B's is better, [[C]] if neither is."}
CHECKED = " A correct answer is shown too: say where an answer departs from it, and weigh that most."
SECOND = " There are two requests, one after the other: judge what was answered to the second."


def prompt_name(pair: bool, checked: bool, second: bool) -> str:
    """FastChat's name of the prompt for two answers, with a correct one, for the second turn."""
    name = "pair-math-v1" if checked else "pair-v2"
    if not pair:
        name = "single-math-v1" if checked else "single-v1"
    return name + "-multi-turn" * second


def own_prompt(pair: bool, checked: bool, second: bool) -> dict[str, str]:
    """{"system_prompt", "prompt_template"} with FastChat's placeholders."""
    parts = []
    for turn, n in (("_1", " 1"), ("_2", " 2")) if second else (("", ""),):
        parts.append((f"request{n}", f"question{turn}"))
        parts += [(f"correct answer{n}", f"ref_answer{turn or '_1'}")] * checked
        parts += ([(f"answer{n} of {x}", f"answer_{x.lower()}{turn}") for x in "AB"] if pair
                  else [(f"answer{n}", f"answer{turn}")])
    return {"system_prompt": HOW[pair] + CHECKED * checked + SECOND * second,
            "prompt_template": "\n\n".join(f"<<< {title} >>>\n{{{field}}}" for title, field in parts)}


def read_prompts(file: str | None) -> dict[str, dict]:
    """{name: prompt}: our own, or those of a file in the format of FastChat's judge_prompts.jsonl."""
    kinds = list(product((False, True), repeat=3))
    if not file:
        return {prompt_name(*kind): own_prompt(*kind) for kind in kinds}
    lines = read_objects(file, ("name", "system_prompt", "prompt_template"), "a prompt")
    prompts = {line["name"]: line for line in lines}
    if missing := [name for kind in kinds if (name := prompt_name(*kind)) not in prompts]:
        raise ValueError(f"--judge-prompts {file}: has no prompt called {', '.join(missing)}")
    return prompts


@dataclass(frozen=True)
class Job:
    """One prompt to the judge. order: who stands first of a pair, "model" or "reference"; "": a grade."""
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
    """Of the answers `turns` to a question: a grade a turn, or, against other answers, both orders a turn.
    question: {"id", "turns", "reference": correct answers or None}."""
    jobs, given = [], question["reference"]
    for turn in range(len(question["turns"])):
        name = prompt_name(against is not None, given is not None, turn > 0)
        for order in ("model", "reference") if against else ("",):
            a, b = (against, turns) if order == "reference" else (turns, against)
            values = {"question": question["turns"][0], "answer": a[0], "answer_a": a[0],
                      "answer_b": b[0] if b else ""}
            for n in range(turn + 1):
                values |= {f"question_{n + 1}": question["turns"][n], f"answer_{n + 1}": a[n],
                           f"answer_a_{n + 1}": a[n], f"answer_b_{n + 1}": b[n] if b else "",
                           f"ref_answer_{n + 1}": given[n] if given else ""}
            try:
                user = prompts[name]["prompt_template"].format(**values)
            except (LookupError, ValueError, AttributeError) as error:
                raise ValueError(f"--judge-prompts: {name} asks for what is not there: {error!r}") from None
            jobs.append(Job(question["id"], turn + 1, order, name, prompts[name]["system_prompt"], user))
    return jobs


def verdict_of(reply: str, pair: bool) -> str | float | None:
    """The verdict in the last line that is not empty, None if there is not exactly one.

        verdict_of("B is wrong.\\n[[A]]", True) -> "A"      verdict_of("Rating: [[7]]", False) -> 7.0
    """
    found = VERDICT.findall(reply.strip().rpartition("\n")[2])
    if len(found) != 1:
        return None
    if pair:
        return found[0] if found[0] in ("A", "B", "C") else None
    grade = float(found[0]) if re.fullmatch(r"\d{1,2}(\.\d+)?", found[0]) else 0
    return grade if 1 <= grade <= 10 else None


# ---------------------------------------------------------------- asking


def judge_all(name: str, jobs: list[Job], file: str, workers: int
              ) -> tuple[dict[Job, str | float | None], dict[Job, str]]:
    """The jobs' verdicts, and why others have none. Asked for, by all ranks, are those that `file` has not;
    an interruption loses none that was given."""
    model, lock = ChatModel(name), threading.Lock()
    answers = Answers(file, lambda line: (line["judge"], line["prompt_hash"]), {"temperature": 0})
    by_key = {(name, job.hash): job for job in jobs}

    def ask(key: tuple[str, str]) -> None:
        job = by_key[key]
        reply = model.ask(job.messages)
        if verdict_of(reply, bool(job.order)) is None:
            reply = model.ask(job.messages)
        with lock:
            answers.add({"judge": name, "question": job.question, "turn": job.turn, "order": job.order,
                         "prompt": job.prompt, "prompt_hash": job.hash,
                         "verdict": verdict_of(reply, bool(job.order)), "reply": reply})

    refused = dict(gather(list(ask_all(model, answers.missing(by_key), ask, workers).items())))
    answers.merge()
    lines = {job: answers.lines.get((name, job.hash)) for job in jobs}
    return ({job: line["verdict"] for job, line in lines.items() if line},
            {job: refused.get((name, job.hash), "not asked") for job, line in lines.items() if not line})


# ---------------------------------------------------------------- what comes out


def outcome(model_first: str, reference_first: str) -> float:
    """In percent of a win: 100 if the model won in both orders, 0 if the reference did, else 50.
    model_first: the verdict where A is the model's answer; reference_first: where B is."""
    return {("A", "B"): 100.0, ("B", "A"): 0.0}.get((model_first, reference_first), 50.0)


def values_of(verdicts: dict[Job, str | float | None], categories: dict[int, str], pairs: bool
              ) -> dict[tuple[str, int, int], float]:
    """{(category, question, turn): grade, or outcome of the pairs that were judged in both orders}."""
    values, orders = {}, defaultdict(dict)
    for job, verdict in verdicts.items():
        if verdict is not None and job.order:
            orders[job.question, job.turn][job.order] = verdict
        elif verdict is not None and not pairs:
            values[categories[job.question], job.question, job.turn] = verdict
    for (question, turn), both in orders.items() if pairs else ():
        if len(both) == 2:
            values[categories[question], question, turn] = outcome(both["model"], both["reference"])
    return values


def summary(values: dict[tuple[str, int, int], float], name: str) -> dict:
    """The mean as NAME, its standard error, to which a question's turns are one draw, the count; means by
    turn where there are two, and by category."""
    def mean(category: str | None = None, turn: int | None = None) -> float | None:
        some = [value for (its_category, _, its_turn), value in values.items()
                if category in (None, its_category) and turn in (None, its_turn)]
        return sum(some) / len(some) if some else None

    by_question = defaultdict(list)
    for (_, question, _), value in values.items():
        by_question[question].append(value)
    total, error = mean_and_error(list(by_question.values())) if values else (None, None)
    turns = sorted({turn for *_, turn in values})
    turns = turns if len(turns) > 1 else []
    categories = {category: {**{f"turn_{turn}": mean(category, turn) for turn in turns},
                             "mean": mean(category)} for category, *_ in values}
    return {name: total, f"{name}_standard_error": error, f"{name}_count": len(values),
            **{f"{name}_turn_{turn}": mean(turn=turn) for turn in turns}, f"{name}_by_category": categories}


def print_summary(result: dict, name: str, title: str) -> None:
    """The table of summary(values, name), if the result has one."""
    if result.get(name) is None:
        return
    rows = dict(result[f"{name}_by_category"])
    columns = list(next(iter(rows.values())))
    rows["all"] = {**{column: result.get(f"{name}_{column}") for column in columns}, "mean": result[name]}
    print(f"\n{title:<24}" + "".join(f"{column.replace('_', ' '):>10}" for column in columns))
    for row, values in rows.items():
        cells = ("-" if value is None else f"{value:.2f}" for value in values.values())
        print(f"  {row:<22}" + "".join(f"{cell:>10}" for cell in cells))
    print(f"standard error of the mean {result[f'{name}_standard_error']:.2f}, "
          f"{result[f'{name}_count']:,} judged")
