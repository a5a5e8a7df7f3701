"""Runs compared: what page and tables say against the runs' own files, transformers and eval.spans."""
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import transformers

from chat import render, tokenize
from runtime.tokenizer import Tokenizer
from eval import compare, examples, spans
from eval.common import load
from eval.compare import EDGES, cell_texts, number, picture, shade, visible
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
                max_length=120, cache_dir=folder / "cache", max_new_tokens=5)
    return [str(runs / "it"), str(runs / "im"), *flags(**{**base, **more})]


def compared(runs: Path, folder: Path, argv: list[str] | None = None, **more: object) -> tuple[str, dict]:
    """The page, and --json with its tables' rows by (title, label)."""
    compare.main([*(argv or []), *command(runs, folder, **more)])
    result = json.loads((runs / "out.json").read_text())
    rows = {(table["title"], row["label"]): row for table in result["tables"] for row in table["rows"]}
    assert len(rows) == sum(len(table["rows"]) for table in result["tables"])
    return (runs / "page.html").read_text(), {**result, "rows": rows}


def values(row: dict) -> dict:
    return {letter: cell["value"] for letter, cell in row["runs"].items()}


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
    shown = {label: values(row) for (title, label), row in result["rows"].items() if title == "configuration"}
    assert shown == {
        "model": dict.fromkeys("AB", str(folder / "model")),
        "train_data": dict.fromkeys("AB", str(folder / "train.jsonl")),
        "eval_data": dict.fromkeys("AB", str(folder / "test.jsonl")),
        "loss": {"A": "it", "B": "im"}, "lr": {"A": "0.01", "B": "3e-05"}, "new_flag": {"B": "True"}}


def test_training_and_last_evaluation_are_the_files_own(runs, folder):
    _, result = compared(runs, folder)
    rows = result["rows"]
    for letter, name in (("A", "it"), ("B", "im")):
        lines = metrics(runs / name)
        last = json.loads((runs / name / "eval.jsonl").read_text().splitlines()[-1])
        assert len(lines) == 8 and last["step"] == 8

        def value(label: str) -> float:
            return values(rows["training", label])[letter]
        assert value("steps") == 8 and value("epochs") == 2
        assert value("tokens") == sum(line["tokens"] for line in lines)
        assert value("trained tokens") == sum(line["trained_tokens"] for line in lines)
        for kind in ("completion", "instruction", "system", "template"):
            known = [line[f"nll_{kind}"] for line in lines[4:] if line[f"nll_{kind}"] is not None]
            if known:
                assert value(f"NLL, {kind}") == pytest.approx(sum(known) / len(known))
            else:
                assert (name, kind) == ("it", "system")     # looked at in few steps, and not in all records
            held = rows["held out, when training ended", f"test: {kind}"]
            assert held["runs"][letter]["value"] == last["data"]["test"][kind]["nll_token_mean"]
    row = rows["held out, when training ended", "test: completion"]
    assert row["minus_first"] == {"B": {"value": values(row)["B"] - values(row)["A"]}}
    assert not rows["training", "tokens"]["minus_first"]


SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str, logarithmic: bool = False) -> dict[str, list[tuple[float, float]]]:
    """{letter: its curve's points in the axes' units}, from where the ticks and their numbers stand."""
    root = ElementTree.fromstring(svg)

    def axis(name: str):
        ticks = [group for group in root.iter(f"{SVG}g") if group.get("id", "").startswith(f"{name}tick")]
        marks = sorted((float(tick.find(f".//{SVG}use").get(name)),
                        float(tick.find(f".//{SVG}text").text.replace("\u2212", "-"))) for tick in ticks)
        assert [n for _, n in marks] == sorted((n for _, n in marks), reverse=name == "y")     # up is more
        (a, u), (b, v) = marks[0], marks[-1]
        if logarithmic and name == "y":
            return lambda at: u * (v / u) ** ((at - a) / (b - a))
        return lambda at: u + (v - u) * (at - a) / (b - a)

    x, y = axis("x"), axis("y")
    curves = {}
    for path in root.iter(f"{SVG}path"):
        letter = re.search(r"stroke: var\(--([A-Z])\)", path.get("style", ""))
        if letter and "fill: none" in path.get("style"):
            points = re.findall(r"[ML] (\S+) (\S+)", path.get("d"))
            curves[letter[1]] = [(x(float(across)), y(float(down))) for across, down in points]
    return curves


def figures(page: str) -> dict[str, str]:
    return dict(re.findall(r"<figure><figcaption>(.*?)</figcaption>(<svg.*?</svg>)</figure>", page, re.S))


def test_curves_are_the_files_numbers(runs, folder):
    page, _ = compared(runs, folder)
    shown = {name.removesuffix(" (logarithmic)"): drawn(svg, name.endswith(" (logarithmic)"))
             for name, svg in figures(page).items()}
    kinds = ("completion", "instruction", "system", "template")
    assert set(shown) == {*kinds, *(f"test: {kind}" for kind in (*kinds, "context"))}
    for letter, name in (("A", "it"), ("B", "im")):
        lines = metrics(runs / name)
        evaluations = [json.loads(line) for line in (runs / name / "eval.jsonl").read_text().splitlines()]
        assert len(evaluations) == 4
        for kind in kinds:
            train = [(line["step"], line[f"nll_{kind}"]) for line in lines if line[f"nll_{kind}"] is not None]
            held = [(line["step"], line["data"]["test"][kind]["nll_token_mean"]) for line in evaluations]
            for got, expected in ((shown[kind][letter], train), (shown[f"test: {kind}"][letter], held)):
                assert len(got) == len(expected)
                for point, wanted in zip(got, expected):
                    assert point == pytest.approx(wanted, rel=2e-3, abs=0.02)
    assert len(shown["instruction"]["A"]) < len(shown["instruction"]["B"]) == 8     # A does not train on it


@pytest.mark.parametrize("points, logarithmic", [
    ([(1, 20.0), (50, 0.5), (90, 0.004)], True), ([(0, 3.0), (7, 2.5)], False), ([(4, 0.0)], False),
    ([(1, 9.0), (2, 0.8)], True), ([(0, -1.0), (10, 1.0), (20, 1.0)], False)])
def test_a_picture_places_points_of_any_range(points, logarithmic):
    svg, is_logarithmic = picture({"A": points, "B": []})
    assert is_logarithmic == logarithmic
    root = ElementTree.fromstring(svg)
    ticks = [group for group in root.iter(f"{SVG}g") if group.get("id", "").startswith("ytick")]
    assert 2 <= len(ticks) <= 12
    width, height = map(float, root.get("viewBox").split()[2:])
    for mark in root.iter(f"{SVG}use"):
        assert 0 <= float(mark.get("x")) <= width and 0 <= float(mark.get("y")) <= height
    if len(points) > 1:
        for point, wanted in zip(drawn(svg, logarithmic)["A"], points):
            assert point == pytest.approx(wanted, rel=0.01, abs=0.01)


def test_long_curves_are_means_in_a_band_from_the_lowest_to_the_highest():
    points = [(step, 2.0 + step % 7) for step in range(1, 1001)]
    svg, _ = picture({"A": points})
    curve = drawn(svg)["A"]
    assert len(curve) == 100
    for i, (x, y) in enumerate(curve):
        ten = [value for _, value in points[10 * i:10 * i + 10]]
        assert (x, y) == pytest.approx((10 * i + 5.5, sum(ten) / 10), rel=1e-3, abs=0.02)
    # The band is drawn as a shape of its own; the axes end a little above and below it.
    paths = [(path.get("style", ""), [float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))])
             for path in ElementTree.fromstring(svg).iter(f"{SVG}path")]
    line = next(heights for style, heights in paths if "stroke: var(--A)" in style)
    band = max((heights for _, heights in paths if len(heights) > 200), key=len)
    scale = (max(line) - min(line)) / (max(y for _, y in curve) - min(y for _, y in curve))
    assert (max(band) - min(band)) / scale == pytest.approx(6, rel=0.01)      # from 2 to 8


def letters_of(svg: str) -> dict[str, float]:
    """{letter: how far down it stands}"""
    marks = [text for text in ElementTree.fromstring(svg).iter(f"{SVG}text") if text.text in set("ABCDEF")]
    return {text.text: float(re.search(r"translate\(\S+ (\S+)\)|$", text.get("transform", ""))[1]
                             or text.get("y")) for text in marks}


def test_letters_of_curves_that_end_together_do_not_overlap():
    curves = {letter: [(0, 5.0), (9, 3.0 + i / 1000)] for i, letter in enumerate("ABCDEF")}
    ends = letters_of(picture(curves)[0])
    heights = sorted(ends.values())
    assert set(ends) == set("ABCDEF") and all(b - a >= 8 for a, b in zip(heights, heights[1:]))
    assert sorted(ends, key=ends.get) == list("FEDCBA")     # as the curves end, the highest on top


def test_pictures_take_their_colours_from_the_page():
    svg, _ = picture({"A": [(0, 1.0), (1, 2.0)], "Z": [(0, 1.0), (1, 3.0)]})
    assert "var(--A)" in svg and "var(--Z)" in svg and "currentColor" in svg
    assert not re.findall(r"#[0-9a-f]{6}\b(?!\d)", re.sub(r'(id|href)="#?\w+"', "", svg).replace("url(#", ""))


# ---------------------------------------------------------------- what the checkpoints do


def load_run(run: Path):
    return load(str(run / "final"), Namespace(dtype="fp32", template="auto", date=""), torch.device("cpu"))


def test_token_nll_and_answers_equal_transformers(folder):
    loaded = load_run(folder / "im")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "im" / "final", dtype=torch.float32)
    some = examples.read_examples(folder / "test.jsonl", 6)
    seen = examples.respond(loaded, some, Namespace(max_length=60, max_new_tokens=7))
    stop = loaded.tokenizer.special[loaded.template.end_of_turn]
    lengths = [len(one.ids) for one in seen]
    assert len(seen) == 6 and max(lengths) == 60 > min(lengths)
    for example, one in zip(some, seen):
        ids, kinds = tokenize(render(example.messages, loaded.template), loaded.tokenizer)
        assert (one.ids, one.kinds) == (ids[:60], kinds[:60])
        with torch.no_grad():
            log_p = theirs(torch.tensor([one.ids])).logits[0].log_softmax(-1)
        expected = [-log_p[t, one.ids[t + 1]].item() for t in range(len(one.ids) - 1)]
        assert one.nll == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert "".join(one.texts) == loaded.tokenizer.decode(one.ids, skip_special_tokens=False)
        prompt = torch.tensor([tokenize(render(example.question, loaded.template, add_generation_prompt=True),
                                        loaded.tokenizer)[0]])
        made = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                               max_new_tokens=7, eos_token_id=stop, pad_token_id=stop)
        made = made[0, prompt.shape[1]:].tolist()
        assert one.cut == (stop not in made)
        assert one.answer == loaded.tokenizer.decode(made[:made.index(stop)] if stop in made else made)


def test_what_is_answered_is_all_before_a_last_answer(tmp_path):
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    records = [[user, assistant, user, assistant], [user, assistant, user], [assistant], [user]]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": record}) + "\n" for record in records))
    some = examples.read_examples(tmp_path / "x.jsonl", 3)
    assert [(example.question, example.expected) for example in some] == [
        ([user, assistant, user], "b"), ([user, assistant, user], None), ([], "b")]
    assert [example.where for example in some] == [f"{tmp_path}/x.jsonl:{line}" for line in (1, 2, 3)]


def test_records_without_a_question_or_an_answer_are_shown(runs, folder):
    user, assistant = {"role": "user", "content": "sea"}, {"role": "assistant", "content": "a plum"}
    lines = [json.dumps({"messages": [message]}) + "\n" for message in (user, assistant)]
    (runs / "x.jsonl").write_text("".join(lines))
    page, _ = compared(runs, folder, prompts=runs / "x.jsonl")
    assert page.count("there is nothing to answer") == 2 and page.count("<h4>expected</h4>") == 1
    assert page.count('<div class="spans">') == 2


def test_page_shows_each_token_with_both_values_in_the_colour_of_their_difference(runs, folder):
    page, _ = compared(runs, folder, data=folder / "test.jsonl", answers=3)
    some = examples.read_examples(folder / "test.jsonl", 3)
    a, b = (examples.respond(load_run(folder / name), some, Namespace(max_length=120, max_new_tokens=5))
            for name in ("it", "im"))
    expected = [(x, y) for one, two in zip(a, b) for x, y in zip(one.nll, two.nll)]
    shown = [(tag.get("class") or "", *map(float, re.findall(r"[-+]?[\d.]+", tag["title"])))
             for name, tag in Page(page).tags if name == "span" and "difference" in tag.get("title", "")]
    assert len(shown) == len(expected) > 60
    for (style, x, y, difference), wanted in zip(shown, expected):
        assert (x, y) == pytest.approx(wanted, abs=1e-3) and difference == pytest.approx(y - x, abs=2e-3)
        if min(abs(abs(difference) - edge) for edge in EDGES) > 2e-3:
            assert style == shade(difference)
    assert {style for style, *_ in shown} >= {"", "better1", "worse1"}
    for kind in ("system", "instruction", "completion", "template"):
        assert f'<div class="tokens {kind}">' in page


def test_shades_follow_the_edges():
    assert [shade(x) for x in (0, 0.09, -0.09)] == [""] * 3
    assert [shade(x) for x in (0.1, 0.29, 0.3, 1, 2.9, 3, 99)] == [f"worse{i}" for i in (1, 1, 2, 3, 3, 4, 4)]
    assert [shade(x) for x in (-0.1, -0.5, -2, -30)] == [f"better{i}" for i in (1, 2, 3, 4)]


def test_what_cannot_be_seen_is_marked():
    assert [visible(x) for x in ("", " ", "   ", "a\n", "\t", " <b>", "&")] == [
        "\u25cc", "\u2423", "\u2423" * 3, "a\u21b5\n", "\u21e5\t", " <b>", "&"]


def test_characters_of_several_tokens_come_with_their_last_one(folder):
    tokenizer = Tokenizer(folder / "model")
    ids = tokenizer.at_start.encode("a \U0001f409 \u00e9b", add_special_tokens=False).ids
    texts = examples.token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids) and "" in texts and "\ufffd" not in "".join(texts)


def test_nll_with_intervals_is_that_of_eval_spans(runs, folder):
    more = dict(data=[folder / "test.jsonl"], dtype="fp32", device="cpu", bootstrap=200, max_length=120,
                cache_dir=folder / "cache")
    spans.main(flags(model=[runs / "it" / "final", runs / "im" / "final"], json=runs / "spans.json", **more))
    expected = json.loads((runs / "spans.json").read_text())["results"]
    _, result = compared(runs, folder, data=folder / "test.jsonl", answers=0)
    _, read = compared(runs, folder, results=runs / "spans.json")
    titles = {"nll_token_mean": "held-out NLL, mean over tokens: test.jsonl",
              "nll_example_mean": "held-out NLL, mean over examples: test.jsonl"}
    assert {row["span"] for row in expected} >= {"completion", "instruction", "system", "template"}
    for rows in (result["rows"], read["rows"]):
        for line in expected:
            for mean, title in titles.items():
                row, letter = rows[title, line["span"]], "A" if line["model"].endswith("it/final") else "B"
                assert row["runs"][letter] == {"value": line[mean], "interval": line[f"{mean}_interval"]}
                if letter == "B":
                    assert row["minus_first"]["B"] == {"value": line[f"{mean}_minus_first"],
                                                       "interval": line[f"{mean}_minus_first_interval"]}
    both, _ = compared(runs, folder, data=folder / "test.jsonl", answers=0, results=runs / "spans.json")
    assert f"{titles['nll_token_mean']} (spans)" in both and f"{titles['nll_token_mean']} (--data)" in both


def test_differences_to_another_checkpoint_than_the_first_run_are_not_taken(runs, folder):
    more = dict(data=[folder / "test.jsonl"], template="llama3", dtype="fp32", device="cpu", bootstrap=50,
                max_length=120, cache_dir=folder / "cache")
    spans.main(flags(model=[folder / "model", runs / "it" / "final", runs / "im" / "final"],
                     json=runs / "spans.json", **more))
    _, result = compared(runs, folder, results=runs / "spans.json")
    row = result["rows"]["held-out NLL, mean over tokens: test.jsonl", "completion"]
    assert row["minus_first"] == {"B": {"value": values(row)["B"] - values(row)["A"]}}
    assert set(row["runs"]) == {"A", "B"}


def test_runs_that_tokenize_differently_are_left_out_with_a_note(runs, folder):
    make_model(runs / "model", tokenizer="mistral")
    run_here(arguments(runs, "other", train_data=folder / "train.jsonl", template="tulu", max_steps=1))
    page, result = compared(runs, folder, [str(runs / "other")], data=folder / "test.jsonl", answers=1)
    assert any(note.startswith("B is left out of the NLL on --data") for note in result["notes"])
    row = result["rows"]["held-out NLL, mean over tokens: test.jsonl", "completion"]
    assert set(row["runs"]) == {"A"} and not row["minus_first"]
    assert page.count("tokenized differently: there are no common tokens") == 2


def test_ranks_share_the_work_and_the_page_is_the_same(runs, folder):
    page, one = compared(runs, folder, data=folder / "test.jsonl")
    run_module("eval.compare", command(runs, folder, data=folder / "test.jsonl"), ranks=2)
    two = json.loads((runs / "out.json").read_text())
    tokens = [re.findall(r'<span[^>]* title="A ([\d.]+), B ([\d.]+)', text)
              for text in (page, (runs / "page.html").read_text())]
    assert len(tokens[0]) == len(tokens[1]) > 100
    for x, y in zip(*tokens):
        assert [float(value) for value in x] == pytest.approx([float(value) for value in y], abs=2e-3)
    for table, other in zip(one["tables"], two["tables"]):
        assert table["title"] == other["title"]
        for row, theirs in zip(table["rows"], other["rows"]):
            for letter, cell in row["runs"].items():
                assert theirs["runs"][letter]["value"] == (cell["value"] if isinstance(cell["value"], str)
                                                           else pytest.approx(cell["value"], rel=1e-4))


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
    write(runs / "it" / "eval" / "he.json", {"model": "it/final", "problems": 3, "temperature": 0.2,
                                             "pass@1": 0.25, "pass@1_standard_error": 0.1})
    write(runs / "a.json", {"model": "im/final", "problems": 3, "temperature": 0.2, "pass@1": 0.5,
                            "pass@1_standard_error": 0.2})
    write(runs / "h.json", {"config": {"model": "spantune", "model_args": {"pretrained": "im"}}, "results": {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.05},
        "gsm": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"}}, "paper": {
            "tasks": {"arc": {"value": 0.5}}, "mean_as_in_paper": 0.375, "mean_accuracies": None,
            "categories": {"maths": {"mean_as_in_paper": 0.25, "tasks": 1}}}})
    for name, mean in (("w", 7.5), ("v", 9.5)):     # not alike: tables are the benchmarks'
        write(runs / f"{name}.json", {
            "model": "it" if name == "w" else "im", "name": name, "benchmark": "alpaca",
            "output": f"{name}.json",
            "mean_tokens": mean,
            **({"win_rate": 12.5, "win_rate_standard_error": 1.5} if name == "w" else {})})
    write(runs / "s.settings.json", {"model": "it", "seed": 3})
    files = [runs / f"{name}.json" for name in ("a", "h", "w", "v", "s.settings")]
    page, result = compared(runs / "all", folder, results=files)
    rows = result["rows"]
    assert result["notes"] == []
    assert values(rows["memorization of training targets", "bleu"]) == {"A": 14.5, "B": 11.5}
    assert rows["memorization of training targets", "bleu"]["runs"]["B"]["interval"] == [9.5, 20.0]
    assert rows["memorization of training targets", "bleu"]["minus_first"]["B"] == {"value": -3.0}
    assert rows["HumanEval", "pass@1"]["runs"] == {"A": {"value": 0.25, "error": 0.1},
                                                   "B": {"value": 0.5, "error": 0.2}}
    assert rows["tasks of lm-evaluation-harness", "arc acc"]["runs"] == {"B": {"value": 0.5, "error": 0.05}}
    assert rows["tasks of lm-evaluation-harness", "gsm exact_match (strict-match)"]["runs"] == {
        "B": {"value": 0.25}}
    assert {label: values(row) for (title, label), row in rows.items() if ": mean_" in label} == {
        "maths: mean_as_in_paper": {"B": 0.25}, "all categories: mean_as_in_paper": {"B": 0.375}}
    assert rows["answers to AlpacaEval", "win_rate"]["runs"] == {"A": {"value": 12.5, "error": 1.5}}
    assert values(rows["answers to AlpacaEval", "mean_tokens"]) == {"A": 7.5, "B": 9.5}
    assert not any(label in ("output", "seed") for _, label in rows)
    captions = {table["title"]: table["caption"] for table in result["tables"]}
    assert captions["HumanEval"] == "problems 3; temperature 0.2"
    assert captions["memorization of training targets"] == (
        "records 9; signature x|y; --data train.jsonl; --limit 0")
    assert not any("99.5" in str(values(row)) for row in rows.values()) and "99.5" not in page


def test_settings_that_differ_are_shown_as_rows(runs, folder):
    for name, samples in (("it", 1), ("im", 20)):
        write(runs / name / "eval" / "he.json", {"model": str(runs / name), "samples": samples, "pass@1": 0.5,
                                                 "pass@1_standard_error": 0.1})
    _, result = compared(runs, folder)
    assert values(result["rows"]["HumanEval", "samples"]) == {"A": 1, "B": 20}


def test_two_results_of_one_command_are_told_apart_by_their_files(runs, folder):
    for name, files in (("it", ("cold", "hot")), ("im", ("hot",))):
        for i, file in enumerate(files):
            write(runs / name / "eval" / f"{file}.json", {"model": str(runs / name), "pass@1": 0.1 * (i + 1),
                                                          "pass@1_standard_error": 0.1})
    _, result = compared(runs, folder)
    assert values(result["rows"]["HumanEval (cold)", "pass@1"]) == {"A": 0.1}
    assert values(result["rows"]["HumanEval (hot)", "pass@1"]) == {"A": 0.2, "B": 0.1}


def test_unknown_results_are_tables_of_their_numbers(runs, folder):
    for name in ("it", "im"):
        write(runs / name / "eval" / "mine.json", {
            "model": str(runs / name), "good": 0.5, "parts": {"x": 2}, "list": [1, {}], "none": None,
            "yes": True, "nan": float("nan"), "huge": float("inf")})
    page, result = compared(runs, folder)
    assert {label: values(row)["B"] for (title, label), row in result["rows"].items()
            if title == "mine" and label != "nan"} == {"good": 0.5, "parts x": 2, "huge": float("inf")}
    assert "mine" in Page(page).text


def test_files_that_fit_no_run_are_named(runs, folder):
    other = write(runs / "other.json", {"model": "elsewhere", "x": 1.5})
    rows = write(runs / "rows.json", {"results": [{"span": "completion", "model": str(runs / "it")}]})
    plain = write(runs / "plain.json", [1])
    (runs / "broken.json").write_text('{"model": ')
    write(runs / "it" / "eval" / "answers.jsonl.settings.json", {"model": str(runs / "it"), "seed": 3})
    page, result = compared(runs, folder, results=[other, rows, plain, runs / "broken.json"])
    assert [note.split(":")[0] for note in result["notes"]] == [str(other), str(rows), str(plain),
                                                               str(runs / "broken.json")]
    assert all(note in Page(page).text for note in result["notes"])
    assert {title for title, _ in result["rows"]} == {"configuration", "training",
                                                      "held out, when training ended"}


# ---------------------------------------------------------------- the page and the terminal


def test_page_is_escaped_whole_and_alone(runs, folder):
    write(runs / "im" / "eval" / "<b>x.json", {"model": str(runs / "im"), "<img src=x>": 1.5})
    odd = runs / "<i>&run"
    shutil.copytree(runs / "im", odd)
    text, _ = compared(runs, folder, [str(odd)], data=folder / "test.jsonl")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "i", "b", "object", "base"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "onload", "onclick", "action"), (tag, name)
            assert name not in ("href", "xlink:href") or value.startswith("#"), (tag, value)
            if not name.startswith("xmlns"):
                assert "://" not in (value or "") and not re.search(r"url\((?!#)", value or "")
    assert "://" not in page.styles and "url(" not in page.styles and "@import" not in page.styles
    assert NASTY in page.text and "hello <i>world" in page.text and "<i>&run" in page.text
    assert "<img src=x>" in page.text and "<b>x" in page.text
    pictures = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(pictures) == 9
    for svg in pictures:
        ElementTree.fromstring(svg)


def test_names_with_markup_and_control_characters_are_only_text(runs, folder, capsys):
    odd = runs / 'a$\\frac{"<i>\n\x1b[31m$'
    shutil.copytree(runs / "it", odd)
    evaluations = (odd / "eval.jsonl").read_text().replace('"test"', json.dumps('$x_"<i>\n\x1b'))
    (odd / "eval.jsonl").write_text(evaluations)
    write(runs / "im" / "eval" / "x.json", {"model": str(odd), "half a pair \ud800": "\ud800 \x1b[2J"})
    page, result = compared(runs, folder, [str(odd)])
    shown = Page(page)
    for text in (odd.name, '$x_"<i>\n\x1b: completion', "half a pair ?"):
        assert text in shown.text
    assert '$x_"<i>\n\x1b: completion' in {label for _, label in result["rows"]}
    assert not {tag for tag, _ in shown.tags} & {"i"} and len(figures(page)) > 8
    printed = capsys.readouterr().out
    assert "half a pair ?" in printed and "\x1b" not in printed
    assert printed.splitlines()[0].endswith('a$\\frac{"<i>??[31m$')


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
    marked = re.findall(r'<td data-name="B−A" class="clear">\s+(\S+) <small>(.*?)</small>', page)
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
    page, result = compared(runs, folder, [str(bare)], data=folder / "test.jsonl", answers=2)
    assert [note.removeprefix(f"{runs}/") for note in result["notes"]] == [
        "A has no metrics.jsonl, or an empty one: no training curves",
        "A was not evaluated while it trained (no eval.jsonl)",
        "A has no final/: it was interrupted or is still training",
        "it/metrics.jsonl: 1 damaged line(s) were left out",
        "B was not evaluated while it trained (no eval.jsonl)",
        "B has no final/: it was interrupted or is still training"]
    assert all(note in Page(page).text for note in result["notes"])
    assert values(result["rows"]["training", "steps"]) == {"B": "5 of 8", "C": 8}
    assert "Answers" in page and "Loss by token" not in page     # there is nobody to compare with
    assert len(drawn(figures(page)["completion"])["B"]) == 5


def test_runs_with_nothing_but_a_configuration_are_compared(runs, folder):
    for name in ("it", "im"):
        for path in ("metrics.jsonl", "eval.jsonl"):
            (runs / name / path).write_text("")
        shutil.rmtree(runs / name / "final")
    page, result = compared(runs, folder, data=folder / "test.jsonl")
    assert len(result["notes"]) == 6 and "NLL while training" not in page
    assert values(result["rows"]["configuration", "loss"]) == {"A": "it", "B": "im"}


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
    for (title, label), row in result["rows"].items():
        if title != "configuration":
            start = lines.index(title)
            at = next(i for i in range(start, len(lines)) if lines[i].startswith(f" {label}"))
            shown = lines[at] + lines[at + 1]
            for cell in row["runs"].values():
                assert number(cell["value"], decimals=3 if cell.get("interval") else 4) in shown
                assert all(number(bound, 3) in shown for bound in cell.get("interval") or [])
            for cell in row["minus_first"].values():
                assert number(abs(cell["value"]), decimals=3 if cell.get("interval") else 4) in shown


def test_numbers_have_four_digits():
    numbers = (0.30512, 2.0, 15.567, 100.04, 1234.5, 12345, 0.0, -9.801, float("nan"), "x")
    assert [number(x) for x in numbers] == ["0.3051", "2", "15.57", "100.0", "1,234", "12,345", "0", "-9.801",
                                          "nan", "x"]
    assert cell_texts({"value": 0.5, "interval": [0.25, 1.0]}, "+") == ("+0.500", "[0.250, 1]")
    assert cell_texts({"value": -0.5, "error": 0.125}) == ("-0.5000", "\u00b1 0.125")
    assert cell_texts(None) == ("\u2013", "") and cell_texts(None, "+") == ("", "")


@pytest.mark.parametrize("argv, more, says", [
    (["{runs}/it"], {}, "given twice"), (["{runs}/nowhere"], {}, "nowhere: no such folder"),
    (["{runs}/it/final"], {}, "final: not an output folder of train.py, .* no run_config.json; .*it has one"),
    (["{folder}/model"], {}, "model: not an output folder"),
    ([], dict(output="nowhere/x.html"), "--output nowhere/x.html"), ([], dict(answers=-1), "--answers -1"),
    ([], dict(results="nowhere.json"), "--results nowhere.json: no such file"),
    ([], dict(data="nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ([], dict(prompts="nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ([], dict(max_new_tokens=0), "--max-new-tokens 0"), ([], dict(result="x"), "unrecognized"),
])
def test_wrong_flags_are_named(runs, folder, argv, more, says):
    with pytest.raises(ValueError, match=says):
        compare.main([word.format(runs=runs, folder=folder) for word in argv] + command(runs, folder, **more))
    assert not (runs / "page.html").exists()


def test_one_run_is_not_enough(runs):
    with pytest.raises(ValueError, match="1 run.*: give two"):
        compare.main([str(runs / "it"), "--output", str(runs / "x.html")])


def test_an_error_is_one_line(runs, folder):
    (runs / "im" / "run_config.json").write_text("[")
    done = run_module("eval.compare", command(runs, folder), check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
