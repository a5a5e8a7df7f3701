"""What eval.look says of a run, against what the run then does."""
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import forks
import model
import tokenizers_for_tests
import train
from chat import CONTEXT, KINDS, has_empty_answer
from data import collate
from runtime.tokenizer import Tokenizer
from config import parse_args as parse_flags
from eval import look, spans, study
from eval.advice import advice, nearest, study_flags
from kernels.head import weighted_nll
from tiny import ROOT, arguments, make_model, metrics, run_here, run_module, setup


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return setup(tmp_path_factory.mktemp("look"))


def numbers_of(folder: Path, argv: list[str]) -> dict:
    """What --json writes."""
    look.main([*argv, "--json", str(folder / "look.json")])
    return json.loads((folder / "look.json").read_text())


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def prepared(argv: list[str]) -> tuple[train.Config, train.Source, train.Dataset, np.ndarray]:
    config = train.parse_args(argv)
    source = train.open_source(config)
    return config, source, *train.load_data(config, source)[:2]


# ---------------------------------------------------------------- numbers


def test_span_statistics_are_over_the_examples_that_have_the_span():
    counts = np.zeros((4, 5), np.int32)
    counts[:, 2], counts[:, 3] = [1, 2, 3, 10], [0, 4, 0, 8]
    assert look.span_statistics(counts) == {
        "instruction": {"examples": 4, "tokens": 16, "mean": 4.0, "median": 2.5, "p95": pytest.approx(8.95),
                        "max": 10},
        "completion": {"examples": 2, "tokens": 12, "mean": 6.0, "median": 6.0, "p95": pytest.approx(7.8),
                       "max": 8}}


def test_statistics_of_records_whose_tokens_are_known(folder, capsys):
    """One answer is trained, with its end-of-turn token; the other has weight 0."""
    (folder / "two.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue", '
        '"weight": 0}]}\n'
        '{"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]}\n')
    numbers = numbers_of(folder, arguments(folder, "two", train_data=folder / "two.jsonl", loss="it", show=2,
                                           eval_data=folder / "two.jsonl"))
    printed = capsys.readouterr().out
    names = ("records", "examples", "left_out", "truncated", "steps", "epochs")
    assert [numbers[name] for name in names] == [2, 1, 1, 0, 2, 2.0]
    encode = Tokenizer(folder / "model").reference.encode
    instruction, completion = (len(encode(text, add_special_tokens=False).ids) for text in ("red", "blue"))
    completion += 1
    assert [numbers["spans"][kind]["tokens"] for kind in ("instruction", "completion")] == [
        instruction, completion]
    assert numbers["instruction_completion_ratio"] == instruction / completion
    assert numbers["trained"]["it"] == numbers["trained"]["this run"] == completion / numbers["tokens"]
    assert numbers["trained"]["im"] == (instruction + completion) / numbers["tokens"]
    assert numbers["trained"]["lm"] == 1.0
    assert numbers["packing"]["trained"] == completion and numbers["longest"] == numbers["tokens"] + 1
    assert numbers["held_out"] == {"two": {"examples": 2, "tokens": 2 * numbers["tokens"]}}
    assert (f"nearest to 1 example and {instruction / completion:.3g} tokens of instruction for each"
            in printed.replace("\n  ", " "))
    assert printed.count("\n--- ") == printed.count("two.jsonl:2\n") == 1
    assert "data: 1 example, " in printed and "packed on 1 rank(s): 1 micro-batch an epoch" in printed
    assert f"predicts; with it the\n  longest has {numbers['longest']}, of --max-length 120\n" in printed
    assert "1 left out\n" in printed and "1 of these because they have no completion" in printed


def test_it_says_how_many_answers_are_empty(folder, capsys):
    asks = {"role": "user", "content": "red"}
    answers = [{"content": "blue"}, {"content": " "}, {"content": "", "weight": 0},
               {"content": "", "tool_calls": [{"name": "f", "arguments": {}}]}]
    assert [has_empty_answer([asks, {"role": "assistant"} | answer]) for answer in answers] == [0, 1, 0, 0]
    (folder / "empty.jsonl").write_text('{"prompt": "red", "completion": ""}\n'
                                        '{"prompt": "red", "completion": "blue"}\n')
    numbers = numbers_of(folder, arguments(folder, "empty", train_data=folder / "empty.jsonl"))
    assert numbers["empty_answers"] == 1
    assert "warning: 1 record with an empty answer: only its end is trained\n" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_counts_what_the_run_will_do(folder, ranks, monkeypatch, capsys):
    """Against the micro-batches that the ranks collate, and the metrics of a run; no weights are loaded."""
    argv = arguments(folder, f"run-{ranks}", micro_batch_tokens=250, max_steps=8, warmup_ratio=0.3, loss="it")
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_model", None)
        patch.setattr(model, "load_model", None)
        numbers = numbers_of(folder, [*argv, "--ranks", str(ranks)])
    assert not (folder / f"run-{ranks}").exists()

    config, _, dataset, usable = prepared(argv)
    batches = []
    for rank in range(ranks):
        steps = train.make_steps(config, dataset, usable, rank, ranks)
        batches += [collate(dataset, *each) for step in range(steps.per_epoch) for each in steps[step][0]]
    tokens, trained = [len(b.ids) for b in batches], [len(b.trained) for b in batches]
    assert len(batches) > 3 * ranks and len(set(tokens)) > 1
    assert numbers["packing"] == {
        "micro_batches": len(batches), "tokens": sum(tokens), "largest": max(tokens),
        "trained": max(trained), "other": max(a - b for a, b in zip(tokens, trained))}
    assert numbers["packing_efficiency"] == pytest.approx(sum(tokens) / 250 / len(tokens))
    longest = max(int(batch.cu_seqlens.diff().max()) for batch in batches if len(batch.ids))
    documents = sum(len(batch.examples) for batch in batches)
    assert numbers["padded_efficiency"] == pytest.approx(sum(tokens) / (documents * longest))
    heads = ["DDP", "DDP +recompute", "--shard", "--shard +recompute"] if ranks == 2 else [
        "plain", "plain +recompute"]
    assert list(numbers["memory"]) == heads
    printed = capsys.readouterr().out
    assert f"packed on {ranks} rank(s): {len(batches)} micro-batches an epoch" in printed
    column = dataset.counts[usable, KINDS.index("completion")]
    row = re.search(r"^completion .*", printed, re.MULTILINE)[0].split()
    assert row[4:6] == [f"{column.mean():.1f}", f"{np.median(column):.0f}"] and float(row[4]) != float(row[5])

    if ranks == 1:
        assert run_here(argv) == 0
        lines = metrics(folder / "run-1")
        epoch = lines[:numbers["steps_per_epoch"]]
        assert len(lines) == numbers["steps"] == 8
        assert lines[-1]["epoch"] == pytest.approx(numbers["epochs"])
        assert sum(line["tokens"] for line in epoch) == numbers["tokens"]
        assert sum(line["trained_tokens"] for line in epoch) / numbers["tokens"] == pytest.approx(
            numbers["trained"]["this run"])
        assert [line["lr"] for line in lines].index(max(line["lr"] for line in lines)) + 1 == numbers[
            "warmup_steps"] == 3


def test_a_head_that_differs_from_a_tied_embedding_is_counted(folder):
    file = make_model(folder / "head" / "model") / "model.safetensors"
    stored = load_file(file)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(stored, file, {"format": "pt"})
    numbers = numbers_of(folder, arguments(folder, "head-out", model=file.parent))
    assert numbers["parameters"] == sum(x.numel() for x in stored.values())


def test_memory_is_said_with_kl_and_in_the_dtype_of_the_run(folder):
    argv = arguments(folder, "kl", kl_weight=0.5)
    plain, kl = (numbers_of(folder, given)["memory"]["plain"] for given in (argv[:-2], argv))
    assert kl["reference model"] == kl["parameters"] > 0
    fp32, bf16 = (numbers_of(folder, [*argv, "--dtype", dtype])["memory"]["plain"]["weights gathered or cast"]
                  for dtype in ("fp32", "bf16"))
    assert fp32 < bf16


# ---------------------------------------------------------------- flags and errors


def test_it_takes_the_flags_of_a_run_and_its_config_file(folder):
    saved, added = ({f.name for f in dataclasses.fields(each)} for each in (train.Config, look.LookConfig))
    assert saved < added and added - saved == {"ranks", "show", "json", "export"}
    argv = arguments(folder, "configured", max_steps=3, loss="it", instruction_weight=0.25, seed=5)
    run_here(argv)
    file = folder / "configured" / "run_config.json"
    # "program" is the peak of this process, whatever ran in it before.
    assert numbers_of(folder, ["--config", str(file), "--output-dir", str(folder / "else")]) == numbers_of(
        folder, [*argv, "--output-dir", str(folder / "else")]) | {"program": ANY}
    # What only a command line may ask for is not read from a file.
    file.write_text(json.dumps(json.loads(file.read_text()) | {
        "ranks": 7, "show": 7, "json": str(folder / "no.json"), "export": str(folder / "no.jsonl")}))
    config = train.parse_args(["--config", str(file)], look.LookConfig)
    assert (config.ranks, config.show, config.json, config.export, config.seed) == (0, 0, "", "", 5)


@pytest.mark.parametrize("more", [
    dict(max_length=1), dict(template="nope"), dict(date="yesterday"), dict(train_data="nowhere.jsonl"),
    dict(model="nowhere"), dict(completion_weight=0, loss="it"), dict(micro_batch_tokens=20),
    dict(overlong="error", max_length=30), dict(max_length=4), dict(eval_every=5), dict(lr="fast"),
    dict(eval_data="nowhere.jsonl"), dict(config="nowhere.json"), dict(model="MISFIT"),
    dict(train_data="BAD")], ids=str)
def test_what_a_run_refuses_is_refused_in_the_same_words(folder, more):
    if more == dict(model="MISFIT"):
        config = shutil.copytree(folder / "model", folder / "misfit") / "config.json"
        config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
        more = dict(model=config.parent)
    if more == dict(train_data="BAD"):
        (folder / "bad.jsonl").write_text('{"prompt": "Hi", "completion": 5}\n')
        more = dict(train_data=folder / "bad.jsonl")
    argv = arguments(folder, "refused", **more)
    with pytest.raises(ValueError) as by_run:
        train.main(argv)
    with pytest.raises(ValueError) as by_look:
        look.main(argv)
    assert str(by_look.value) == str(by_run.value) != ""
    assert not (folder / "refused").exists()


def test_it_refuses_what_only_it_is_asked_for(folder):
    records = folder / "records"
    records.mkdir()
    shutil.copy(folder / "train.jsonl", records / "a.jsonl")
    for more, says in ((dict(json="nowhere/x.json"), "--json nowhere/x.json"),
                       (dict(export="nowhere/x.jsonl"), "--export nowhere/x.jsonl"),
                       (dict(export=folder / "train.jsonl"), "--train-data names this file, too"),
                       *((dict(train_data=name, export=records / "a.jsonl"), "--train-data names this file")
                         for name in (records, f"{records}/*.jsonl")),
                       (dict(eval_data=records, json=records / "a.jsonl"), "--eval-data names this file"),
                       (dict(json=folder / "model" / "config.json"), "--model names this file, too"),
                       (dict(ranks=-1), "--ranks -1"), (dict(bogus=1), "eval.look --help")):
        with pytest.raises(ValueError, match=says):
            look.main(arguments(folder, "own", **more))


def test_it_says_what_a_run_would_find_in_its_folder_and_writes_nothing_there(folder, capsys):
    def says(out: str, state: str, sentence: str, **more: object) -> None:
        before = files(folder / out)
        assert numbers_of(folder, arguments(folder, out, **more))["output_dir"] == state
        assert sentence in " ".join(capsys.readouterr().out.split())
        assert files(folder / out) == before

    says("new", "start", "new: the run would start from scratch")
    assert not (folder / "new").exists()
    run_here(arguments(folder, "done", save_every=3))
    says("done", "refused", "a run would refuse: --output-dir")
    says("done", "delete", "done: the run that is there would be deleted, and the new one start from scratch",
         overwrite=True)
    run_here(arguments(folder, "short"))
    says("short", "refused", "whose last checkpoint was not kept", epochs=3, schedule="linear")
    shutil.rmtree(folder / "done" / "final")
    identity = json.loads((folder / "done" / "identity.json").read_text())
    del identity["finished_after"]
    (folder / "done" / "identity.json").write_text(json.dumps(identity))
    shutil.rmtree(sorted((folder / "done" / "checkpoints").iterdir())[-1])
    [*_, newest] = sorted((folder / "done" / "checkpoints").iterdir())
    says("done", "resume", f"done: the run would resume after step 6 from {newest}")
    says("from", "start", f"from: the run would start after step 6 from {newest}", resume=newest)
    says("done", "refused", "holds a run and --resume is never", resume="never")
    says("done", "refused", "--lr was 0.01, is 0.5", lr=0.5)
    says("done", "refused", "step-00000006: cannot be resumed with --epochs 5 ", epochs=5)
    # A checkpoint of another run, copied into the folder of one with --lr 0.5.
    shutil.copytree(newest, folder / "half" / "checkpoints" / newest.name)
    (folder / "half" / "identity.json").write_text(json.dumps(identity | {"lr": 0.5}))
    says("half", "refused", "step-00000006: was started differently (--lr was 0.01, is 0.5)", lr=0.5)
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.txt").write_text("years of work")
    says("thesis", "refused", "is not empty and is not a run folder")


# ---------------------------------------------------------------- what is printed


def test_the_quick_start_is_looked_at_without_flags_in_eighty_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = (ROOT / "runs").exists()
    done = run_module("eval.look", [])
    assert (ROOT / "runs").exists() == before
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines if not line.startswith("model: ")) <= 80
    assert "300 examples" in done.stdout and "152 steps, 8 epochs: 16 of warm-up" in done.stdout
    assert "100 examples" in next(line for line in lines if line.startswith("held out: test"))
    assert "\x1b" not in done.stdout and not done.stderr


@pytest.mark.parametrize("ends", [True, False])
def test_a_command_that_could_not_print_ends_with_an_error_unless_its_reader_had_enough(folder, ends):
    reader, writer = os.pipe()
    os.close(reader)
    stdout = open("/dev/full", "w") if ends else open(writer, "w")
    done = subprocess.run([sys.executable, "-m", "eval.look", *arguments(folder, "x")], cwd=ROOT, text=True,
                          stdout=stdout, stderr=subprocess.PIPE)
    assert done.returncode == ends and done.stderr.count("warning: standard output: No space left") == ends


def test_errors_are_one_line(folder):
    done = forks.run(["-m", "eval.look", *arguments(folder, "x", template="nope")])
    assert done.returncode == 1 and done.stderr.startswith("error: --template nope") and "\n" not in (
        done.stderr.strip())


def test_ranks_of_a_launch_speak_once(folder):
    done = run_module("eval.look", arguments(folder, "launched", json=folder / "ranks.json"), ranks=2)
    assert done.stdout.count("packed on 2 rank(s)") == 1
    assert json.loads((folder / "ranks.json").read_text())["ranks"] == 2


def test_a_mix_of_so_many_examples_is_described_as_the_run_describes_it(folder, capsys):
    (folder / "half.jsonl").write_text("".join(open(folder / "train.jsonl").readlines()[:5]))
    argv = arguments(folder, "mixed", train_data=None, max_examples=8, epochs=1,
                     mix=[f"{folder}/train.jsonl=3", f"{folder}/half.jsonl=1"])

    def described() -> list[str]:
        lines = capsys.readouterr().out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("data: "))
        return lines[start:start + 6]

    look.main(argv)
    said = described()
    assert any("an epoch has 6 examples of" in line for line in said)
    run_here(argv)
    assert described()[:5] == said[:5] and said[4].startswith("  an epoch has 2 examples of")


def test_on_a_terminal_an_example_breaks_between_words_and_its_colours_stay_whole():
    text = ("\x1b[36m" + "word " * 40 + "x" * 100 + "\x1b[0m\x1b[32man answer\x1b[0m\n\n  two  spaces "
            + "y " * 90)
    shown = look.wrapped(text, 60)
    assert shown.replace("\n", "") == text.replace("\n", ""), "nothing is lost"
    lines = [re.sub(r"\x1b\[\d+m", "", line) for line in shown.split("\n")]
    assert not any("\x1b" in line for line in lines)
    assert max(len(line.rstrip()) for line in lines if "xx" not in line) in range(50, 61)
    assert "" in lines and len(lines) > 7 and look.wrapped("a b", 3) == "a b"


def test_examples_are_shown_in_colour_on_a_terminal_and_in_marks_elsewhere(folder, capsys, monkeypatch):
    first = json.loads(open(folder / "train.jsonl").readline())["messages"]
    argv = arguments(folder, "shown", show=2)

    def shown() -> str:
        look.main(argv)
        return capsys.readouterr().out.partition("shown: the run would start")[2]

    monkeypatch.delenv("NO_COLOR", raising=False)
    marked = shown()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "10000")
    in_colour = shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == marked
    assert marked.count("\n--- ") == 2 and f"--- {folder / 'train.jsonl'}:1\n" in marked
    for kind, code, message in (("system", 35, first[0]), ("instruction", 36, first[1])):
        assert f"[{kind}|{message['content']}]" in marked
        assert f"\x1b[{code}m{message['content']}\x1b[0m" in in_colour
    assert "[completion|" in marked and "\x1b" not in marked and "[completion|" not in in_colour
    # Marks and colours taken away, both are the same text.
    examples = [re.sub(pattern, r"\1", text.split("\n--- ")[1].partition("\n")[2].strip(), flags=re.DOTALL)
                for pattern, text in ((r"\[\w+\|(.*?)\](?=\[\w+\||$)", marked),
                                      (r"\x1b\[\d+m(.*?)\x1b\[0m", in_colour))]
    assert examples[0] == examples[1] != ""


def test_an_example_is_shown_with_the_spaces_that_it_has(tmp_path):
    """A SentencePiece tokenizer drops the first space of what it decodes, so no span is decoded alone."""
    tokenizers_for_tests.write("llama2", tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = np.array([tokenizer.reference.token_to_id(token) for token in ("<s>", "r", "\u2581", "b")])
    dataset = SimpleNamespace(offsets=[0, 4], ids=ids, kinds=np.array([0, 2, 3, 3]))
    assert look.coloured(dataset, 0, tokenizer, False) == "[template|<s>][instruction|r][completion| b]"


def test_a_templates_warning_is_told(folder, capsys):
    for template, warns in ((ROOT / "tests" / "templates" / "distill.jinja", True), ("llama3", False)):
        look.main(arguments(folder, "warned", template=template))
        assert ("warning: template" in capsys.readouterr().out) == warns


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("loss", ["it", "im", "lm"])
def test_exported_labels_give_our_loss_in_transformers(folder, loss, tmp_path, capsys):
    """The mean over labelled tokens that transformers computes is the `token` denominator over the same
    examples."""
    argv = arguments(folder, "exported", loss=loss, max_length=90, batch_size=100)
    look.main([*argv, "--export", str(tmp_path / "x.jsonl")])
    rows = [json.loads(line) for line in open(tmp_path / "x.jsonl")]
    config, source, dataset, usable = prepared(argv)
    assert len(rows) == len(usable) < len(dataset)
    assert f"{len(rows)} examples written to {tmp_path}/x.jsonl" in capsys.readouterr().out
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    total = labelled = 0
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["span_kinds"])
        assert set(row["span_kinds"]) <= set(KINDS) and row["labels"][0] == -100
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            out = reference(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        count = int((labels[:, 1:] != -100).sum())
        total, labelled = total + out.item() * count, labelled + count
    assert any(KINDS[CONTEXT] in row["span_kinds"] for row in rows)
    [micro_batch], _ = train.make_steps(config, dataset, usable, 0, 1)[0]
    batch = collate(dataset, *micro_batch)
    ours = model.load_model(folder / "model")
    hidden = ours(batch.ids, batch.positions, batch.cu_seqlens)
    value, _ = weighted_nll(hidden[batch.trained], ours.head_weight, batch.targets[batch.trained],
                            batch.coefficients[batch.trained])
    assert 0 < labelled < len(batch.ids) and labelled == len(batch.trained)
    assert value.item() == pytest.approx(total / labelled, rel=1e-5)


def test_an_export_that_is_cut_short_leaves_the_old_file(folder, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text("old")
    argv = arguments(folder, "cut", export=tmp_path / "x.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            look.main(argv)
    assert (tmp_path / "x.jsonl").read_text() == "old"
    look.main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    assert (tmp_path / "x.jsonl").read_text() != "old"


# ---------------------------------------------------------------- advice


def setting(name, ratio, examples, **more):
    return {"set": name, "source": "x", "ratio": ratio, "examples": examples, "result": "1 -> 2"} | more


def test_advice_shows_the_nearest_settings_of_both_sources_that_have_a_result():
    settings = [setting("far", 0.1, 500), setting("near", 9, 450), setting("nearer", 11, 500),
                setting("own, far", 1, 500, study="a"), setting("own", 12, 480, study="b"),
                setting("own, few", 10, 50, study="c"), setting("not run", 10, 500, study="d", result="")]
    assert [each["set"] for each in nearest(settings, 10, 500)] == ["own", "own, few", "nearer", "near"]


def test_advice_fits_a_terminal_and_ends_with_a_study_of_the_same_data_with_the_same_flags():
    run = ["--model", "my model", "--train-data", "a.jsonl", "b.jsonl", "--loss", "im", "--lr", "5e-4",
           "--epochs", "4", "--columns", "output=reply", "--output-dir", "x", "--no-compile"]
    lines = advice(46.0, 480, parse_flags(run)).splitlines()
    assert max(map(len, lines)) < 80 and "480 examples" in lines[0]
    command = shlex.split("".join(line.rstrip("\\") for line in lines).partition("python -m eval.study")[2])
    config = study.parse_args(command)
    assert config.lrs == [0.00017, 0.0005, 0.0015] and config.losses == ["it", "im", "im:span"]
    assert vars(config).items() >= dict(
        model="my model", train_data=["a.jsonl", "b.jsonl"], eval_data=["TEST.jsonl"], epochs=4,
        columns=["output=reply"], output_dir="runs/study", compile=None).items()


@pytest.mark.parametrize("own, contenders", [
    ([], {}), (["--loss", "it"], {}), (["--normalize", "span"], {}),
    (["--loss", "it", "--instruction-weight", "0.3"], {"own": {"loss": "it", "instruction_weight": 0.3}})])
def test_the_runs_own_loss_is_among_those_of_the_advised_study(own, contenders):
    run = parse_flags(["--model", "x", "--train-data", "a.jsonl", *own])
    flags = [word for words in study_flags(run) for word in words]
    found = study.parse_contenders(study.parse_args(flags))
    assert {name: found[name] for name in found if name not in ("it", "im", "im:span")} == contenders


@pytest.mark.parametrize("main, data", [(spans.main, "--data"), (look.main, "--train-data")])
def test_bf16_that_is_emulated_is_warned_of(main, data, tmp_path, monkeypatch, capsys):
    """look does what train.py does before it starts."""
    argv = ["--model", f"{ROOT}/quickstart/model", data, f"{ROOT}/quickstart/test.jsonl", "--device", "cpu",
            "--cache-dir", str(tmp_path)]
    for has, dtype, warns in ((False, "bf16", True), (True, "bf16", False), (False, "auto", False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
        assert not main([*argv, "--dtype", dtype])
        printed = capsys.readouterr()
        assert ("no instructions for it here" in printed.err) == warns
        # The study that look advises has the flags that were given, not what they stand for here.
        advised = printed.out.partition("eval.study")[2]
        assert ("--dtype" in advised) == (main is look.main and dtype == "bf16")
