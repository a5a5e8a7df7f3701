"""The folder of a run: whose it is, what resumes in it and from where, and that nothing trained is lost."""
import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

import forks
import train
from eval import look
from runtime import checkpoint
from runtime import folder as run_folder
from runtime.files import read_json
from runtime.flags import flag_name
from tiny import (arguments, flags, make_model, make_records, metrics, run_here, same_weights, setup,
                  stop_after)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return setup(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """A run that nothing disturbed, all its checkpoints kept."""
    assert run_here(arguments(folder, "whole", save_every=1, keep_checkpoints=99)) == 0
    return folder / "whole"


def stopped(folder: Path, out: str, step: int, monkeypatch, **more: object) -> Path:
    """A run that is stopped after so many of its steps."""
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert run_here(arguments(folder, out, **more)) == 128 + signal.SIGTERM
    return folder / out


def state_of(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def refused(folder: Path, says: str, out: str, **more: object) -> None:
    """The run is refused and its folder is as it was."""
    before = state_of(folder / out)
    with pytest.raises(ValueError, match=says):
        run_here(arguments(folder, out, **more))
    assert state_of(folder / out) == before


def count_steps(monkeypatch) -> list:
    """Grows by an entry with each step that is trained."""
    steps, original = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: steps.append(1) or original(self, *a))
    return steps


# ---------------------------------------------------------------- --resume FOLDER


def test_a_named_checkpoint_does_not_open_the_folder_of_another_run(folder, whole, monkeypatch):
    saved = whole / "checkpoints" / "step-00000003"
    stopped(folder, "strange", 6, monkeypatch, lr=2e-2, save_every=3)
    refused(folder, "strange: was started differently .--lr was 0.02, is 0.01", "strange", resume=saved)
    shutil.copytree(whole, folder / "strange-done")
    refused(folder, "holds a finished run", "strange-done", resume=saved)
    refused(folder, "finished run|--lr was", "strange-done", resume=saved, lr=2e-2)
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.txt").write_text("years of work")
    refused(folder, "is not a run folder", "thesis", resume=saved)
    refused(folder, "--resume .*--lr was 0.01, is 0.02", "nowhere", resume=saved, lr=2e-2)
    refused(folder, "--overwrite would delete --resume", "strange",
            resume=folder / "strange" / "checkpoints" / "step-00000003", lr=2e-2, overwrite=True)


def test_every_checkpoint_is_compared_before_it_is_used(folder, whole, monkeypatch):
    """A checkpoint of another run lies among those of this one, and is newer."""
    stopped(folder, "other", 6, monkeypatch, lr=2e-2, save_every=6)
    stopped(folder, "mixed", 3, monkeypatch)
    shutil.copytree(folder / "other" / "checkpoints" / "step-00000006",
                    folder / "mixed" / "checkpoints" / "step-00000006")
    (folder / "mixed" / "checkpoints" / "step-00000009.part").mkdir()
    refused(folder, "step-00000006: was started differently .*--lr was 0.02, is 0.01.*delete it", "mixed")
    assert (folder / "mixed" / "checkpoints" / "step-00000009.part").exists()
    shutil.rmtree(folder / "mixed" / "checkpoints" / "step-00000006")
    assert run_here(arguments(folder, "mixed")) == 0
    assert same_weights(folder / "mixed", whole)


def test_the_same_command_with_a_named_checkpoint_advances(folder, whole, monkeypatch, capsys):
    saved = whole / "checkpoints" / "step-00000003"
    for steps, begins, ends in ((2, "step 3 from .*whole", 5), (2, "step 5 from .*queued", 7)):
        stopped(folder, "queued", steps, monkeypatch, resume=saved)
        printed = capsys.readouterr().out
        assert f"resuming after {begins.split(' from')[0]} from" in printed
        assert [r["step"] for r in metrics(folder / "queued")] == list(range(4, ends + 1))
    # to go back is no accident: the run's own later checkpoint is named
    refused(folder, "own checkpoints, up to step-00000007; leave --resume out", "queued",
            resume=whole / "checkpoints" / "step-00000002")
    assert run_here(arguments(folder, "queued", resume=saved)) == 0
    assert same_weights(folder / "queued", whole)
    refused(folder, "holds a finished run", "queued", resume=saved)


def test_a_run_with_its_own_checkpoints_no_longer_needs_the_one_it_began_from(folder, whole, monkeypatch):
    saved = shutil.copytree(whole / "checkpoints" / "step-00000003", folder / "lent")
    stopped(folder, "orphan", 2, monkeypatch, resume=saved)
    shutil.rmtree(saved)
    assert run_here(arguments(folder, "orphan", resume=saved)) == 0
    assert same_weights(folder / "orphan", whole)


def test_the_folder_of_a_run_is_no_checkpoint(folder, whole):
    refused(folder, "whole: is the folder of a run; name one of its checkpoints, such as .*step-00000008, or "
            "resume it with --output-dir", "none", resume=whole)


# ---------------------------------------------------------------- launches


def test_another_launch_with_the_same_names_is_no_restart(folder, monkeypatch, capsys):
    """torchrun as process 1 of a container, --rdzv-id RUN: host, parent and run id are the same again."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "RUN")
    assert run_here(arguments(folder, "launched")) == 0
    # other flags, though all else says that torchrun has restarted the run
    assert run_here(arguments(folder, "launched", lr=2e-2, overwrite=True)) == 0
    printed = capsys.readouterr().out
    assert "started again" not in printed and "finished before" not in printed
    assert metrics(folder / "launched")[-1]["lr"] == pytest.approx(2e-2 / 7)
    # the same flags by another launcher, whose process has the same number
    real, before = Path.read_text, run_folder.launch()

    def read_text(self: Path, *args: str, **more: str) -> str:
        text = real(self, *args, **more)
        return " ".join([*text.split()[:21], "12345"]) if self.name == "stat" else text
    monkeypatch.setattr(Path, "read_text", read_text)
    assert run_folder.launch() != before
    steps = count_steps(monkeypatch)
    assert run_here(arguments(folder, "launched", lr=2e-2, overwrite=True)) == 0
    assert len(steps) == 8 and "started again" not in capsys.readouterr().out


def test_a_restart_does_not_take_the_run_that_is_being_deleted_for_its_own(folder, monkeypatch, capsys):
    """--overwrite over a finished run of the same flags: killed while it is deleted, then restarted."""
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    argv = arguments(folder, "deleted", overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "launch", lambda: "an earlier one")
        assert run_here(argv) == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        run_here(argv)
    steps = count_steps(monkeypatch)
    capsys.readouterr()
    assert run_here(argv) == 0
    assert len(steps) == 8 and "finished before" not in capsys.readouterr().out


def test_what_another_process_trains_until_the_folder_is_locked_is_not_deleted(folder, whole, monkeypatch):
    """Two launches of a command at once: the one that looks first locks the folder when the other has
    finished."""
    original = run_folder.lock_folder

    def late(out: Path, say) -> None:
        shutil.copytree(whole, out)
        original(out, say)
    monkeypatch.setattr(run_folder, "lock_folder", late)
    with pytest.raises(ValueError, match="holds a finished run"):
        run_here(arguments(folder, "raced", save_every=1, keep_checkpoints=99))
    assert same_weights(folder / "raced", whole)


def test_a_folder_without_an_identity_is_never_deleted_or_written_to(folder):
    """Other programs have files of these names too."""
    for name in ("checkpoints/epoch=3.ckpt", "final/model.bin", "metrics.jsonl", "eval.jsonl",
                 "run_config.json", "identity.json", "final.part/model.bin", "thesis.txt"):
        out = folder / f"not-ours-{name.replace('/', '-')}"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text('{"years": "of work"}')
        for more in ({}, dict(overwrite=True), dict(resume="never")):
            refused(folder, "is not empty and is not a run folder", out.name, **more)
    (out / "identity.json").write_text("")
    refused(folder, "identity.json: is not JSON.*; give another --output-dir, or delete it", out.name)


# ---------------------------------------------------------------- what was trained is kept


@pytest.mark.parametrize("failure", ["evaluation", "export", "notes"])
def test_what_fails_after_the_last_step_loses_no_training(folder, whole, failure, monkeypatch, capsys):
    """With --save-every 0 too. A second start only finishes."""
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    argv = arguments(folder, f"end-{failure}", eval_data=folder / "train.jsonl")
    with monkeypatch.context() as patch:
        if failure == "evaluation":     # the second one; the first is before the first step
            original, calls = train.sums_by_file, []
            patch.setattr(train, "sums_by_file", lambda *a: calls.append(1) or (
                fail() if len(calls) == 2 else original(*a)))
        else:
            patch.setattr(train, {"export": "save_model", "notes": "finish_run"}[failure], fail)
        with pytest.raises(OSError):
            run_here(argv)
    assert [r["step"] for r in metrics(folder / f"end-{failure}")] == list(range(1, 9))
    steps = count_steps(monkeypatch)
    assert run_here(argv) == 0
    assert not steps and "resuming after step 8" in capsys.readouterr().out
    out = folder / f"end-{failure}"
    assert same_weights(out, whole)
    evaluations = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evaluations] == [0, 8] and evaluations[0]["data"] != evaluations[1]["data"]
    assert not (out / "checkpoints").exists(), "nobody asked for this one"
    refused(folder, "holds a finished run", f"end-{failure}", eval_data=folder / "train.jsonl")


def test_a_signal_in_the_last_evaluation_ends_a_whole_run(folder, whole, monkeypatch):
    original, calls = train.sums_by_file, []

    def signalled(*args: object):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            # as the system does after a while
            assert checkpoint.find_checkpoints(folder / "late")[-1].name == "step-00000008"
        return original(*args)
    monkeypatch.setattr(train, "sums_by_file", signalled)
    assert run_here(arguments(folder, "late", eval_data=folder / "train.jsonl")) == 0
    assert len(calls) == 2 and same_weights(folder / "late", whole)


def test_a_signal_before_the_last_step_ends_a_whole_run(folder, whole, monkeypatch):
    stop_after(monkeypatch, 8)
    assert run_here(arguments(folder, "last-step")) == 0 and same_weights(folder / "last-step", whole)


def test_an_evaluation_that_was_cut_off_is_made_again_on_resume(folder, monkeypatch):
    argv = arguments(folder, "cut", eval_data=folder / "train.jsonl", eval_every=3, save_every=3)
    original, calls = train.sums_by_file, []
    with monkeypatch.context() as patch:
        patch.setattr(train, "sums_by_file", lambda *a: calls.append(1) or (
            original(*a) if len(calls) < 2 else (_ for _ in ()).throw(OSError(5, "Input/output error", "x"))))
        with pytest.raises(OSError):
            run_here(argv)
    assert run_here(argv) == 0
    assert [json.loads(line)["step"] for line in open(folder / "cut" / "eval.jsonl")] == [0, 3, 6, 8]
    assert [r["step"] for r in metrics(folder / "cut")] == list(range(1, 9))


def test_too_little_room_is_said_before_training(folder, monkeypatch, capsys):
    run_here(arguments(folder, "roomy", max_steps=1))
    assert "MB are free" not in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 10**5, 10**5))
    run_here(arguments(folder, "crammed", max_steps=1))
    assert "crammed: 0 MB are free, the run will write 0 MB" in capsys.readouterr().out


# ---------------------------------------------------------------- nothing trained yet


def test_a_folder_in_which_nothing_was_trained_belongs_to_nobody(folder, monkeypatch, capsys):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in ("sums_by_file", "StopSignal"):   # in the first evaluation, before the first step
        with monkeypatch.context() as patch:
            patch.setattr(train, place, interrupted)
            left = []
            patch.setattr(train, "leave", left.append)
            train.run(arguments(folder, "early", eval_data=folder / "train.jsonl"))
        assert left == [130]
        err = capsys.readouterr().err
        assert err.endswith("error: interrupted before training began; nothing is lost\n")
        assert "Traceback" not in err
    assert (folder / "early" / "identity.json").exists()
    assert run_here(arguments(folder, "early", lr=2e-2, max_steps=1, eval_data=folder / "train.jsonl")) == 0
    evaluations = (folder / "early" / "eval.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [0, 1]


@pytest.mark.parametrize("left", [[".lock"], [".lock", "identity.json.part"],
                                  [".lock", "identity.json", "run_config.json.part"]])
def test_a_full_disk_before_the_first_step_leaves_no_folder_that_is_refused(folder, left):
    out = folder / f"left-{len(left)}"
    out.mkdir()
    for name in left:
        (out / name).write_text('{"launch": "that one"}' if name == "identity.json" else "")
    assert run_here(arguments(folder, out, max_steps=1)) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_is_one_line(folder, number):
    """The process gets the signal while it loads the model."""
    # A test run in the background may ignore Ctrl-C, and its children too.
    code = ("import os, signal, sys\nimport train\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"def load_model(*a): os.kill(os.getpid(), {int(number)}); signal.pause()\n"
            "train.load_model = load_model\nsys.exit(train.run(sys.argv[1:]))\n")
    done = forks.run(["-c", code, *arguments(folder, "ended")])
    assert done.returncode == 128 + number
    assert done.stderr == "error: interrupted before training began; nothing is lost\n"


# ---------------------------------------------------------------- refused before the data is tokenized


def test_what_is_cheap_to_check_is_checked_before_the_data_is_tokenized(folder, whole, monkeypatch):
    make_model(folder / "headless" / "model")
    (folder / "headless" / "model" / "model.safetensors").unlink()
    make_model(folder / "misfit" / "model", tie=False)
    config = folder / "misfit" / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.txt").write_text("years of work")
    (folder / "file").write_text("")
    stopped(folder, "begun", 2, monkeypatch)
    monkeypatch.setattr(train, "load_dataset", None)
    refused(folder, "holds a finished run", "whole")
    refused(folder, "is not a run folder", "taken")
    refused(folder, "--lr was 0.01, is 0.02", "begun", lr=2e-2)
    refused(folder, r"lacks \*.safetensors", "new", model=folder / "headless" / "model")
    refused(folder, "missing model.layers.2", "new", model=folder / "misfit" / "model")
    refused(folder, "file is not a writable folder", "file")
    refused(folder, "file is not a writable folder", "file/below")
    refused(folder, "--resume .*step-99: not a whole checkpoint .*; name one like RUN", "new",
            resume=folder / "step-99")
    refused(folder, "--output-dir /proc/x: /proc is not a writable folder", "/proc/x")  # not even for root


@pytest.mark.parametrize("more", [{}, {"overwrite": True}], ids=["resume", "overwrite"])
@pytest.mark.parametrize("name", ["checkpoints/step-00000006", "checkpoints/step-00000006.part", "final",
                                  "final.part", "eval.jsonl"])
def test_a_file_where_the_run_writes_a_folder_is_named_before_it_trains(name, more, folder, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "identity.json").write_text(json.dumps({
        key: value for key, value in read_json(out / "identity.json").items() if key != "finished_after"}))
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    other = "file" if name == "eval.jsonl" else "folder"
    (out / name).mkdir() if other == "file" else (out / name).write_text("notes")
    refused(folder, f"--output-dir {out}: {out / name} is not a {other}, and .*move it away", out,
            **more)
    # What the run does not write is not in the way.
    (out / name).rename(out / "checkpoints" / "step-notes")
    run_folder.check_folder(out, {}, {"resume": "auto", "overwrite": True}, folder / "model")


# ---------------------------------------------------------------- what differs, by name


def test_a_mismatch_names_the_flag_or_the_file(folder, monkeypatch):
    for name in ("a", "b", "c"):
        make_records(folder / f"{name}.jsonl", 8, seed=ord(name))
    data = [folder / f"{name}.jsonl" for name in "ab"]
    dated = folder / "dated.jinja"
    dated.write_text("{{ bos_token }}{{ strftime_now('%d') }}{% for m in messages %}{{ m.role + m.content }}"
                     "{{ '<|eot_id|>' }}{% endfor %}")
    base = dict(train_data=data, date="2026-01-05", template=dated, epochs=4)
    stopped(folder, "named", 2, monkeypatch, **base)
    refused(folder, r"--train-data \S*/c.jsonl: other contents\)", "named",
            **{**base, "train_data": [folder / "a.jsonl", folder / "c.jsonl"]})
    shards = folder / "shards"
    shards.mkdir()
    for name in ("a", "c"):
        shutil.copy(folder / f"{name}.jsonl", shards)
    refused(folder, r"--train-data \S*/shards: other contents\)", "named", **{**base, "train_data": [shards]})
    refused(folder, r"--train-data: 1 file\(s\), not those of before\)", "named",
            **{**base, "train_data": data[:1]})
    refused(folder, "--date was 2026-01-05, is 2026-02-01[)]", "named", **{**base, "date": "2026-02-01"})
    refused(folder, r"--template was \S*/dated.jinja, is llama3: another text\)", "named",
            **{**base, "template": "llama3"})
    refused(folder, r"--template was \S*/dated.jinja, is alpaca: another text\)", "resumed",
            resume=folder / "named" / "checkpoints" / "step-00000002", **{**base, "template": "alpaca"})
    text = dated.read_text()
    dated.write_text(text + " ")
    refused(folder, r"--template \S*/dated.jinja: another text\)", "named", **base)
    dated.write_text(text)
    refused(folder, "--max-length was 120, is 90[)]", "named", **base, max_length=90)
    for name, old, new in (("tokenizer.json", "{", " {"),
                           ("tokenizer_config.json", "{", '{"pad_token": "<|eot_id|>", ')):
        file = folder / "model" / name
        text = file.read_text()
        file.write_text(text.replace(old, new, 1))
        refused(folder, "--model .*: another tokenizer[)]", "named", **base)
        file.write_text(text)
    make_model(folder / "other" / "model", seed=1)
    refused(folder, r"--model was .*/model, is \S*/other/model: other weights or another\b", "named",
            **base, model=folder / "other" / "model")
    # files may have moved, and the date is that of the start
    (folder / "moved").mkdir()
    moved = [shutil.copy(file, folder / "moved") for file in data]
    del base["date"]
    assert run_here(arguments(folder, "named", **{**base, "train_data": moved})) == 0


def test_auto_is_the_same_dtype_where_a_run_goes_on_with_another_cpu(folder, monkeypatch):
    fast = [True]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast[0])
    out = stopped(folder, "moving", 2, monkeypatch, dtype="auto")
    fast[0] = False
    refused(folder, "--dtype was bf16, is fp32", "moving", dtype="fp32")
    branch = arguments(folder, "branch", dtype="auto", resume=out / "checkpoints" / "step-00000002")
    dtypes, runs = [], [folder / name for name in ("branch", "moving", "here")]
    for argv in (branch, *(arguments(folder, run, dtype="auto") for run in runs[1:])):
        look.main([*argv, "--json", str(folder / "look.json")])
        looked = json.loads((folder / "look.json").read_text())
        assert run_here(argv) == 0
        out = Path(argv[argv.index("--output-dir") + 1])
        dtypes.append(json.loads((out / "run_config.json").read_text())["dtype"])
        assert looked["dtype"] == dtypes[-1] and looked["output_dir"] != "refused"
    assert dtypes == ["bf16", "bf16", "fp32"]
    assert same_weights(*runs[:2]) and not same_weights(*runs[1:])


def test_a_run_is_not_begun_anew_nor_over_its_own_model_unless_that_is_what_was_asked(folder, monkeypatch):
    stopped(folder, "half", 2, monkeypatch)
    refused(folder, "--resume is never", "half", resume="never")
    # These change no weight: it goes on.
    assert run_here(arguments(folder, "half", micro_batch_tokens=130, save_every=5)) == 0
    refused(folder, "holds the --model itself", "half", model=folder / "half" / "final", overwrite=True)


# Flags that may change where an interrupted run is resumed, by hand; of all others another value is refused.
MAY_CHANGE = {"output_dir", "overwrite", "save_every", "keep_checkpoints", "save_dtype", "resume",
              "eval_every", "log_every", "eval_generate", "eval_data", "date", "micro_batch_tokens", "device",
              "shard", "recompute", "compile", "deterministic", "cache_dir", "track"}
# These may where the steps already trained stay as they were.
MAY_IN_PART = {"epochs", "max_steps", "warmup_ratio"}


@pytest.fixture(scope="module")
def stopped_run(folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        run_here(arguments(folder, "stopped"))
    make_records(folder / "other-records.jsonl", 20, seed=1)
    other = shutil.copytree(folder / "model", folder / "other-config")      # the same weights
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    return folder / "stopped"


@pytest.mark.parametrize("field", [f for f in dataclasses.fields(train.Config)
                                   if f.name not in MAY_CHANGE | MAY_IN_PART], ids=lambda f: f.name)
def test_every_flag_that_changes_the_weights_is_refused_on_resume_with_another_value(
        folder, stopped_run, field):
    more = dict(train_data=None, mix=[f"{folder / 'train.jsonl'}=1"]) if field.name == "mix" else {}
    argv = arguments(folder, stopped_run, **more)
    now = getattr(train.parse_args(argv), field.name)
    if field.name in ("model", "train_data", "template", "columns", "mix"):
        other = {"model": folder / "other-config", "train_data": folder / "other-records.jsonl",
                 "template": "tulu", "columns": "prompt=query", "mix": None}[field.name]
    elif choices := field.metadata["choices"]:
        other = next(choice for choice in choices if choice not in (now, "auto"))
    elif isinstance(now, bool):
        other = not now
    else:
        other = now + 1 if isinstance(now, int) else (now or 1) / 2
    before = {path: path.stat().st_mtime_ns for path in stopped_run.rglob("*")}
    name = flag_name(field.name)
    if field.name == "train_data":
        argv = arguments(folder, stopped_run, train_data=other)
    elif field.name != "mix":
        argv += flags(**{field.name: other}) if other is not False else [name.replace("--", "--no-")]
    with pytest.raises(ValueError, match=rf"was started differently \((.*; )?{name}[: ]"):
        run_here(argv)
    assert before == {path: path.stat().st_mtime_ns for path in stopped_run.rglob("*")}


def test_a_run_is_extended_where_its_learning_rates_stay_the_same(folder, monkeypatch, capsys):
    constant = dict(schedule="constant", warmup_ratio=0.1, save_every=4)
    run_here(arguments(folder, "long", **constant, epochs=3))       # 12 steps, 2 of warm-up
    run_here(arguments(folder, "extended", **constant, epochs=2))   # 8 steps, 1 of warm-up
    refused(folder, "holds a finished run", "extended", **constant, epochs=2)
    before = state_of(folder / "extended")
    with pytest.raises(ValueError, match="cannot be resumed with --epochs 3 --max-steps 0 --warmup-ratio 0.1"
                                         ": the 8 steps that are trained would .* other learning rates.*"
                                         "Give --epochs 2 .* again, or start a new run from its result: "
                                         "--model .*extended/final --output-dir ANOTHER"):
        run_here(arguments(folder, "extended", **constant, epochs=3))
    assert {k: v for k, v in state_of(folder / "extended").items() if ".lock" not in k} == {
        k: v for k, v in before.items() if ".lock" not in k}
    flat = {**constant, "warmup_ratio": 0.01}
    run_here(arguments(folder, "flat-long", **flat, epochs=3))
    run_here(arguments(folder, "flat", **flat, epochs=2))
    stopped(folder, "flat", 2, monkeypatch, **flat, epochs=3)       # 8 of 12 steps, then 10
    assert (folder / "flat" / "final").is_dir(), "the shorter run's result stays until there is a new one"
    capsys.readouterr()
    assert run_here(arguments(folder, "flat", **flat, epochs=3)) == 0
    assert "resuming after step 10" in capsys.readouterr().out
    assert same_weights(folder / "flat", folder / "flat-long")
    assert [(r["step"], r["lr"]) for r in metrics(folder / "flat")] == [
        (r["step"], r["lr"]) for r in metrics(folder / "flat-long")]
    assert run_here(arguments(folder, "flat", **flat, max_steps=13)) == 0   # by steps as well
    with pytest.raises(ValueError, match="--max-steps 12 .*: 13 steps are trained, .* would have only 12"):
        run_here(arguments(folder, "flat", **flat, max_steps=12))           # shorter than it is
    # a stopped run too; and a linear one is refused, whatever the warm-up
    stopped(folder, "linear", 3, monkeypatch)
    with pytest.raises(ValueError, match="3 steps that are trained would .* Give --epochs 2 .* again$"):
        run_here(arguments(folder, "linear", epochs=4))
    shutil.rmtree(folder / "flat-long" / "final")
    refused(folder, "holds a finished run whose final/ is gone", "flat-long", **flat, epochs=3)
    # without its last checkpoint there is nothing to resume
    run_here(arguments(folder, "bare", **{**flat, "save_every": 0}))
    with pytest.raises(ValueError, match="last checkpoint was not kept .*--model .*bare/final"):
        run_here(arguments(folder, "bare", **{**flat, "save_every": 0}, epochs=3))


# ---------------------------------------------------------------- held-out files, the quick start


def test_held_out_files_of_like_names_each_keep_their_result(folder):
    (folder / "d").mkdir()
    files = [make_records(folder / name, 3 + i, seed=i) for i, name in enumerate(
        ("x.jsonl", "d/x.jsonl", "x-0.jsonl"))]
    run_here(arguments(folder, "like-names", eval_data=files, max_steps=1))
    data = json.loads((folder / "like-names" / "eval.jsonl").read_text().splitlines()[-1])["data"]
    assert list(data) == [f"{folder.name}/x.jsonl", "d/x.jsonl", "x-0"]
    counts = [sum(kind["tokens"] for kind in kinds.values()) for kinds in data.values()]
    assert len(set(counts)) == 3


def table(printed: str) -> list[list[str]]:
    """The rows about completions of the table at the end: data, span, tokens, before, after, change."""
    return [line.split() for line in printed.splitlines() if re.match(r"\S+ +completion +[\d,]+ ", line)]


def test_the_table_at_the_end_compares_the_same_records_only(folder, whole, monkeypatch, capsys):
    a, b = (make_records(folder / f"held-{name}.jsonl", 4, seed=ord(name)) for name in "ab")
    # began from a checkpoint: measured there
    run_here(arguments(folder, "from-3", eval_data=a, resume=whole / "checkpoints" / "step-00000003"))
    printed = capsys.readouterr().out
    assert "at step 3 and step 8" in printed
    assert [json.loads(line)["step"] for line in open(folder / "from-3" / "eval.jsonl")] == [3, 8]
    # resumed with another file
    stopped(folder, "more-files", 3, monkeypatch, eval_data=a)
    run_here(arguments(folder, "more-files", eval_data=[a, b]))
    first, second = table(capsys.readouterr().out)
    before, after = (json.loads(line)["data"] for line in open(folder / "more-files" / "eval.jsonl"))
    shown = [x["held-a"]["completion"]["nll_token_mean"] for x in (before, after)]
    assert [float(x) for x in first[3:]] == pytest.approx([*shown, shown[1] - shown[0]], abs=1e-4)
    assert [second[3], second[5]] == ["-", "-"]
    # the same name, other records
    stopped(folder, "other-records", 3, monkeypatch, eval_data=a)
    shutil.copy(b, a)
    run_here(arguments(folder, "other-records", eval_data=a))
    ((*_, then, now, change),) = table(capsys.readouterr().out)
    assert (then, change) == ("-", "-") and float(now) > 0


def test_a_file_given_twice_to_train_on_is_said(folder, capsys):
    run_here(arguments(folder, "twice", train_data=[folder / "train.jsonl"] * 2, max_steps=1))
    assert "--train-data names 1 file(s) more than once" in capsys.readouterr().out
    (folder / "records").mkdir()
    shutil.copy(folder / "train.jsonl", folder / "records")
    run_here(arguments(folder, "in-folder", max_steps=1,
                       train_data=[folder / "records", folder / "records" / "train.jsonl"]))
    assert "--train-data names 1 file(s) more than once" in capsys.readouterr().out


def test_an_interrupted_quick_start_is_resumed_and_a_finished_one_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--eval-generate", "0", "--max-steps", "4", "--cache-dir", str(tmp_path / "cache")]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run_here(argv) == 128 + signal.SIGTERM
    steps = count_steps(monkeypatch)
    assert run_here(argv) == 0
    assert len(steps) == 2 and "deleting" not in capsys.readouterr().out
    assert run_here(argv) == 0
    assert len(steps) == 6
    assert "runs/quickstart-im: deleting the run that is there" in capsys.readouterr().out


# ---------------------------------------------------------------- the same examples under every loss


def test_it_and_im_train_on_the_same_examples_unless_asked_otherwise(folder, capsys):
    """Answers that --max-length cuts off: both losses leave these examples out, and say so."""
    records = [{"prompt": "red plum " * (40 if i % 3 else 1), "completion": "blue"} for i in range(18)]
    (folder / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    def tokens(out: str, **more: object) -> tuple[list[int], str]:
        run_here(arguments(folder, out, train_data=folder / "long.jsonl", max_length=40, **more))
        return [r["tokens"] for r in metrics(folder / out)], capsys.readouterr().out

    it, printed = tokens("cut-it", loss="it")
    im, _ = tokens("cut-im", loss="im")
    assert it == im and len(it) == 2
    assert "12 of these because they have no completion" in printed and "--no-require-completion" in printed
    more, printed = tokens("cut-more", loss="im", no_require_completion=True)
    assert len(more) == 6 and sum(more) > sum(im)
    assert "warning: 12 examples without a completion" in printed
    fewer, _ = tokens("cut-fewer", loss="it", no_require_completion=True)
    assert fewer == it
    with pytest.raises(ValueError, match=r"has a completion .*\(--max-length 10 cut off 18; raise it\); "
                                         "give .*--no-require-completion"):
        run_here(arguments(folder, "cut-all", train_data=folder / "long.jsonl", max_length=10))
    (folder / "context.jsonl").write_text(json.dumps({"messages": [
        {"role": "user", "content": "red"}, {"role": "assistant", "content": "plum", "weight": 0}]}))
    with pytest.raises(ValueError, match="none has a completion of a weight above 0; give records"):
        run_here(arguments(folder, "cut-all", train_data=folder / "context.jsonl"))


def test_an_example_beyond_the_models_positions_is_said(folder, capsys):
    run_here(arguments(folder, "within", max_length=300, max_steps=1))
    assert "max_position_embeddings" not in capsys.readouterr().out
    record = {"prompt": "red", "completion": "blue town " * 150}
    (folder / "beyond.jsonl").write_text(json.dumps(record))
    run_here(arguments(folder, "beyond", train_data=folder / "beyond.jsonl", max_length=300, max_steps=1))
    assert ("warning: 1 example longer than the model's max_position_embeddings, 256;\n  --max-length 256"
            in capsys.readouterr().out)
