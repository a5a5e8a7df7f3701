"""Greedy answers to training prompts against transformers, their scores against sacrebleu and by hand."""
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from chat import load_template
from runtime.tokenizer import Tokenizer
from eval import memorization
from eval.engine import Engine
from tiny import arguments as train_arguments
from tiny import flags, make_model, run_here, run_module

PAIRS = [("name a colour", "red is a colour"), ("name a fruit", "a plum"),
         ("and another", "a pear and a fig"), ("hello", "hello world"), ("be brief", "the town by the sea"),
         ("name the station", "blue station"), ("the sea", "is blue"),
         ("and a town", "the sunny town by the sea is blue and red")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that has learnt the first five records, and one that has learnt none."""
    folder = tmp_path_factory.mktemp("memorization")
    make_model(folder / "model")
    lines = [json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in PAIRS]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "learnt.jsonl").write_text("".join(lines[:5]))
    assert run_here(train_arguments(folder, "run", train_data=folder / "learnt.jsonl", epochs=50,
                                    batch_size=3, lr=2e-2, loss="it")) == 0
    return folder


def arguments(folder: Path, **more: object) -> list[str]:
    base = dict(model=folder / "run" / "final", data=folder / "train.jsonl", dtype="fp32", device="cpu",
                bootstrap=50, batch_size=3)
    return flags(**{**base, **more})


def result(folder: Path, **more: object) -> list[dict]:
    memorization.main(arguments(folder, json=folder / "out.json", **more))
    return json.loads((folder / "out.json").read_text())["results"]


def test_a_second_checkpoint_that_does_not_fit_is_found_before_the_first_answers(folder, tmp_path,
                                                                                 monkeypatch):
    shutil.copytree(folder / "model", tmp_path / "gpt2")
    config = tmp_path / "gpt2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "gpt2"}))
    monkeypatch.setattr(memorization, "answer", None)
    with pytest.raises(ValueError, match="model_type 'gpt2' is not implemented"):
        memorization.main(arguments(folder, model=[folder / "run" / "final", tmp_path / "gpt2"],
                                    template="llama3"))


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def test_answers_and_scores_equal_transformers_and_sacrebleu(folder):
    sacrebleu = pytest.importorskip("sacrebleu")
    final = folder / "run" / "final"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    stop = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    outputs, shared, lengths = [], [], []
    for prompt, completion in PAIRS:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                            tokenize=True, return_dict=False)
        target = tokenizer(completion, add_special_tokens=False).input_ids
        new = theirs.generate(torch.tensor([ids]), max_new_tokens=len(target) + 1, do_sample=False,
                              eos_token_id=stop)[0, len(ids):].tolist()
        outputs.append(tokenizer.decode(new, skip_special_tokens=True).strip())
        lengths.append(len(target))
        shared.append(next((i for i, (a, b) in enumerate(zip(new, target)) if a != b), len(target)))
    assert 0 < sum(shared) < sum(lengths)
    got, = result(folder, output=folder / "answers.jsonl", seed=3, confidence=0.8)
    rows = sorted(rows_of(folder / "answers.jsonl"), key=lambda row: row["line"])
    assert [row["output"] for row in rows] == outputs
    assert [row["target"] for row in rows] == [completion for _, completion in PAIRS]
    bleu = sacrebleu.corpus_bleu(outputs, [[completion for _, completion in PAIRS]]).score
    assert got["bleu"] == pytest.approx(bleu) and 0 < bleu < 100
    exact = np.mean([output == completion for output, (_, completion) in zip(outputs, PAIRS)])
    assert got["exact_match"] == pytest.approx(100 * exact)
    assert got["shared_prefix"] == pytest.approx(100 * np.mean(np.divide(shared, lengths)))
    scores = memorization.score(rows, 50, 0.8, 3)
    assert all(got[f"{name}_interval"] == scores[f"{name}_interval"] for name in memorization.METRICS)
    assert got["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def row(output: str, target: str, shared: int, tokens: int) -> dict:
    return {"output": output, "target": target, "exact": output == target, "shared_tokens": shared,
            "target_tokens": tokens}


ROWS = [row("the cat sat on the mat", "the cat sat on the mat", 6, 6), row("", "a dog", 0, 2),
        row("a dog ran off at once", "a dog sat on the mat", 2, 6)]


def test_scores_by_hand():
    pytest.importorskip("sacrebleu")
    got = memorization.score(ROWS, 0, 0.95, 0)
    # n-grams: 6 + 0 + 2 right of 6 + 0 + 6, then 5 + 1 of 10, 4 of 8, 3 of 6; 12 words for 14
    expected = 100 * (8 / 12 * 6 / 10 * 4 / 8 * 3 / 6) ** 0.25 * np.exp(1 - 14 / 12)
    assert got["bleu"] == pytest.approx(expected)
    assert got["exact_match"] == pytest.approx(100 / 3)
    assert got["shared_prefix"] == pytest.approx(100 * (1 + 0 + 1 / 3) / 3)
    assert got["bleu_interval"] is None


def test_intervals_equal_scores_of_the_texts_drawn(monkeypatch):
    sacrebleu = pytest.importorskip("sacrebleu")
    seen = []
    monkeypatch.setattr(memorization, "interval", lambda values, _: seen.append(values.tolist()))
    rows = ROWS + [row("a plum and a pear", "a plum and a fig", 4, 5), row("red", "blue", 0, 1)]
    memorization.score(rows, 20, 0.95, 3)
    rng, expected = np.random.default_rng(3), []
    for _ in range(20):
        drawn = [rows[i] for i in rng.integers(5, size=5)]
        expected.append([
            sacrebleu.corpus_bleu([r["output"] for r in drawn], [[r["target"] for r in drawn]]).score,
            100 * np.mean([r["exact"] for r in drawn]),
            100 * np.mean([r["shared_tokens"] / r["target_tokens"] for r in drawn])])
    np.testing.assert_allclose(np.transpose(seen), expected, rtol=1e-9)


def test_shared_prefix_by_hand():
    for a, b, shared in (([1, 2, 3], [1, 2, 4], 2), ([], [1], 0), ([1], [1, 2], 1), ([1, 2], [1], 1),
                         ([2, 1], [1, 2], 0), ([1, 9, 3], [1, 2, 3], 1)):
        assert memorization.shared_prefix(a, b) == shared


def test_the_last_trained_answer_of_a_record_is_asked_for(folder, tmp_path):
    def message(role: str, content: str, **more: int) -> dict:
        return {"role": role, "content": content, **more}

    user = message("user", "name a fruit")
    one, two = message("assistant", "a plum"), message("assistant", "a fig")
    records = [
        [user, one, user, two],                                 # the last answer
        [user, one, user],                                      # what follows it is left out
        [user, one, user, message("assistant", "x", weight=0)],     # not one that is not trained on
        [message("system", "be brief"), one],                   # behind any prompt
        [one, user], [user], [user, message("assistant", " ")],     # nothing before it; none; empty
        [user, message("assistant", "a plum " * 50)],           # cut in training
    ]
    with open(tmp_path / "x.jsonl", "w") as out:
        for messages in records:
            out.write(json.dumps({"messages": messages}) + "\n")
    tokenizer = Tokenizer(folder / "run" / "final")
    template = load_template("auto", tokenizer)
    args = SimpleNamespace(data=[str(tmp_path / "x.jsonl")], columns=[], limit=0, max_length=100)
    got, skipped = memorization.read_targets(args, tokenizer, template)
    assert [r["line"] for r in got] == [1, 2, 3, 4]
    assert [r["text"] for r in got] == ["a fig", "a plum", "a plum", "a plum"]
    assert skipped == {"skipped_without_target": 3, "skipped_overlong": 1}
    assert [tokenizer.decode(r["target"]) for r in got] == ["a fig", "a plum", "a plum", "a plum"]
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "run" / "final")
    for r, before in zip(got, (records[0][:3], [user], [user], records[3][:1])):
        assert r["prompt"] == theirs.apply_chat_template(before, add_generation_prompt=True, tokenize=True,
                                                         return_dict=False)
    args.limit = 2
    assert memorization.read_targets(args, tokenizer, template)[0] == got[:2]
    args.max_length = len(got[1]["prompt"]) + len(got[1]["target"])     # one less than the whole record
    with pytest.raises(ValueError, match="no record has a target within --max-length"):
        memorization.read_targets(args, tokenizer, template)


def test_an_answer_that_does_not_end_with_its_target_is_not_exact(folder, tmp_path, monkeypatch):
    pytest.importorskip("sacrebleu")
    tokenizer = Tokenizer(folder / "run" / "final")
    known = {tuple(r["prompt"]): r["target"] for r in memorization.read_targets(
        SimpleNamespace(data=[folder / "train.jsonl"], columns=[], limit=0, max_length=2048), tokenizer,
        load_template("auto", tokenizer))[0]}

    extra_tokens: list[int] = []

    def answers(extra: list[int]):
        def generate(self, prompts, stop, most, *_, done):
            for i, prompt in enumerate(prompts):
                ids: list[int] = []
                for token in known[tuple(prompt)] + extra:
                    if len(ids) < most and not done(i, ids):
                        ids.append(token)
                extra_tokens.append(len(ids) - len(known[tuple(prompt)]))
                yield i, ids, len(ids) < most and not done(i, ids)
        return generate

    space, = tokenizer.at_start.encode(" ").ids
    for extra, exact, more in (([], 100, {}), ([space] * 9, 0, {}), ([], 0, dict(max_new_tokens=1))):
        monkeypatch.setattr(Engine, "answers", answers(extra))
        extra_tokens.clear()
        got, = result(folder, **more)
        assert got["exact_match"] == exact
        assert more or set(extra_tokens) == {1 if extra else 0}
        assert (got["shared_prefix"] == 100) == (not more)


def test_a_resumed_run_asks_only_for_what_is_missing(folder, tmp_path, monkeypatch):
    pytest.importorskip("sacrebleu")
    models = dict(model=[folder / "run" / "final", folder / "model"], template="llama3")
    whole = result(folder, output=tmp_path / "answers.jsonl", **models)
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 * len(PAIRS) and whole[0]["bleu"] != whole[1]["bleu"]
    asked, original = [], Engine.answers

    def answers(self, prompts, *args, **more):
        asked.extend(prompts)
        return original(self, prompts, *args, **more)
    monkeypatch.setattr(Engine, "answers", answers)
    for kept in (0, 1, 5, 13, len(lines)):
        (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:kept]) + b"".join(lines[kept:kept + 1])[:-9])
        asked.clear()
        assert result(folder, output=tmp_path / "answers.jsonl", **models) == whole
        assert len(asked) == len(lines) - kept
        assert sorted((tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)


@pytest.mark.parametrize("more, says", [
    (dict(max_new_tokens=3), "max_new_tokens was 0, is 3"), (dict(dtype="bf16"), "dtype was fp32, is bf16"),
    (dict(limit=2), "limit was 0, is 2"), (dict(model="other"), "other was None"),
    (dict(tokenizer="other"), "is .*'tokenizer': 'other'"),
])
def test_a_file_of_other_settings_is_not_resumed(folder, tmp_path, more, says, monkeypatch):
    pytest.importorskip("sacrebleu")
    if "model" in more:
        more = dict(model=make_model(tmp_path / "other", seed=9), template="llama3")
    file = tmp_path / "answers.jsonl"
    result(folder, output=file)
    text = file.read_bytes()
    if "tokenizer" in more:
        more = {}
        monkeypatch.setattr(Tokenizer, "fingerprint", "other")
    with pytest.raises(ValueError, match=f"other settings .*{says}"):
        result(folder, output=file, **more)
    assert file.read_bytes() == text


@pytest.mark.parametrize("text", ["notes", "{}\n"])
def test_a_file_of_another_kind_is_left_alone(folder, tmp_path, text):
    pytest.importorskip("sacrebleu")
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match="is not an output of this command|other settings"):
        result(folder, output=tmp_path / "x")
    assert (tmp_path / "x").read_text() == text


def test_two_ranks_give_the_numbers_of_one(folder, tmp_path):
    pytest.importorskip("sacrebleu")
    one = result(folder, output=tmp_path / "one.jsonl")
    run_module("eval.memorization", arguments(folder, output=tmp_path / "two.jsonl",
                                              json=tmp_path / "two.json"), ranks=2)
    assert json.loads((tmp_path / "two.json").read_text())["results"] == one
    lines = [sorted(rows_of(tmp_path / name), key=lambda r: r["line"]) for name in ("one.jsonl", "two.jsonl")]
    assert lines[0] == lines[1] and len(lines[0]) == len(PAIRS)


def test_the_command_prints_scores_and_signature(folder):
    pytest.importorskip("sacrebleu")
    expected, = result(folder)
    done = run_module("eval.memorization", arguments(folder))
    assert done.stderr == ""
    for name in memorization.METRICS:
        low, high = expected[f"{name}_interval"]
        assert f"{expected[name]:.2f}  95% [{low:.2f}, {high:.2f}]" in done.stdout
    assert expected["signature"] in done.stdout


def test_a_missing_sacrebleu_is_one_line_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ValueError, match="pip install -r requirements-eval.txt$"):
        memorization.main(arguments(folder, model="nowhere"))


@pytest.mark.parametrize("more, says", [
    (dict(limit=-1), "--limit -1"), (dict(batch_size=0), "--batch-size 0"), (dict(output="."), "--output ."),
    (dict(max_new_tokens=-1), "--max-new-tokens -1"), (dict(data="nowhere.jsonl"), "nowhere.jsonl: no such"),
    (dict(data=["x.jsonl", "./x.jsonl"]), "--data x.jsonl ./x.jsonl: a file is given twice"),
])
def test_wrong_flags_are_named(folder, more, says):
    if "data" in more:
        pytest.importorskip("sacrebleu")
    with pytest.raises(ValueError, match=says):
        memorization.main(arguments(folder, **more))
