"""The model card in final/: what it says of a run, and what it must not say."""
import getpass
import json
import re
import shlex
import socket
from pathlib import Path

import pytest
import torch
import yaml

import train
from runtime.card import bare_name, bare_names, bare_share
from tiny import ROOT, arguments, make_records, run_here, setup, stop_after

KINDS = ("template", "system", "instruction", "completion", "context")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = setup(tmp_path_factory.mktemp("card"))
    (folder / "more").mkdir()
    make_records(folder / "more" / "train.jsonl", 7, seed=5)
    make_records(folder / "test.jsonl", 5, seed=6)
    (folder / "own.jinja").write_text((ROOT / "templates" / "llama3.jinja").read_text())
    return folder


def settings(folder: Path, **more: object) -> dict:
    return dict(train_data=[folder / "train.jsonl", folder / "more" / "train.jsonl"], loss="im", beta2=0.95,
                eval_data=folder / "test.jsonl", normalize="span", instruction_weight=0.5, eval_generate=3,
                template=folder / "own.jinja", **more)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    run_here(arguments(folder, "whole", **settings(folder)))
    return folder / "whole"


def rows(card: str, first: str) -> list[list[str]]:
    """The rows of the table whose head begins with this."""
    lines = card.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |")) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def test_the_card_says_what_the_model_was_made_from(whole, folder):
    card = (whole / "final" / "README.md").read_text()
    _, head, _ = re.split(r"^---\n", card, maxsplit=2, flags=re.M)
    assert yaml.safe_load(head) == {"base_model": "model", "library_name": "transformers",
                                    "pipeline_tag": "text-generation",
                                    "tags": ["instruction-tuning", "spantune"]}
    # Counted in the files and in the first step's log, not by the card's own code.
    config = train.parse_args(arguments(folder, "whole", **settings(folder)))
    dataset, usable, _ = train.load_data(config, train.open_source(config))
    files = [str(dataset.where(int(i))).rpartition(":")[0] for i in usable]
    assert rows(card, "file") == [
        ["train.jsonl", str(files.count(str(folder / "train.jsonl")))],
        ["train.jsonl (2)", str(files.count(str(folder / "more" / "train.jsonl")))]]
    tokens = dict.fromkeys(KINDS, 0)
    for example in usable:
        a, b = dataset.offsets[example:example + 2]
        for kind in dataset.kinds[a + 1:b]:
            tokens[KINDS[kind]] += 1
    weights = {"template": "0", "system": "1", "instruction": "0.5", "completion": "1", "context": "0"}
    assert rows(card, "span") == [[kind, f"{count:,}", weights[kind]] for kind, count in tokens.items()
                                  if count]
    assert "`--loss im --normalize span`" in card and f"PyTorch {torch.__version__}" in card
    steps = len((whole / "metrics.jsonl").read_text().splitlines())
    assert f"\n{steps} steps of up to 6 examples." in card


def test_the_card_has_the_evaluations_at_both_ends(whole):
    card = (whole / "final" / "README.md").read_text()
    before, after = (json.loads(line)["data"]["test"] for line in open(whole / "eval.jsonl"))
    assert rows(card, "data") == [
        ["test", kind, f"{now['tokens']:,}", f"{before[kind]['nll_token_mean']:.4f}",
         f"{now['nll_token_mean']:.4f}"] for kind, now in after.items()]
    assert "Exact match on 3 held-out answers: " in card


def test_the_cards_command_repeats_the_run(whole, folder, monkeypatch):
    """Typed in a folder that has the files under their names, it gives the same identity."""
    card = (whole / "final" / "README.md").read_text()
    words = shlex.split(re.search(r"```\n(python train.py .*)\n```", card).group(1))
    assert words[:2] == ["python", "train.py"]
    monkeypatch.chdir(folder)
    # The second of two equal names has a number, and stands for a path that the card does not know.
    words = ["more/train.jsonl" if word == "train.jsonl" and words[i - 1] == "train.jsonl" else word
             for i, word in enumerate(words)]
    config = train.parse_args(words[2:])
    ours = train.parse_args(arguments(folder, "whole", **settings(folder)))
    assert train.run_identity(config, train.open_source(config)) == train.run_identity(
        ours, train.open_source(ours))


def test_the_card_has_no_path_no_host_and_no_user(whole, folder):
    card = (whole / "final" / "README.md").read_text()
    for private in (str(folder), folder.name, "/tmp", str(Path.home()) + "/", socket.gethostname(),
                    getpass.getuser()):
        assert not re.search(rf"(?<!\w){re.escape(private)}(?!\w)", card), private


def test_a_resumed_run_writes_the_same_card(whole, folder, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run_here(arguments(folder, "stopped", **settings(folder))) != 0
    run_here(arguments(folder, "stopped", **settings(folder, micro_batch_tokens=1000, keep_checkpoints=1)))
    assert (folder / "stopped" / "final" / "README.md").read_bytes() == (
        whole / "final" / "README.md").read_bytes()


def test_without_held_out_records_the_card_has_no_evaluation(folder):
    run_here(arguments(folder, "alone", max_steps=1))
    card = (folder / "alone" / "final" / "README.md").read_text()
    assert "Evaluation" not in card and rows(card, "span")


def test_names_have_no_folders_and_no_markup(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "a|`<b>.jsonl").write_text("")
    assert bare_name(str(tmp_path / "final")) == tmp_path.name      # a run's
    assert bare_name("owner/name@main") == "owner/name@main"        # a hub id
    assert bare_name("/gone/since/x.jsonl") == "x.jsonl"
    assert bare_name(str(tmp_path / "a|`<b>.jsonl")) == "a???b?.jsonl"
    assert bare_name(str(tmp_path / "a\x1b[2J\n\u202eb")) == r"a\u001b[2J?\u202eb"
    assert bare_name("private/*.jsonl") == "*.jsonl"
    (tmp_path / "lr=1").mkdir()
    assert bare_name(str(tmp_path / "lr=1" / "x.jsonl")) == "x.jsonl"
    assert bare_share(str(tmp_path / "lr=1" / "x.jsonl") + "=0.5") == "x.jsonl=0.5"     # of --mix
    assert bare_names(["/x/a", "/y/a", "/b", "/z/a"]) == ["a", "a (2)", "b", "a (3)"]
