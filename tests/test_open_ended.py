"""Answers to AlpacaEval's and MT-Bench's questions against transformers and by hand, and their judgement."""
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers

from chat_server import ChatServer, refusal, text_of
from chat import TEMPLATES
from eval import open_ended
from eval.engine import Engine
from tiny import WORDS, flags, make_model, run_module

KEY = "sk-very-secret"
CATEGORIES = ("math", "writing", "stem", "coding", "other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, five questions of either benchmark, and answers of somebody else."""
    folder = tmp_path_factory.mktemp("open_ended")
    (make_model(folder / "run" / "final") / "chat_template.jinja").write_text(TEMPLATES["llama3"].read_text())
    alpaca = [{"dataset": f"set {i % 2}", "instruction": " ".join(WORDS[i:i + 4]), "output": f"theirs {i}",
               "generator": "somebody"} for i in range(5)]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    (folder / "alpaca.jsonl").write_text("".join(json.dumps(line) + "\n" for line in alpaca))
    questions = [{"question_id": 81 + i, "category": category,
                  "turns": [" ".join(WORDS[i:i + 3]), WORDS[i + 5]]} for i, category in enumerate(CATEGORIES)]
    for i in (0, 1):
        questions[i]["reference"] = [f"right {i}", f"right too {i}"]
    (folder / "mt.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    answers = [{"question_id": 81 + i, "answer_id": "x", "model_id": "somebody", "tstamp": 1.5,
                "choices": [{"index": 0, "turns": [f"theirs {i}", f"theirs too {i}"]}]} for i in range(5)]
    (folder / "theirs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    return folder


def arguments(folder: Path, suite: str, output: Path, **more: object) -> list[str]:
    base = dict(model=folder / "run" / "final", dtype="fp32", device="cpu", output=output,
                questions=folder / {"alpaca": "alpaca.json", "mt-bench": "mt.jsonl"}[suite],
                max_new_tokens=8, batch_size=2)
    return [suite, *flags(**{**base, **more})]


def rows(file: Path) -> list[dict]:
    """Without the time, which no run shares with another."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(line.pop("tstamp") > 1.7e9 for line in lines)
    return lines


def theirs(folder: Path, messages: list[dict]) -> str:
    """What transformers answers greedily."""
    final = folder / "run" / "final"
    model = transformers.AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                        return_dict=False)
    stop = [tokenizer.convert_tokens_to_ids("<|eot_id|>"), tokenizer.eos_token_id]
    made = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=stop)
    return tokenizer.decode(made[0, len(ids):], skip_special_tokens=True).strip()


def test_alpaca_file_holds_what_transformers_answers(folder, tmp_path):
    open_ended.main(arguments(folder, "alpaca", tmp_path / "out.json", json=tmp_path / "result.json"))
    got = json.loads((tmp_path / "out.json").read_text())
    assert got == [{"dataset": f"set {i % 2}", "instruction": " ".join(WORDS[i:i + 4]), "generator": "run",
                    "output": theirs(folder, [{"role": "user", "content": " ".join(WORDS[i:i + 4])}])}
                   for i in range(5)]
    assert len({line["output"] for line in got}) > 2
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["name"], result["questions"]) == ("run", 5) and "win_rate" not in result
    assert result["mean_characters"] == sum(len(line["output"]) for line in got) / 5
    open_ended.main(arguments(folder, "alpaca", tmp_path / "2.json", name="x", limit=2,
                              questions=folder / "alpaca.jsonl"))
    assert json.loads((tmp_path / "2.json").read_text()) == [{**line, "generator": "x"} for line in got[:2]]


def test_mt_bench_file_and_second_turns_that_follow_the_first(folder, tmp_path, monkeypatch):
    temperatures, original = {}, Engine.answers

    def watched(self, prompts, stop, most, size, sampling, keys):
        temperatures.update({key: sampling.temperature for key in keys})
        return original(self, prompts, stop, most, size, sampling, keys)

    monkeypatch.setattr(Engine, "answers", watched)
    open_ended.main(arguments(folder, "mt-bench", tmp_path / "run.jsonl"))
    got = rows(tmp_path / "run.jsonl")
    assert [sorted(line) for line in got] == [["answer_id", "choices", "model_id", "question_id"]] * 5
    assert [(line["question_id"], line["model_id"]) for line in got] == [(81 + i, "run") for i in range(5)]
    assert all(list(line["choices"][0]) == ["index", "turns"] and line["choices"][0]["index"] == 0
               and len(line["choices"]) == 1 and len(line["choices"][0]["turns"]) == 2 for line in got)
    assert len({line["answer_id"] for line in got}) == 5
    assert temperatures == {(81 + i, turn): temperature for turn in (0, 1)
                            for i, temperature in enumerate((0, 0.7, 0.1, 0, 0.7))}
    for i in (0, 3):    # the greedy ones
        first = {"role": "user", "content": " ".join(WORDS[i:i + 3])}
        answer = theirs(folder, [first])
        second = theirs(folder, [first, {"role": "assistant", "content": answer},
                                 {"role": "user", "content": WORDS[i + 5]}])
        assert got[i]["choices"][0]["turns"] == [answer, second] and answer
        assert second != theirs(folder, [{"role": "user", "content": WORDS[i + 5]}])


def test_samples_depend_on_seed_and_question_alone(folder, tmp_path):
    def turns(name: str, **more: object) -> list[list[str]]:
        open_ended.main(arguments(folder, "mt-bench", tmp_path / f"{name}.jsonl", **more))
        return [line["choices"][0]["turns"] for line in rows(tmp_path / f"{name}.jsonl")]

    whole = turns("a")
    lines = (folder / "mt.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text(lines[4] + lines[1])
    assert turns("b", questions=tmp_path / "some.jsonl", batch_size=1) == [whole[4], whole[1]]
    other = turns("c", seed=1)
    assert [a == b for a, b in zip(whole, other)][::3] == [True, True] and other[1] != whole[1]


def test_tokens_are_averaged_over_answers_and_those_that_ended_are_counted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "answers", lambda self, prompts, stop, most, size, sampling, keys: [
        (i, [9] * (1 + 2 * turn), question < 84) for i, (question, turn) in enumerate(keys)])
    open_ended.main(arguments(folder, "mt-bench", tmp_path / "x.jsonl", json=tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    # Five answers of one token and five of three; of five questions with two answers each, three ended.
    assert (result["mean_tokens"], result["finished"]) == (2, 6)


@pytest.mark.parametrize("suite, ending", [("alpaca", "json"), ("mt-bench", "jsonl")])
@pytest.mark.parametrize("after", [0, 3, 7])
def test_an_interrupted_run_makes_only_what_is_missing(folder, tmp_path, monkeypatch, suite, ending,
                                                       after):
    whole, cut = tmp_path / f"whole.{ending}", tmp_path / f"cut.{ending}"
    open_ended.main(arguments(folder, suite, whole, name="x"))
    original, ended, asked = Engine.answers, [], []

    def interrupted(self, prompts, *given):
        for answer in original(self, prompts, *given):
            if len(ended) == after:
                raise KeyboardInterrupt
            ended.append(answer)
            yield answer

    total = 5 if suite == "alpaca" else 10
    if after < total:
        monkeypatch.setattr(Engine, "answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_ended.main(arguments(folder, suite, cut, name="x"))
        kept = [line for file in tmp_path.glob("cut.*.answers") for line in file.read_text().splitlines()]
        assert not cut.exists() and len(kept) == after
    monkeypatch.setattr(Engine, "answers",
                        lambda self, prompts, *a: asked.append(len(prompts)) or original(self, prompts, *a))
    open_ended.main(arguments(folder, suite, cut, name="x"))
    assert sum(asked) == (total - after if after < total else total)
    if suite == "alpaca":
        assert cut.read_bytes() == whole.read_bytes()
    else:
        assert rows(cut) == rows(whole)
    asked.clear()
    open_ended.main(arguments(folder, suite, cut, name="y"))    # needs no other answers
    assert not asked and '"y"' in cut.read_text()
    with pytest.raises(ValueError, match="max_new_tokens was 8, is 9"):
        open_ended.main(arguments(folder, suite, cut, max_new_tokens=9))


def judged(payload: dict, before: int) -> str:
    """Ours wins where it stands first, and question 1 in both orders; grades tell the turns apart."""
    text = text_of(payload)
    if "theirs" not in text:
        return "[[3]]" if "request 2" in text else "[[8.5]]" if "right 0" in text else "[[6]]"
    ours_first = not text.partition(" of A >>>\n")[2].startswith("theirs")
    return "[[A]]" if ours_first or "theirs 1" not in text else "[[B]]"


@pytest.fixture
def server(monkeypatch):
    server = ChatServer(judged)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield server
    server.close()


def test_alpaca_win_rate_over_both_orders(folder, tmp_path, server, capsys):
    argv = arguments(folder, "alpaca", tmp_path / "out.json", judge="gpt", json=tmp_path / "result.json")
    open_ended.main(argv)
    result = json.loads((tmp_path / "result.json").read_text())
    # question 1 is won in both orders, the others by whoever stands first: 100 and four times 50
    assert result["win_rate"] == 60
    assert result["win_rate_standard_error"] == pytest.approx((2000 / 4 / 5) ** 0.5)
    assert result["win_rate_by_category"] == {"set 0": 50, "set 1": 75}
    assert (result["judge"], result["verdicts"], result["missing"]) == ("gpt", 10, 0)
    shown = capsys.readouterr().out
    assert "all                        60.00" in shown
    assert max(map(len, shown.replace(str(tmp_path), "").splitlines())) <= 80
    open_ended.main(argv)
    assert len(server.requests) == 10
    other = json.loads((folder / "alpaca.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps([{**line, "output": "theirs 1"} for line in other[::-1]]))
    open_ended.main([*argv, "--reference", str(tmp_path / "other.json")])
    assert json.loads((tmp_path / "result.json").read_text())["win_rate"] == 100
    (tmp_path / "other.json").write_text(json.dumps(other[:4]))
    with pytest.raises(ValueError, match=r"other\.json: has no answer to question 4: "):
        open_ended.main([*argv, "--reference", str(tmp_path / "other.json")])
    assert all(KEY not in file.read_text() for file in tmp_path.iterdir()) and KEY not in shown


def test_mt_bench_grades_by_category_and_turn_and_pairs(folder, tmp_path, server, capsys):
    argv = arguments(folder, "mt-bench", tmp_path / "out.jsonl", judge="gpt", json=tmp_path / "result.json")
    open_ended.main(argv)
    result = json.loads((tmp_path / "result.json").read_text())
    # mathematics has a reference answer and is judged with it; writing has one too and is not
    assert result["score_by_category"] == {**dict.fromkeys(CATEGORIES, 4.5), "math": 5.75}
    assert result["score_by_turn"] == {"turn 1": 6.5, "turn 2": 3} and result["score"] == 4.75
    assert result["verdicts"] == 10 and "win_rate" not in result
    told = [text_of(payload) for _, _, payload in server.requests]
    assert ["right 0" in text for text in told].count(True) == 2
    assert not any("right 1" in text for text in told)
    open_ended.main([*argv, "--reference", str(folder / "theirs.jsonl")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(server.requests) == 10 + 20 and result["score"] == 4.75
    assert result["win_rate_by_category"]["writing"] == 100
    assert result["win_rate"] == 60 and result["win_rate_count"] == 10
    shown = capsys.readouterr().out
    assert "turn 2                      3.00" in shown
    assert max(map(len, shown.replace(str(tmp_path), "").splitlines())) <= 80


def test_verdicts_that_are_missing_are_counted_and_the_rest_is_reported(folder, tmp_path, server, capsys):
    server.say = lambda payload, before: (refusal(400, "too long") if "theirs 2" in text_of(payload) else
                                          "no idea" if "theirs 3" in text_of(payload) else "[[C]]")
    argv = arguments(folder, "alpaca", tmp_path / "out.json", judge="gpt", json=tmp_path / "result.json")
    with pytest.raises(ValueError, match=r"2 verdicts are missing \(question 2, turn 1, (model|reference) "
                                         r"first: HTTP 400: the server does not accept .*\); the same "
                                         r"command requests only those"):
        open_ended.main(argv)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["win_rate"], result["win_rate_count"]) == (50, 3)
    assert (result["missing"], result["unparsable"]) == (2, 2)
    assert "2 replies hold no verdict" in capsys.readouterr().out
    server.say, server.requests[:] = judged, []
    open_ended.main(argv)
    assert len(server.requests) == 2
    assert json.loads((tmp_path / "result.json").read_text())["missing"] == 0


def test_two_ranks_give_what_one_does(folder, tmp_path, server):
    names = ("one", "two")
    for ranks, name in enumerate(names, 1):
        server.requests.clear()
        run_module("eval.open_ended", arguments(folder, "mt-bench", tmp_path / f"{name}.jsonl", judge="gpt",
                                                name="x", json=tmp_path / f"{name}.json"), ranks=ranks)
        assert len(server.requests) == 10
    assert rows(tmp_path / "one.jsonl") == rows(tmp_path / "two.jsonl")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in names)
    assert {**one, "output": ""} == {**two, "output": ""} and one["score"] == 4.75
    assert sorted((tmp_path / "one.jsonl.judgments").read_text()) == sorted(
        (tmp_path / "two.jsonl.judgments").read_text()) and not list(tmp_path.glob("*.rank*"))


@pytest.mark.parametrize("suite, more, says", [
    ("alpaca", dict(output="x.jsonl"), r"--output x.jsonl: must end in \.json"),
    ("mt-bench", dict(output="x.json"), r"--output x.json: must end in \.jsonl"),
    ("alpaca", dict(output="nowhere/x.json"), "--output nowhere/x.json: give a file in a folder that exists"),
    ("alpaca", dict(limit=0), "--limit 0: must be a whole number, 1 or more"),
    ("alpaca", dict(reference="x"), "--reference x: needs --judge"),
    ("alpaca", dict(judge_prompts="x"), "--judge-prompts x: needs --judge"),
    ("alpaca", dict(judge="gpt"), "--judge gpt: set OPENAI_API_KEY"),
    ("alpaca", dict(questions="nowhere.json"), "nowhere.json: no such file"),
    ("mt-bench", dict(questions="alpaca.json"), "alpaca.json: record 1: not a question with question_id"),
])
def test_what_is_wrong_is_said_before_anything_is_made(folder, tmp_path, monkeypatch, suite, more, says):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(open_ended, "load", None)
    monkeypatch.chdir(folder)
    output = tmp_path / ("x.json" if suite == "alpaca" else "x.jsonl")
    with pytest.raises(ValueError, match=says):
        open_ended.main(arguments(folder, suite, **{"output": output, **more}))


@pytest.mark.parametrize("change", [dict(question_id="a"), dict(turns="red"), dict(turns=["a", "b", "c"]),
                                    dict(turns=[]), dict(turns=["a", 2]), dict(question_id=81),
                                    dict(category=["math"])])
def test_questions_that_cannot_be_asked_are_named(folder, tmp_path, change):
    lines = [json.loads(line) for line in (folder / "mt.jsonl").read_text().splitlines()]
    lines = [lines[0], {**lines[1], **change}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"q\.jsonl:(2: not a question| question .* must have)"):
        open_ended.main(arguments(folder, "mt-bench", tmp_path / "x.jsonl", questions=tmp_path / "q.jsonl"))


@pytest.mark.parametrize("suite, line", [
    ("alpaca", dict(instruction=[], output="a")), ("alpaca", dict(instruction=" ".join(WORDS[:4]), output=3)),
    ("mt-bench", dict(question_id=81, choices=[])),
    ("mt-bench", dict(question_id=[], choices=[{"turns": ["a", "b"]}])),
    ("mt-bench", dict(question_id=81, choices=[{"turns": "two words"}])),
])
def test_references_that_are_not_answers_are_named(folder, tmp_path, server, suite, line):
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + "\n")
    output = tmp_path / ("x.json" if suite == "alpaca" else "x.jsonl")
    with pytest.raises(ValueError, match=r"r\.jsonl:(1: not an answer| not FastChat's| has no answer to)"):
        open_ended.main(arguments(folder, suite, output, judge="gpt", reference=tmp_path / "r.jsonl"))
    assert not output.exists() and not server.requests


def test_a_question_that_occurs_twice_is_compared_with_the_answer_of_its_own(tmp_path):
    lines = [{"instruction": say, "output": out} for say, out in (("Hi", "a"), ("Ho", "b"), ("Hi", "c"))]
    (tmp_path / "q.json").write_text(json.dumps(lines))
    args = Namespace(benchmark="alpaca", questions=str(tmp_path / "q.json"), reference=None, limit=None)
    questions = open_ended.read_questions(args)
    assert open_ended.read_reference(args, questions) == {0: ["a"], 1: ["b"], 2: ["c"]}
    # Other answers, of which one goes with both.
    args.reference = str(tmp_path / "r.json")
    (tmp_path / "r.json").write_text(json.dumps(lines[1:]))
    assert open_ended.read_reference(args, questions) == {0: ["c"], 1: ["b"], 2: ["c"]}


def test_a_question_file_without_outputs_to_compare_with_is_named_as_what_it_is(folder, tmp_path, server):
    (tmp_path / "q.json").write_text('[{"instruction": "Say it."}]')
    with pytest.raises(ValueError, match=r"--questions .*q\.json: .*an answer .*; give --reference"):
        open_ended.main(arguments(folder, "alpaca", tmp_path / "x.json", judge="gpt",
                                  questions=tmp_path / "q.json"))
    assert not server.requests


def test_a_file_of_somebody_else_is_not_written_over(folder, tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match=r"x\.json: exists, but without .*x\.json\.answers to resume from"):
        open_ended.main(arguments(folder, "alpaca", tmp_path / "x.json"))
    assert (tmp_path / "x.json").read_text() == "[]"
