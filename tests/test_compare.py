"""Runs compared: what page and tables say against the runs' own files, transformers and eval.spans."""
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from markupsafe import Markup

from chat import KINDS, render, tokenize
from runtime.tokenizer import Tokenizer
from runtime.weights import model_fingerprint
from eval import compare, examples, spans
from eval.common import load
from eval.compare import cell_texts, picture, shade, visible
from eval.results import Run, run_cells
from tiny import arguments, flags, make_model, make_records, metrics, run_here, run_module, setup

NASTY = "</div><script>alert('1')</script>\n\t <b>&amp;"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two finished runs, it and im, and test.jsonl, whose first record would like to be markup."""
    folder = setup(tmp_path_factory.mktemp("compare"))
    make_records(folder / "rest.jsonl", 8, seed=3)
    first = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": NASTY},
                          {"role": "assistant", "content": "hello <i>world"}]}
    (folder / "test.jsonl").write_text(json.dumps(first) + "\n" + (folder / "rest.jsonl").read_text())
    for loss in ("it", "im"):
        run_here(arguments(folder, loss, loss=loss, eval_data=folder / "test.jsonl", eval_every=3,
                           log_every=4))
    return folder


@pytest.fixture
def runs(folder, tmp_path) -> Path:
    """Copies that a test may change."""
    for loss in ("it", "im"):
        shutil.copytree(folder / loss, tmp_path / loss)
    return tmp_path


def command(runs: Path, folder: Path, **more: object) -> list[str]:
    base = dict(output=runs / "page.html", json=runs / "out.json", dtype="fp32", device="cpu", bootstrap=200,
                cache_dir=folder / "cache", max_new_tokens=5)
    return [str(runs / "it"), str(runs / "im"), *flags(**{**base, **more})]


def compared(runs: Path, folder: Path, argv: list[str] | None = None, drawn: bool = False, **more: object
             ) -> tuple[str, dict]:
    """The page and --json. drawn: with pictures, which take most of the time."""
    with mock.patch.object(compare, "picture", picture if drawn else lambda _: Markup("<svg></svg>")):
        compare.main([*(argv or []), *command(runs, folder, **more)])
    return (runs / "page.html").read_text(), json.loads((runs / "out.json").read_text())


def values(row: dict) -> dict:
    """{column: value}"""
    return {column: cell["value"] for column, cell in row.items()}


class Page(HTMLParser):
    """Fails where tags are not closed in turn; keeps tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.text, self.styles = [], [], "", ""
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        else:
            self.text += data


# ---------------------------------------------------------------- what is in the runs


def test_configuration_shows_what_differs_and_model_and_data(runs, folder):
    config = json.loads((runs / "im" / "run_config.json").read_text())
    (runs / "im" / "run_config.json").write_text(json.dumps({**config, "lr": 3e-5, "new_flag": True}))
    _, result = compared(runs, folder)
    assert {label: values(row) for label, row in result["tables"]["configuration"].items()} == {
        "model": dict.fromkeys("AB", str(folder / "model")),
        "train_data": dict.fromkeys("AB", str(folder / "train.jsonl")),
        "eval_data": dict.fromkeys("AB", str(folder / "test.jsonl")),
        "loss": {"A": "it", "B": "im"}, "lr": {"A": "0.01", "B": "3e-05"}, "new_flag": {"B": "True"}}


def test_training_and_last_evaluation_are_the_files_own(runs, folder):
    _, result = compared(runs, folder)
    training = result["tables"]["training"]
    held_out = result["tables"]["held-out NLL when training ended"]
    for letter, name in (("A", "it"), ("B", "im")):
        lines = metrics(runs / name)
        last = json.loads((runs / name / "eval.jsonl").read_text().splitlines()[-1])
        assert len(lines) == 8 and last["step"] == 8
        assert training["steps"][letter]["value"] == 8 and training["epochs"][letter]["value"] == 2
        assert training["tokens"][letter]["value"] == sum(line["tokens"] for line in lines)
        assert training["trained tokens"][letter]["value"] == sum(line["trained_tokens"] for line in lines)
        for kind in ("completion", "instruction", "system", "template"):
            known = [(line[f"nll_{kind}"], line["tokens"]) for line in lines[4:]
                     if line[f"nll_{kind}"] is not None]
            if known:
                nats, targets = np.array(known).T
                shown = training[f"NLL in the last epoch, {kind}"][letter]["value"]
                assert shown == pytest.approx(np.average(nats, weights=targets), rel=1e-9)
                assert shown != pytest.approx(nats.mean(), rel=1e-9) or len(known) == 1
            else:
                assert (name, kind) == ("it", "system")     # measured in few steps, and not in all records
            expected = last["data"]["test"][kind]["nll_token_mean"]
            assert held_out[f"test: {kind}"][letter] == {"value": expected}
    row = values(held_out["test: completion"])
    assert row["B - A"] == row["B"] - row["A"]
    assert "B - A" not in training["tokens"]


def test_speed_is_of_all_tokens_and_memory_that_of_the_step_with_the_most():
    lines = [{"step": step, "epoch": step, "tokens": 30, "trained_tokens": 10, "seconds": 0.5,
              "peak_memory_mb": memory} for step, memory in ((1, 70.4), (2, 60.6))]
    cells = run_cells([Run("A", Path("a"), {}, lines, [], None)])
    assert cells["training", "tokens/s", "A"] == {"value": 60}
    assert cells["training", "peak memory, MiB", "A"] == {"value": 70}


SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each curve in the axes' units, from where the ticks and their numbers stand."""
    root = ElementTree.fromstring(svg)

    def axis(name: str):
        ticks = [group for group in root.iter(f"{SVG}g") if group.get("id", "").startswith(f"{name}tick")]
        marks = sorted((float(tick.find(f".//{SVG}use").get(name)),
                        float(tick.find(f".//{SVG}text").text.replace("\u2212", "-"))) for tick in ticks)
        assert [n for _, n in marks] == sorted((n for _, n in marks), reverse=name == "y")     # up is more
        (a, u), (b, v) = marks[0], marks[-1]
        return lambda at: u + (v - u) * (at - a) / (b - a)

    x, y = axis("x"), axis("y")
    axes = next(group for group in root.iter(f"{SVG}g") if group.get("id") == "axes_1")
    lines = [group.find(f"{SVG}path") for group in axes.findall(f"{SVG}g")
             if group.get("id", "").startswith("line2d")]
    return [[(x(float(across)), y(float(down)))
             for across, down in re.findall(r"[ML] (\S+) (\S+)", line.get("d"))] for line in lines]


def figures(page: str) -> dict[str, str]:
    return dict(re.findall(r"<figure><figcaption>(.*?)</figcaption>(<svg.*?</svg>)\s*</figure>", page, re.S))


def test_curves_are_the_files_numbers(runs, folder):
    page, _ = compared(runs, folder, drawn=True)
    shown = {name: drawn(svg) for name, svg in figures(page).items()}
    kinds = ("completion", "instruction", "system", "template")
    assert set(shown) == {*(f"training: {kind}" for kind in kinds),
                          *(f"test: {kind}" for kind in (*kinds, "context"))}
    for i, name in enumerate(("it", "im")):
        lines = metrics(runs / name)
        evaluations = [json.loads(line) for line in (runs / name / "eval.jsonl").read_text().splitlines()]
        assert len(evaluations) == 4
        for kind in kinds:
            train = [(line["step"], line[f"nll_{kind}"]) for line in lines if line[f"nll_{kind}"] is not None]
            held = [(line["step"], line["data"]["test"][kind]["nll_token_mean"]) for line in evaluations]
            for name, expected in (("training", train), ("test", held)):
                curve = shown[f"{name}: {kind}"][i]
                assert len(curve) == len(expected)
                for point, wanted in zip(curve, expected):
                    assert point == pytest.approx(wanted, rel=2e-3, abs=0.02)
    of_it, of_im = shown["training: instruction"]
    assert len(of_it) < len(of_im) == 8     # it does not train on instructions


def test_a_long_curve_is_means_of_neighbours():
    points = [(step, 2.0 + step % 7) for step in range(1, 1001)]
    [curve], [shorter] = drawn(picture({"A": points})), drawn(picture({"A": points[:150]}))
    assert len(curve) == 100 and len(shorter) == 75     # all of the same number of steps
    for i, (x, y) in enumerate(curve):
        ten = [value for _, value in points[10 * i:10 * i + 10]]
        assert (x, y) == pytest.approx((10 * i + 5.5, sum(ten) / 10), rel=1e-3, abs=0.02)


def test_a_run_has_its_letters_colour_in_every_picture(runs, folder):
    page, _ = compared(runs, folder)
    colour = re.search(r"\.B { background: (#\w+); }", page)[1]
    for svg in (picture({"A": [(0, 1.0), (1, 2.0)], "B": [(0, 1.0), (1, 3.0)]}), picture({"B": [(4, 0.0)]})):
        legend = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
        assert f"stroke: {colour}" in svg and "B" in legend


# ---------------------------------------------------------------- what the checkpoints do


def load_run(run: Path):
    return load(str(run / "final"), Namespace(dtype="fp32", template="auto", date=""), torch.device("cpu"))


def test_token_nll_and_answers_equal_transformers(folder):
    loaded = load_run(folder / "im")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "im" / "final", dtype=torch.float32)
    records = examples.read_examples(folder / "test.jsonl", 6)
    responses = examples.respond(loaded, records, Namespace(max_length=60, max_new_tokens=7))
    stop = loaded.tokenizer.special[loaded.template.end_of_turn]
    lengths = [len(one.ids) for one in responses]
    assert len(responses) == 6 and max(lengths) == 60 > min(lengths)
    for example, one in zip(records, responses):
        ids, kinds = tokenize(render(example.messages, loaded.template), loaded.tokenizer)
        of_tokens, texts, losses = zip(*one.tokens)
        assert one.ids == ids[:60] and of_tokens == tuple(KINDS[kind] for kind in kinds[:60])
        with torch.no_grad():
            log_p = theirs(torch.tensor([one.ids])).logits[0].log_softmax(-1)
        expected = [-log_p[t, one.ids[t + 1]].item() for t in range(len(one.ids) - 1)]
        assert losses[0] is None and losses[1:] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert "".join(texts) == loaded.tokenizer.decode(one.ids, skip_special_tokens=False)
        prompt = torch.tensor([tokenize(render(example.question, loaded.template, add_generation_prompt=True),
                                        loaded.tokenizer)[0]])
        made = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                               max_new_tokens=7, eos_token_id=stop, pad_token_id=stop)
        made = made[0, prompt.shape[1]:].tolist()
        assert one.cut == (stop not in made)
        assert one.answer == loaded.tokenizer.decode(made[:made.index(stop)] if stop in made else made)


def test_what_is_answered_is_all_before_a_last_answer(tmp_path):
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    records = [[user, assistant, user, assistant], [assistant], [user, assistant, user], [user], [user]]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"messages": record}) + "\n" for record in records))
    read = examples.read_examples(file, 3)
    assert [(example.messages, example.question) for example in read] == [
        (records[0], [user, assistant, user]), (records[2], records[2]), (records[3], [user])]
    assert [example.where for example in read] == [f"{file}:{line}" for line in (1, 3, 4)]
    assert examples.read_examples(file, 0) == []
    file.write_text(json.dumps({"messages": [assistant]}) + "\n")
    with pytest.raises(ValueError, match="x.jsonl: has no record with a question"):
        examples.read_examples(file, 3)


def test_page_shows_each_token_with_both_values_in_the_colour_of_their_difference(runs, folder):
    page, _ = compared(runs, folder, data=folder / "test.jsonl", answers=3)
    records = examples.read_examples(folder / "test.jsonl", 3)
    a, b = (examples.respond(load_run(folder / name), records, Namespace(max_length=120, max_new_tokens=5))
            for name in ("it", "im"))
    expected = [(kind, f"{kind}, A {x:.3f}, B {y:.3f}, difference {y - x:+.3f}",
                 f"background: {shade(y - x)}")
                for one, two in zip(a, b) for (kind, _, x), (_, _, y) in zip(one.tokens[1:], two.tokens[1:])]
    shown = [(tag["class"], tag["title"], tag["style"])
             for name, tag in Page(page).tags if name == "span" and "style" in tag]
    assert shown == expected and len(shown) > 60
    assert {kind for kind, *_ in shown} >= {"system", "instruction", "completion", "template"}
    assert all(one.answer in Page(page).text for one in (*a, *b))


def test_a_larger_difference_has_a_fuller_colour():
    better, worse = "rgb(30 120 190", "rgb(225 120 20"
    assert [shade(x) for x in (-1.5, -3, -99)] == [f"{better} / {percent}%)" for percent in (32, 65, 65)]
    assert [shade(x) for x in (0, 0.6, 3, 99)] == [f"{worse} / {percent}%)" for percent in (0, 13, 65, 65)]


def test_what_cannot_be_seen_is_marked():
    assert [visible(x) for x in ("", " ", "a\n", " <b>")] == ["\u25cc", " ", "a\u21b5\n", " <b>"]


def test_characters_of_several_tokens_come_with_their_last_one(folder):
    tokenizer = Tokenizer(folder / "model")
    ids = tokenizer.at_start.encode("a \U0001f409 \u00e9b", add_special_tokens=False).ids
    texts = examples.token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids) and "" in texts and "\ufffd" not in "".join(texts)


def test_nll_with_intervals_is_that_of_eval_spans(runs, folder):
    more = dict(data=[folder / "test.jsonl"], dtype="fp32", device="cpu", bootstrap=200, max_length=120,
                cache_dir=folder / "cache", seed=3)
    spans.main(flags(model=[runs / "it" / "final", runs / "im" / "final"], json=runs / "spans.json", **more))
    expected = json.loads((runs / "spans.json").read_text())["results"]
    _, result = compared(runs, folder, data=folder / "test.jsonl", answers=0, seed=3)
    _, read = compared(runs, folder, results=runs / "spans.json")
    assert {row["span"] for row in expected} >= {"completion", "instruction", "system", "template"}
    for name, tables in (("--data", result["tables"]), ("spans.json", read["tables"])):
        for line in expected:
            for mean, words in (("nll_token_mean", "tokens"), ("nll_example_mean", "examples")):
                row = tables[f"{name}: NLL of test.jsonl, mean over {words}"][line["span"]]
                letter = "A" if line["model"].endswith("it/final") else "B"
                assert row[letter] == {"value": line[mean], "interval": line[f"{mean}_interval"]}
                if letter == "B":
                    assert row["B - A"] == {"value": line[f"{mean}_minus_first"],
                                            "interval": line[f"{mean}_minus_first_interval"]}


def test_differences_to_another_checkpoint_than_the_first_run_are_not_taken(runs, folder):
    more = dict(data=[folder / "test.jsonl"], template="llama3", dtype="fp32", device="cpu", bootstrap=50,
                max_length=120, cache_dir=folder / "cache")
    spans.main(flags(model=[folder / "model", runs / "it" / "final", runs / "im" / "final"],
                     json=runs / "spans.json", **more))
    _, result = compared(runs, folder, results=runs / "spans.json")
    row = result["tables"]["spans.json: NLL of test.jsonl, mean over tokens"]["completion"]
    assert row["B - A"] == {"value": row["B"]["value"] - row["A"]["value"]}
    assert set(row) == {"A", "B", "B - A"}


def test_runs_that_tokenize_differently_are_left_out_with_a_note(runs, folder):
    make_model(runs / "model", tokenizer="mistral")
    run_here(arguments(runs, "other", train_data=folder / "train.jsonl", template="tulu", max_steps=1))
    page, result = compared(runs, folder, [str(runs / "other")], data=folder / "test.jsonl", answers=1)
    assert any(note.startswith("B is left out of the NLL on --data") for note in result["notes"])
    assert set(result["tables"]["--data: NLL of test.jsonl, mean over tokens"]["completion"]) == {"A"}
    assert page.count("tokenized differently: there are no common tokens") == 2


def test_two_ranks_write_the_same_page(runs, folder):
    page, one = compared(runs, folder, data=folder / "test.jsonl")
    run_module("eval.compare", command(runs, folder, data=folder / "test.jsonl"), ranks=2)
    two = json.loads((runs / "out.json").read_text())
    pages = (page, (runs / "page.html").read_text())
    tokens = [[float(nats) for pair in re.findall(r"A ([\d.]+), B ([\d.]+), difference", text)
               for nats in pair] for text in pages]
    assert len(tokens[0]) > 200 and tokens[0] == pytest.approx(tokens[1], abs=2e-3)
    for title, rows in one["tables"].items():
        for label, row in rows.items() if title.startswith("--data") else ():
            assert values(row) == pytest.approx(values(two["tables"][title][label]), rel=1e-4, abs=1e-5)


def test_without_data_no_model_is_touched(runs, folder, monkeypatch):
    monkeypatch.setattr(compare, "load", lambda *a: pytest.fail("loaded"))
    monkeypatch.setattr(compare, "start_ranks", lambda *a: pytest.fail("started"))
    page, _ = compared(runs, folder)
    assert "Answers" not in Page(page).text


# ---------------------------------------------------------------- results of other commands


def write(file: Path, result: object) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result))
    return file


def test_results_find_their_runs_by_the_folder_in_them(runs, folder, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "link").symlink_to(runs / "im")
    (runs / "all").symlink_to(runs)
    bleu = {"records": 9, "bleu": 14.5, "bleu_interval": [9.5, 20.0], "signature": "x|y"}
    write(runs / "it" / "eval" / "memorization.json", {"data": ["train.jsonl"], "limit": 0, "results": [
        {"model": "it/final", **bleu}, {"model": str(runs / "link"), **bleu, "bleu": 11.5},
        {"model": str(folder / "model"), **bleu, "bleu": 99.5}]})
    for name, score in (("it", 0.25), ("im", 0.5)):
        write(runs / name / "eval" / "he.json", {"model": f"{name}/final", "problems": 3, "temperature": 0.2,
                                                 "pass@1": score, "pass@1_standard_error": 0.1})
    write(runs / "h.json", {"config": {"model": "spantune", "model_args": {"pretrained": "im"}}, "results": {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.05},
        "gsm": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"}}})
    write(runs / "w.json", {"model": "it", "name": "w", "benchmark": "alpaca", "output": "w.json",
                            "mean_tokens": 7.5, "win_rate": 12.5, "win_rate_standard_error": 1.5})
    write(runs / "s.settings.json", {"model": "it", "seed": 3})
    page, result = compared(runs / "all", folder,
                            results=[runs / f"{name}.json" for name in ("h", "w", "s.settings")])
    tables = result["tables"]
    assert result["notes"] == [] and set(tables) == {
        "configuration", "training", "held-out NLL when training ended", "memorization.json", "he.json",
        "h.json", "w.json"}
    assert tables["memorization.json"] == {
        "records": {"A": {"value": 9}, "B": {"value": 9}},
        "bleu": {"A": {"value": 14.5, "interval": [9.5, 20.0]}, "B": {"value": 11.5, "interval": [9.5, 20.0]},
                 "B - A": {"value": -3.0}},
        "signature": {"A": {"value": "x|y"}, "B": {"value": "x|y"}}}
    assert tables["he.json"]["pass@1"] == {"A": {"value": 0.25, "error": 0.1},
                                           "B": {"value": 0.5, "error": 0.1}, "B - A": {"value": 0.25}}
    assert tables["h.json"] == {"arc acc": {"B": {"value": 0.5, "error": 0.05}},
                                "gsm exact_match,strict-match": {"B": {"value": 0.25}}}
    assert tables["w.json"]["win_rate"] == {"A": {"value": 12.5, "error": 1.5}}
    assert set(tables["w.json"]) == {"benchmark", "mean_tokens", "win_rate"} and "99.5" not in page


def test_results_of_weights_that_a_run_no_longer_has_are_left_out(runs, folder):
    """After --overwrite the folder eval/ is still there."""
    hashes = {f"{runs}/it": model_fingerprint(runs / "it" / "final"), f"{runs}/im": "another"}
    write(runs / "it" / "eval" / "m.json", {"weights": hashes, "results": [
        {"model": model, "bleu": 1.5} for model in hashes]})
    _, result = compared(runs, folder)
    assert result["tables"]["m.json"] == {"bleu": {"A": {"value": 1.5}}}
    [note] = result["notes"]
    assert note.endswith(f"m.json: left out, {runs}/im has other weights than were measured")


def test_settings_are_shown_where_the_runs_differ(runs, folder):
    for name, limit in (("it", 0), ("im", 100)):
        write(runs / name / "eval" / "m.json", {"limit": limit, "seed": 0, "results": [
            {"model": str(runs / name), "bleu": 1.5}]})
    _, result = compared(runs, folder)
    assert {label: values(row) for label, row in result["tables"]["m.json"].items()} == {
        "bleu": {"A": 1.5, "B": 1.5, "B - A": 0}, "--limit": {"A": 0, "B": 100}}


def test_results_are_told_apart_by_the_names_of_their_files(runs, folder):
    for file, name, score in (("it/eval/cold", "it", 0.1), ("it/eval/hot", "it", 0.2),
                              ("im/eval/hot", "im", 0.4), ("more/hot", "im", 0.9)):
        write(runs / f"{file}.json", {"model": str(runs / name), "pass@1": score})
    again = runs / "more" / "hot.json"
    page, result = compared(runs, folder, results=again)
    assert values(result["tables"]["cold.json"]["pass@1"]) == {"A": 0.1}
    assert values(result["tables"]["hot.json"]["pass@1"]) == {"A": 0.2, "B": 0.4, "B - A": 0.2}
    assert result["notes"] == [f"{again}: left out, another hot.json has results of the same run; rename one"]


def test_unknown_results_are_tables_of_their_numbers(runs, folder):
    for name in ("it", "im"):
        write(runs / name / "eval" / "own.json", {
            "model": str(runs / name), "good": 0.5, "good_interval": ["low", 1], "parts": {"x": 2},
            "list": [1, {}], "none": None, "yes": True, "nan": float("nan"), "huge": float("inf")})
    page, result = compared(runs, folder)
    assert {label: row["B"] for label, row in result["tables"]["own.json"].items() if label != "nan"} == {
        "good": {"value": 0.5}, "parts x": {"value": 2}, "huge": {"value": float("inf")}}
    assert "own.json" in Page(page).text


def test_files_that_fit_no_run_are_named(runs, folder):
    other = write(runs / "other.json", {"model": "elsewhere", "x": 1.5})
    rows = write(runs / "rows.json", {"results": [{"span": "completion", "model": str(runs / "it")}]})
    plain = write(runs / "plain.json", [1])
    typed = write(runs / "typed.json", {"model": [1]})
    broken = runs / "broken.json"
    broken.write_text('{"model": ')
    page, result = compared(runs, folder, results=[other, rows, plain, typed, broken])
    unlike = "not a result of an evaluation command"
    assert result["notes"] == [
        f'{other}: its "model" is not one of these runs', f"{rows}: {unlike} (it lacks 'data')",
        f"{plain}: {unlike} (holds a JSON list, not an object)",
        f"{typed}: {unlike} (its fields hold other values)",
        f"{broken}: {unlike} (is not JSON, or is cut off: Expecting value: line 1 column 11 (char 10))"]
    assert all(note in Page(page).text for note in result["notes"])
    assert set(result["tables"]) == {"configuration", "training", "held-out NLL when training ended"}


# ---------------------------------------------------------------- the page and the terminal


def test_what_the_runs_hold_is_only_text_on_a_page_that_stands_alone(runs, folder, capsys):
    odd = runs / 'a$\\frac{"<i>\n\x1b[31m$'
    shutil.copytree(runs / "it", odd)
    evaluations = (odd / "eval.jsonl").read_text().replace('"test"', json.dumps('$x_"<i>\n\x1b'))
    (odd / "eval.jsonl").write_text(evaluations)
    write(odd / "eval" / "<b>x.json", {"model": str(odd), "<img src=x>": 1.5, "half \ud800": "\x1b[2J"})
    text, result = compared(runs, folder, [str(odd)], drawn=True, data=folder / "test.jsonl")
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "i", "b", "object", "base")
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "onload", "onclick", "action"), (tag, name)
            assert name not in ("href", "xlink:href") or value.startswith("#"), (tag, value)
            if not name.startswith("xmlns"):
                assert "://" not in (value or "") and not re.search(r"url\((?!#)", value or "")
    assert "://" not in page.styles and "url(" not in page.styles and "@import" not in page.styles
    for shown in (NASTY, "hello <i>world", odd.name, '$x_"<i>\n\x1b: completion', "<b>x", "<img src=x>",
                  "half ?"):
        assert shown in page.text
    assert '$x_"<i>\n\x1b: completion' in result["tables"]["held-out NLL when training ended"]
    pictures = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(pictures) == 14      # of the training data, test and the odd run's own name for test
    for svg in pictures:
        ElementTree.fromstring(svg)
    printed = capsys.readouterr().out
    assert "half \\ud800" in printed and "\x1b" not in printed
    assert printed.splitlines()[0].endswith('a$\\frac{"<i> \\u001b[31m$')


def test_a_difference_whose_interval_excludes_zero_is_marked(runs, folder):
    def entry(model: str, span: str, **values: object) -> dict:
        both = {f"{mean}{end}": value for mean in ("nll_token_mean", "nll_example_mean")
                for end, value in values.items()}
        return {"model": str(runs / model), "data": "x.jsonl", "span": span, **both}

    entries = [entry("it", "completion", **{"": 2.0, "_interval": [1.0, 3.0]})]
    for span, low, high in (("completion", -0.5, -0.1), ("instruction", -0.3, 0.1), ("system", 0.1, 0.5)):
        values = {"": 1.5, "_interval": [1.0, 2.0], "_minus_first": (low + high) / 2}
        entries.append(entry("im", span, **values, _minus_first_interval=[low, high]))
    page, _ = compared(runs, folder, results=write(runs / "spans.json", {"results": entries}))
    marked = re.findall(r'<td class="clear">(\S+) <small>(.*?)</small>', page)
    assert marked == 2 * [("-0.300", "[-0.500, -0.100]"), ("+0.300", "[0.100, 0.500]")]


def test_without_matplotlib_the_error_says_how_to_install_it(runs, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install -r requirements-eval.txt"):
        compare.main(command(runs, folder, data=folder / "test.jsonl"))
    assert not (runs / "page.html").exists()


def test_what_is_missing_is_a_note(runs, folder):
    shutil.rmtree(runs / "it" / "final")
    (runs / "it" / "eval.jsonl").unlink()
    whole = (runs / "it" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs / "it" / "metrics.jsonl").write_text("".join(whole[:5]) + whole[5][:40])
    bare = runs / "bare"
    bare.mkdir()
    shutil.copy(runs / "it" / "run_config.json", bare)
    page, result = compared(runs, folder, [str(bare)], drawn=True, data=folder / "test.jsonl", answers=2)
    assert [note.removeprefix(f"{runs}/") for note in result["notes"]] == [
        "A has no metrics.jsonl, or an empty one: no training curves",
        "A was not evaluated while it trained (no eval.jsonl)",
        "A has no final/: it was interrupted or is still training",
        "it/metrics.jsonl: 1 damaged line(s) were left out",
        "B was not evaluated while it trained (no eval.jsonl)",
        "B has no final/: it was deleted"]
    assert all(note in Page(page).text for note in result["notes"])
    assert values(result["tables"]["training"]["steps"]) == {"B": 5, "C": 8}
    assert "Answers" in page and "NLL by token" not in page     # there is no second run to compare with
    assert len(drawn(figures(page)["training: completion"])[0]) == 5


def test_runs_with_nothing_but_a_configuration_are_compared(runs, folder):
    for name in ("it", "im"):
        for path in ("metrics.jsonl", "eval.jsonl"):
            (runs / name / path).write_text("")
        shutil.rmtree(runs / name / "final")
    page, result = compared(runs, folder, data=folder / "test.jsonl")
    assert len(result["notes"]) == 6 and "NLL while training" not in page
    assert values(result["tables"]["configuration"]["loss"]) == {"A": "it", "B": "im"}


def test_two_runs_fit_in_80_columns_and_the_json_has_the_numbers(runs, folder, capsys):
    deep = runs / ("a_run_with_a_long_name_" * 4)
    shutil.copytree(runs / "it", deep)
    config = json.loads((deep / "run_config.json").read_text())
    (deep / "run_config.json").write_text(json.dumps({**config, "model": "/far/away" * 20}))
    shutil.rmtree(runs / "it")
    deep.rename(runs / "it")
    write(runs / "it" / "eval" / "h.json", {"model": str(runs / "it"), "results": {
        "a_very_long_name_of_a_task" * 2: {"acc,none": 0.123456, "acc_stderr,none": 0.01}}})
    capsys.readouterr()
    _, result = compared(runs, folder, data=folder / "test.jsonl", answers=0)
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines[:-1] if len(line) > 80]
    assert lines[0].startswith("A  ") and lines[1].startswith("B  ")
    for title, rows in result["tables"].items():
        for label, row in rows.items() if title != "configuration" else ():
            start = next(i for i in range(lines.index(title), len(lines)) if lines[i].startswith(f" {label}"))
            shown = "\n".join(lines[start:start + 4])
            for column, cell in row.items():
                text, spread = cell_texts(cell, column)
                assert text in shown and spread in shown
    start = lines.index("--data: NLL of test.jsonl, mean over tokens")
    assert lines[start + 1].split() == ["A", "B", "B", "-", "A"]    # as columns


def test_numbers_are_floats_with_three_decimals_or_whole():
    assert cell_texts({"value": 12345}, "A") == ("12,345", "")
    assert cell_texts({"value": 0.5, "interval": [0.25, 1]}, "A") == ("0.500", "[0.25, 1.00]")
    assert cell_texts({"value": 0.5, "interval": [0.25, 1.0]}, "B - A") == ("+0.500", "[0.250, 1.000]")
    assert cell_texts({"value": -0.5, "error": 0.125}, "A") == ("-0.500", "\u00b1 0.125")
    assert cell_texts({"value": float("nan")}, "A") == ("nan", "")
    assert cell_texts({"value": "x"}, "A") == ("x", "")


@pytest.mark.parametrize("argv, more, says", [
    (["{runs}/it"], {}, "given twice"), (["{runs}/nowhere"], {}, "nowhere: not an output folder"),
    (["{runs}/it/final"], {}, "final: not an output folder .* no run_config.json; give the folder"),
    ([], dict(output="{runs}/it/metrics.jsonl"), "--output .*/metrics.jsonl: RUN names this file, too; give"),
    ([], dict(json="{runs}/im/run_config.json"), "--json .*/run_config.json: RUN names this file, too; give"),
    ([], dict(output="nowhere/x.html"), "--output nowhere/x.html"), ([], dict(answers=-1), "--answers -1"),
    ([], dict(results="nowhere.json"), "--results nowhere.json: no such file"),
    ([], dict(data="nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ([], dict(prompts="nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ([], dict(max_new_tokens=0), "--max-new-tokens 0"), ([], dict(result="x"), "unrecognized"),
    ([], dict(data=["x.jsonl", "./x.jsonl"]), "--data x.jsonl ./x.jsonl: a file is given twice"),
])
def test_wrong_flags_are_named(runs, folder, argv, more, says):
    with pytest.raises(ValueError, match=says):
        compare.main([word.format(runs=runs) for word in argv + command(runs, folder, **more)])
    assert not (runs / "page.html").exists()


def test_a_run_alone_has_its_own_page_in_its_folder(runs, folder, capsys):
    compare.main([str(runs / "im"), *flags(json=runs / "out.json")])
    text = (runs / "im" / "page.html").read_text()
    page, tables = Page(text), json.loads((runs / "out.json").read_text())["tables"]
    assert ("h1", {}) in page.tags and re.search(r"<h1>im</h1>", text) and "runs compared" not in page.text
    assert "differ" not in page.text and "difference" not in page.text and "Bold" not in page.text
    # The flags of arguments() that are not the defaults, which --loss im and --epochs 2 are.
    assert {"lr", "batch_size", "max_length", "template"} <= set(tables["configuration"])
    assert not {"loss", "epochs", "normalize", "seed"} & set(tables["configuration"])
    assert all(set(row) == {"A"} for rows in tables.values() for row in rows.values())
    assert len(drawn(figures(text)["training: completion"])) == 1
    assert capsys.readouterr().out.endswith(f"{runs}/im/page.html is the page\n")
    # With records to answer, there is nothing to compare a token with.
    compare.main([str(runs / "im"), *command(runs, folder, data=folder / "test.jsonl", answers=1)[2:]])
    text = Page((runs / "page.html").read_text()).text
    assert "Answers" in text and "NLL by token" not in text


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_evaluated(runs, folder, monkeypatch):
    (runs / "it" / "page.html").mkdir()
    monkeypatch.setattr(compare, "ask_checkpoints", None)
    with pytest.raises(ValueError, match="--output .*/it/page.html: is a folder; give a file"):
        compare.main(command(runs, folder, output=None, data=folder / "test.jsonl"))


def test_a_page_that_cannot_be_written_in_the_end_costs_no_table(runs, folder, monkeypatch, capsys):
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compare, "write_text", fails)
        with pytest.raises(OSError, match="No space left"):
            compare.main(command(runs, folder, data=folder / "test.jsonl", answers=1))
    assert "--data: NLL of test.jsonl, mean over tokens" in capsys.readouterr().out


def test_a_prompt_that_the_template_refuses_is_found_before_the_nll_is_computed(runs, folder, monkeypatch):
    file, short = runs / "prompts.jsonl", runs / "short.jinja"
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 20]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    short.write_text("{% if messages | length > 30 %}{{ raise_exception('too many turns') }}{% endif %}"
                     + (Path(compare.__file__).parent.parent / "templates" / "llama3.jinja").read_text())
    monkeypatch.setattr(spans, "evaluate", None)
    with pytest.raises(ValueError, match="prompts.jsonl:1: .*too many turns"):
        compare.main(command(runs, folder, data=folder / "test.jsonl", prompts=file, template=short))


def test_more_runs_than_letters_are_refused(runs):
    with pytest.raises(ValueError, match="27 runs: give at most 26"):
        compare.main([str(runs / str(i)) for i in range(27)])


def test_files_of_one_name_are_told_apart_by_their_paths(runs, folder):
    """In the curves of training and in the tables of results."""
    files = [make_records(runs / name / "test.jsonl", 3, seed=i) for i, name in enumerate(("it", "im"))]
    run_here(arguments(folder, runs / "two", eval_data=files, max_steps=1))
    page, result = compared(runs, folder, [str(runs / "two")], data=files, answers=0)
    for name in ("it/test.jsonl", "im/test.jsonl"):
        assert f"--data: NLL of {name}, mean over tokens" in result["tables"]
        assert f"{name}: completion" in result["tables"]["held-out NLL when training ended"]
        assert f"<figcaption>{name}: completion</figcaption>" in page


def test_an_error_is_one_line(runs, folder):
    (runs / "im" / "run_config.json").write_text("[")
    done = run_module("eval.compare", command(runs, folder), check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
