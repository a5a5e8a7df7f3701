"""The file of answers: what is written when, what is found after an end at any place, what is refused."""
import json
from argparse import Namespace
from pathlib import Path

import pytest

from chat import load_template
from eval import answers as module
from eval import generate, humaneval, open_ended
from eval.answers import Answers, made_with
from runtime.tokenizer import Tokenizer
from tiny import flags, make_model

SETTINGS = {"seed": 1, "data": ["a"]}


def name_of(line: dict) -> tuple[int]:
    return (line["n"],)


def open_file(file: Path, **more: object) -> Answers:
    return Answers(file, name_of, {**SETTINGS, **more})


def numbers(file: Path) -> list[int | None]:
    return [json.loads(line).get("n") for line in file.read_bytes().splitlines()]


def test_lines_are_there_at_once_and_in_order_when_merged(tmp_path):
    file = tmp_path / "x.jsonl"
    answers = open_file(file)
    assert answers.missing([(3,), (1,), (2,)]) == [(3,), (1,), (2,)]
    for n in (3, 1):
        answers.add({"n": n, "text": "é\u2028\n"})
    assert numbers(file) == [3, 1] and "é" in file.read_text()
    again = open_file(file)
    assert again.missing([(3,), (1,), (2,)]) == [(2,)]
    again.add({"n": 2})
    assert [line["n"] for line in again.merge()] == [2] and again.merge() == []
    assert numbers(file) == [1, 2, 3] and again.lines[3,]["text"] == "é\u2028\n"
    again.add({"n": 0})     # into the file that merge has put in place
    assert numbers(file) == [1, 2, 3, 0]


def test_an_end_at_any_byte_loses_the_unfinished_line_only(tmp_path):
    file = tmp_path / "x.jsonl"
    answers = open_file(file)
    for n in range(3):
        answers.add({"n": n})
    text = file.read_bytes()
    for end in range(len(text)):
        file.write_bytes(text[:end])
        again, kept = open_file(file), text[:end].count(b"\n")
        assert sorted(again.lines) == [(n,) for n in range(kept)]
        for key in again.missing([(0,), (1,), (2,)]):
            again.add({"n": key[0]})
        assert file.read_bytes() == text


def test_what_more_ranks_left_is_found_by_fewer(tmp_path, monkeypatch):
    file = tmp_path / "[x].jsonl"       # no pattern
    for rank, ns in enumerate(((4,), (2, 1), (3,))):
        monkeypatch.setattr(module, "rank", lambda: rank)
        monkeypatch.setattr(module, "world_size", lambda: 3)
        monkeypatch.setattr(module, "is_main", lambda: rank == 0)
        answers = open_file(file)
        for n in ns:
            answers.add({"n": n})
    with open(f"{file}.rank2", "a") as part:
        part.write('{"n": 9')
    backup = Path(f"{file}.rank1.bak")      # a user's
    backup.write_text("old")
    assert numbers(file) == [4] and numbers(Path(f"{file}.rank1")) == [2, 1]
    monkeypatch.undo()
    answers = open_file(file)
    assert answers.missing([(n,) for n in range(6)]) == [(0,), (5,)]
    assert not Path(f"{file}.rank2").read_text().endswith("9")
    answers.merge()
    assert numbers(file) == [1, 2, 3, 4] and list(tmp_path.glob("*.rank*")) == [backup]


def test_answers_from_before_another_token_ended_them_are_not_resumed(tmp_path):
    """Which token ends an answer stands in tokenizer_config.json, not in tokenizer.json."""
    make_model(tmp_path)
    (tmp_path / "questions.jsonl").write_text("{}\n")
    for eos in ("<|eot_id|>", "<|end_of_text|>"):
        content = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**content, "eos_token": eos}))
        tokenizer = Tokenizer(tmp_path)
        settings = made_with(Namespace(), (), tokenizer, load_template("llama3", tokenizer),
                             str(tmp_path / "questions.jsonl"))
        if eos == "<|eot_id|>":
            Answers(tmp_path / "x.jsonl", name_of, settings).add({"n": 1})
    with pytest.raises(ValueError, match="other settings .tokenizer was"):
        Answers(tmp_path / "x.jsonl", name_of, settings)


@pytest.mark.parametrize("command, argv, question, more", [
    (generate, ["--temperature", "1"], {"instruction": "red", "output": "blue"},
     dict(temperature=2, top_p=0.5, top_k=3, columns=["prompt=instruction", "completion=output"])),
    (open_ended, ["alpaca"], {"instruction": "red", "output": "blue"}, {}),
    (humaneval, ["--temperature", "1"],
     {"task_id": "t/0", "prompt": "def f(x):", "test": "", "entry_point": "f"},
     dict(temperature=2, top_p=0.5, format="text")),
], ids=["generate", "open_ended", "humaneval"])
def test_a_command_adds_no_answer_to_those_of_another_model_or_of_other_flags(tmp_path, command, argv,
                                                                              question, more):
    make_model(tmp_path / "model")
    make_model(tmp_path / "other", seed=1)
    data = "questions" if command is open_ended else "data"
    (tmp_path / "q.json").write_text(json.dumps([question]))
    base = {"model": tmp_path / "model", data: tmp_path / "q.json", "output": tmp_path / "x.json",
            "template": Path(__file__).parent / "templates" / "dated.jinja", "date": "2026-01-05",
            "dtype": "fp32", "device": "cpu", "max_new_tokens": 1}
    command.main(argv + flags(**base))
    more = more | dict(model=tmp_path / "other", dtype="bf16", max_new_tokens=2, seed=1, date="2026-01-06")
    for name, value in more.items():
        with pytest.raises(ValueError, match=rf"other settings .*\b{name} was "):
            command.main(argv + flags(**base | {name: value}))


def test_other_settings_are_named_and_nothing_is_touched(tmp_path):
    file = tmp_path / "x.jsonl"
    open_file(file).add({"n": 1})
    file.write_text(file.read_text() + '{"n"')
    text, beside = file.read_text(), Path(f"{file}.settings.json")
    with pytest.raises(ValueError, match=r"other settings \(seed was 1, is 2; top was None, is 3\)"):
        open_file(file, seed=2, top=3)
    assert file.read_text() == text and json.loads(beside.read_text()) == SETTINGS
    beside.unlink()
    with pytest.raises(ValueError, match="other settings .seed was None, is 1"):
        open_file(file)
    assert file.read_text() == text
    assert Answers(None, name_of, {}).missing([(1,)]) == [(1,)]


@pytest.mark.parametrize("text", ["notes", "notes\n", "[]\n", '{"n": 1}\n{"m": 2}\n'])
def test_a_file_of_another_kind_is_left_alone(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match="is not an output of this command|other settings"):
        open_file(tmp_path / "x")
    assert (tmp_path / "x").read_text() == text
