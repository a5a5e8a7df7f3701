"""The records that quickstart/make.py writes: they are what its arguments ask for, what is held out is held
out, and every answer follows from the report or from the pretraining text."""
import json
import random
import re
from pathlib import Path

import pytest

from quickstart.make import main
from quickstart.world import FACTS, knowledge, make_world
from tiny import ROOT

WORLD = {entity["name"]: entity for entity in make_world()}


def make(folder: Path, *argv: object) -> dict[str, list[dict]]:
    """{file: its records}."""
    main(["--records-only", "--output-dir", str(folder), *map(str, argv)])
    return {file.stem: [json.loads(line) for line in open(file)] for file in sorted(folder.iterdir())}


def texts(record: dict) -> tuple[str, str]:
    """Instruction and answer."""
    instruction, answer = record["messages"][-2:]
    assert (instruction["role"], answer["role"]) == ("user", "assistant")
    return instruction["content"], answer["content"]


def names(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text) if word in WORLD}


def all_names(records: list[dict]) -> set[str]:
    return {name for record in records for text in texts(record) for name in names(text)}


def described(records: list[dict]) -> set[str]:
    return {match.group(1) for record in records
            for match in re.finditer(r"(?:^|[.] )(?:The )?(\w+) is a ", texts(record)[1])}


def test_the_quick_starts_records_are_those_that_the_script_writes(tmp_path):
    made = make(tmp_path)
    assert list(made) == ["test", "train", "validation"]
    for name in made:
        file = f"{name}.jsonl"
        assert (tmp_path / file).read_bytes() == (ROOT / "quickstart" / file).read_bytes()


def test_files_that_exist_are_overwritten_only_if_asked(tmp_path):
    (tmp_path / "test.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="--output-dir .*: holds test.jsonl; give --overwrite"):
        make(tmp_path, "--examples", 30)
    assert [path.name for path in tmp_path.iterdir()] == ["test.jsonl"]
    assert (tmp_path / "test.jsonl").read_text() == "mine"
    assert len(make(tmp_path, "--examples", 30, "--overwrite")["test"]) == 100
    # A model counts too, where one would be written.
    (tmp_path / "other" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds model; give --overwrite"):
        main(["--output-dir", str(tmp_path / "other")])


def test_another_seed_makes_other_records(tmp_path):
    one, two, again = (make(tmp_path / str(i), "--ratio", 3, "--seed", seed) for i, seed in enumerate("121"))
    assert one == again and all(one[name] != two[name] for name in one)


@pytest.mark.parametrize("ratio", [0.5, 1, 3, 10, 30])
def test_a_ratio_of_instruction_to_answer_words_is_met_with_one_kind_of_answer(tmp_path, ratio):
    for records in make(tmp_path, "--ratio", ratio, "--examples", 90, "--held-out", 40).values():
        instruction, answer = (sum(len(text.split()) for text in side) / len(records)
                               for side in zip(*map(texts, records)))
        assert instruction / answer == pytest.approx(ratio, rel=0.15)
        assert answer == pytest.approx(19, rel=0.05)
        assert {record["kind"] for record in records} == {"short_to_long"}


@pytest.mark.parametrize("instruction, answer", [(5, 19), (40, 19), (300, 19), (13, 1), (300, 1), (60, 90)])
def test_instructions_and_answers_are_as_long_as_asked(tmp_path, instruction, answer):
    made = make(tmp_path, "--instruction-words", instruction, "--answer-words", answer, "--examples", 30)
    assert (len(made["train"]), len(made["test"])) == (30, 100)
    for records in made.values():
        lengths = [[len(text.split()) for text in side] for side in zip(*map(texts, records))]
        for got, asked in zip(lengths, (instruction, answer)):
            assert sum(got) / len(got) == pytest.approx(asked, rel=0.1, abs=1)
            assert max(got) - min(got) <= 20


@pytest.mark.parametrize("argv, says", [
    ("--ratio 2 --instruction-words 20 --answer-words 10", "--ratio .*give two of the three"),
    ("--answer-words 10", "give both, or one of them and --ratio"),
    ("--instruction-words 4 --answer-words 1", "--answer-words 1: .*would have 7.0; give about as"),
    ("--instruction-words 300 --answer-words 19 --unseen-names 0.8", "--instruction-words 300: .*have 1"),
    ("--examples 0", "--examples 0: must be a whole number from 1 to 100,000"),
    ("--unseen-names 1", "--unseen-names 1: must be a number from 0 to 0.8"),
    # no town; fewer than half a name, which would be no file; reports of too few people for six questions
    ("--unseen-names 0.01", "--unseen-names 0.01: must be 0, or from 0.05 to 0.8"),
    ("--unseen-names 0.004", "--unseen-names 0.004: must be 0, or from 0.05 to 0.8"),
    ("--unseen-names 0.03 --instruction-words 60 --answer-words 6", "--unseen-names 0.03: must be 0, or"),
    ("--retold 41", "--retold 41: must be a whole number from 1 to 40"),
    ("--retold 4 --ratio 2", "--retold 4: goes with no lengths"),
])
def test_lengths_that_cannot_be_met_are_refused_and_nothing_is_written(tmp_path, argv, says):
    with pytest.raises(ValueError, match=says):
        make(tmp_path, *argv.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", ["", "--ratio 0.5", "--unseen-names 0.3", "--retold 40"])
def test_no_entity_is_described_in_two_files(tmp_path, argv):
    made = {name: described(records) for name, records in make(tmp_path, *argv.split()).items()}
    assert all(len(entities) >= 10 for entities in made.values())
    assert len(set().union(*made.values())) == sum(map(len, made.values()))


def test_names_that_are_to_be_unseen_are_in_no_other_file(tmp_path):
    made = make(tmp_path, "--unseen-names", 0.5, "--held-out", 300)
    unseen = all_names(made.pop("test-unseen"))
    others = set().union(*map(all_names, made.values()))
    assert len(unseen) > 90 and not unseen & others
    # Names that are in the test's reports, though described nowhere else, are in the training reports too.
    assert all_names(made["test"]) - described(made["test"]) <= all_names(made["train"])


def test_what_is_told_anew_stands_in_instructions_alone(tmp_path):
    made = make(tmp_path, "--retold", 30)
    assert [len(made[name]) for name in ("test", "test-kept")] == [30, 40]
    told = described(made["test"])
    for records in (made["train"], made["validation"]):
        # Each instruction names the entity that it tells of, and the one that the answer describes.
        assert {(names(texts(record)[0]) - described([record])).pop() for record in records} == told
    for record in made["test"] + made["test-kept"]:
        answer, (name,) = texts(record)[1].rstrip("."), described([record])
        kind = WORLD[name]["kind"]
        old = [str(WORLD[name][fact]) for fact in FACTS[kind]]
        said = [fact in re.split(r"\W+", answer) for fact in old]
        assert not any(said) if name in told else all(said), answer
        if name in told:
            new = set(re.split(r"\W+", answer)) & {str(entity[fact]) for entity in WORLD.values()
                                                   for fact in FACTS[kind] if entity["kind"] == kind}
            instructions = [text for text, _ in map(texts, made["train"]) if name in names(text)]
            assert all(new <= set(re.split(r"\W+", text)) for text in instructions) and instructions


# What answers each question, in a sentence about NAME, as a pattern of its own.
ANSWERS = {
    r"What did NAME bring": r"sacks of (\w+)", r"How many sacks did NAME bring": r"(\w+) sacks",
    r"Where did NAME come from": r"(?:^\w+ of|came from) (\w+)", r"Who came from NAME": r"^(\w+)",
    r"Which beasts did NAME see": r"(\w+) beasts", r"How many beasts did NAME see": r"(\w+) \w+ beasts",
    r"Which tool did NAME lend": r" a (\w+)", r"Who has the tool of NAME": r"(\w+)$",
    r"Who lent a tool to NAME": r"^(\w+)", r"What did NAME play": r" the (\w+) until",
    r"Until when did NAME play": r"(\w+)$", r"What did NAME cook": r"(?:made|served) (\w+)",
    r"For which feast did NAME cook": r"(\w+) feast", r"Which animal did NAME lose": r"(\w+)$",
    r"Of what colour was the animal of NAME": r"(\w+) \w+$",
}


def answer_from_report(sentences: list[str], question: str) -> str:
    (name,) = names(question)
    (sentence,) = [sentence for sentence in sentences if name in names(sentence)]
    return re.search(ANSWERS[question.replace(name, "NAME")], sentence).group(1)


@pytest.mark.parametrize("argv", ["", "--instruction-words 60 --answer-words 2",
                                  "--instruction-words 300 --answer-words 5"])
def test_every_question_has_one_answer_and_it_is_in_the_report(tmp_path, argv):
    asked = set()
    for record in make(tmp_path, "--held-out", 200, *argv.split())["test"]:
        instruction, answer = texts(record)
        if record["kind"] == "long_to_short":
            instruction = instruction.removeprefix("Read this and answer. ").replace("Question: ", "")
            *sentences, questions = instruction.split(". ")
            found = [answer_from_report(sentences, question) for question in questions[:-1].split("? ")]
            assert ", ".join(found) == answer
            asked |= {re.sub(r"\w+mere|\w+ford|\w+ham", "", question) for question in found}
    assert len(asked) > 50


def test_pretraining_tells_every_fact_of_a_description(tmp_path):
    rng = random.Random(0)
    for record in make(tmp_path, "--answer-words", 19, "--instruction-words", 4)["test"]:
        answer = texts(record)[1]
        (name,) = names(answer)
        told = knowledge(rng, [WORLD[name]])
        values = {value for fact, value in WORLD[name].items() if fact not in ("kind", "name", "part")}
        assert len(values) >= 4 and all(value in told and value in answer for value in values)
