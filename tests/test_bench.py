"""The benchmarks measure what they say: train.py's own step, and the steps after the warm-up."""
import argparse
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from bench import common, gpu, gpu_checks, gpu_speed, step, training
from tiny import ROOT, arguments, is_running, metrics, run_here, setup, wait_for

# A train.py whose measured steps take SECONDS for 10 tokens, and all others 100 s.
PROGRAM = """
import json, sys
from pathlib import Path
sys.argv.remove("--overwrite")
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert flags["--lr"] == "1" and flags["--batch-size"] == "3"
count, folder = int(flags["--max-steps"]), Path(flags["--output-dir"])
folder.mkdir(parents=True, exist_ok=True)
seconds = [100, 100, *[SECONDS] * (count - 3), 100]
(folder / "metrics.jsonl").write_text("".join(json.dumps(
    {"seconds": s, "tokens": 10, "trained_tokens": 4, "peak_memory_mb": 2048}) + "\\n" for s in seconds))
"""


def test_two_checkouts_are_compared_by_the_steps_after_the_warm_up_and_before_the_last(
        tmp_path, monkeypatch, capsys):
    for name, seconds in (("this", 2), ("other", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text(PROGRAM.replace("SECONDS", str(seconds)))
    monkeypatch.setattr(training, "REPOSITORY", tmp_path / "this")
    training.main(["--model", "m", "--train-data", "d", "--compare", str(tmp_path / "other"), "--batch-size",
                   "3", "--steps", "4", "--warmup", "2", "--rounds", "2", "--", "--lr", "1"])
    *lines, last = capsys.readouterr().out.splitlines()
    [result] = json.loads(last)["results"]
    speeds = {Path(name).name: [run["tokens_per_second"] for run in runs]
              for name, runs in result["runs"].items()}
    assert speeds == {"train.py": [5.0, 5.0], "other": [2.0, 2.0]}
    assert lines[-1].endswith("2.50 (2.50-2.50)")


def test_what_was_measured_before_a_failure_is_printed(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(PROGRAM.replace("SECONDS", "2"))     # takes a batch size of 3 only
    monkeypatch.setattr(training, "REPOSITORY", tmp_path)
    with pytest.raises(ValueError, match="AssertionError"):
        training.main(["--model", "m", "--train-data", "d", "--batch-size", "3", "4", "--rounds", "1", "--",
                       "--lr", "1"])
    *lines, last = capsys.readouterr().out.splitlines()
    done, failed = json.loads(last)["results"]
    assert [run["tokens_per_second"] for run in done["runs"]["train.py"]] == [5.0]
    assert failed["runs"] == {"train.py": []} and lines[-1].startswith("train.py") and " 2.00 " in lines[-1]


@pytest.mark.parametrize("batch_tokens, kl", [(4096, 0), (120, 0), (4096, 1)])  # several micro-batches; KL
def test_the_step_that_is_measured_is_the_step_of_train(tmp_path, batch_tokens, kl):
    setup(tmp_path)
    flags = arguments(tmp_path, "run", schedule="constant", warmup_ratio=0, max_steps=4,
                      micro_batch_tokens=batch_tokens, kl_weight=kl)
    assert run_here(flags) == 0
    _, one_step = step.training(train.parse_args(flags))
    for number, line in enumerate(metrics(tmp_path / "run")):
        measured = one_step(number)
        assert measured["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert [measured["tokens"], measured["trained_tokens"]] == [line["tokens"], line["trained_tokens"]]


def test_the_products_of_a_step_are_timed_with_the_flags_of_its_run():
    """As bench.training starts it, and without records."""
    for data in (["--train-data", "a.jsonl"], []):
        run = ["--model", "m", *data, "--loss", "it"]
        args, config = step.parse_args(["limit", "--tokens", "8", "--", *run])
        assert (args.tokens, config.model, config.loss) == (8, "m", "it")


def test_the_embedded_default_is_measured_where_no_model_is_named():
    for words in (["limit", "--tokens", "8"], ["speed", "--document", "8"]):
        assert step.parse_args(words)[1].model.endswith("quickstart/model")
    _, config = step.parse_args(["limit", "--", "--model", "m", "--train-data=a.jsonl"])
    assert config.train_data == ["a.jsonl"]


def test_synthetic_documents_have_the_length_that_was_asked_for():
    dataset = step.synthetic([40] * 5, vocabulary=7)
    assert dataset.lengths.tolist() == [40] * 5 and dataset.ids.max() == 6
    assert dataset.counts.sum(1).tolist() == [40] * 5 and (dataset.counts[0] > 0).sum() == 2


def event(name, category, start, length, thread=1, number=None, **more):
    return {"name": name, "cat": category, "ts": start, "dur": length, "tid": thread,
            "args": more | {"Sequence number": number}}


NODE = "autograd::engine::evaluate_function: "
# A step on a GPU: the forward pass starts a kernel inside a part and one inside no operation, the optimizer
# waits for the device, and the backward pass has a thread of its own. Ranges show up on the device, too.
TRACE = [
    event(f"{NODE}RotateBackward", "cpu_op", 20, 30, 2, number=8),
    event("cuLaunchKernelEx", "cuda_driver", 25, 2, 2, correlation=5),
    event("part:norms and RoPE", "user_annotation", -20, 10), event("Rotate", "cpu_op", -19, 5, number=8),
    event("part:MLP", "user_annotation", 0, 50), event("aten::mm", "cpu_op", 5, 40, number=9),
    event("cudaLaunchKernel", "cuda_runtime", 10, 5, correlation=1),
    event("sm90_xmma_gemm_bf16", "kernel", 100, 3000, 7, correlation=1),
    event("part:MLP", "gpu_user_annotation", 100, 3000, 7),
    event("part:optimizer", "user_annotation", 60, 5000),
    event("triton_poi_fused_mul_0", "cpu_op", 70, 5),
    event("cuLaunchKernel", "cuda_driver", 71, 2, correlation=2),
    event("triton_poi_fused_mul_0", "kernel", 3100, 500, 7, correlation=2),
    event("cudaStreamSynchronize", "cuda_runtime", 100, 4000, correlation=3),
    event("Memcpy DtoH", "gpu_memcpy", 3600, 100, 7, correlation=4),
    event("flash_bwd_kernel", "kernel", 3700, 200, 7, correlation=5)]


def test_the_time_of_a_kernel_goes_to_the_part_that_started_it():
    times, lost = step.seconds_of_parts(TRACE)
    assert {of: round(1e6 * seconds) for of, seconds in times.items() if seconds} == {
        (step.MLP, "forward"): 3000, (step.OPTIMIZER, "forward"): 500, (step.NORMS, "backward"): 200,
        (step.OTHER, "forward"): 100}
    # The copy was started by nothing that the trace knows of.
    assert lost == pytest.approx(100e-6)
    assert sum(seconds for *_, seconds in step.device_events(TRACE)) == pytest.approx(3800e-6)
    assert [gpu_speed.kind_of(name) for name, *_ in step.device_events(TRACE)] == [
        "matrix products", "fused by the compiler", "copies and fills", "attention"]


def test_the_time_of_a_call_on_a_cpu_is_without_that_of_the_calls_inside_it():
    trace = [event(f"part:{step.OTHER}", "user_annotation", 0, 100),
             event("part:MLP", "user_annotation", 10, 50), event("aten::mm", "cpu_op", 20, 30),
             event("aten::add", "cpu_op", 70, 10)]
    times, lost = step.seconds_of_parts(trace)
    assert {of: round(1e6 * seconds) for of, seconds in times.items()} == {
        (step.OTHER, "forward"): 50, (step.MLP, "forward"): 50}
    assert lost == 0


def test_an_autograd_node_belongs_to_the_part_whose_operation_made_it():
    """The last operation with its number. What adds up the gradient that it made follows it."""
    trace = [event(f"part:{step.OTHER}", "user_annotation", 0, 100),
             event("aten::to", "cpu_op", 1, 4, number=3), event("part:MLP", "user_annotation", 5, 10),
             event("Linears", "cpu_op", 6, 8, number=3), event("aten::add", "cpu_op", 20, 5, number=4),
             event(f"{NODE}AddBackward", "cpu_op", 40, 10, number=4),
             event(f"{NODE}LinearsBackward", "cpu_op", 50, 20, number=3),
             event("aten::mm", "cpu_op", 55, 10, number=5),
             event(f"{NODE}torch::autograd::AccumulateGrad", "cpu_op", 70, 7)]
    times, _ = step.seconds_of_parts(trace)
    assert {of: round(1e6 * seconds) for of, seconds in times.items()} == {
        (step.OTHER, "forward"): 53, (step.MLP, "forward"): 10, (step.OTHER, "backward"): 10,
        (step.MLP, "backward"): 27}


# ---------------------------------------------------------------- flags and children


@pytest.mark.parametrize("module, argv, says", [
    ("attention", "--heads 0", "--heads 0: must be a whole number, 1 or more"),
    ("attention", "--heads 9 --key-heads 2", "--key-heads 2: must divide --heads 9"),
    ("training", "--model m --train-data d --threads -5", "--threads -5: must be a whole number, 1 or more"),
    ("training", "--model m --train-data d --steps 1.5", "--steps 1.5: must be a whole number, 1 or more"),
    ("training", "--model m --train-data d -- --output-dir x", "--output-dir: is set for every run"),
    ("training", "--model m --train-data d -- --batch-size 8", "--batch-size: is a flag of this program"),
    ("training", "--model m --train-data d --variant=--max-steps=2", "--max-steps=2: is set for every run"),
    ("generation", "--model m --data d --prompts 0", "--prompts 0: must be a whole number, 1 or more"),
    ("generation", "--model m --data d --only x", "--only x: must be one of equality, speed"),
    ("step", "speed --document 10000000",
     "--document 10000000: must be a whole number from 1 to 1,000,000"),
    ("faults", "--ranks 1 0", "--ranks 0: must be a whole number, 1 or more"),
    ("faults", "--timeout x", "--timeout x: must be a number, 1 or more")])
def test_a_flag_that_cannot_be_is_named_before_anything_is_measured(module, argv, says):
    with pytest.raises(ValueError) as error:
        importlib.import_module(f"bench.{module}").main(argv.split())
    assert str(error.value).startswith(says)


def test_the_error_of_a_child_is_its_own_line(capsys):
    with pytest.raises(ValueError, match="^--model nope: no such folder, nor a hub id"):
        common.child(["train.py", "--model", "nope", "--train-data", "nope.jsonl"], 1)
    with pytest.raises(ValueError, match="(?s)^-c .*: exit status 3\nTraceback.*ZeroDivisionError"):
        common.child(["-c", "import sys, traceback\ntry: 1 / 0\nexcept Exception: traceback.print_exc()\n"
                      "sys.exit(3)"], 1)


def test_a_child_ends_with_the_program_that_is_stopped(tmp_path):
    wait = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = ("from bench.common import child; from runtime.start import run_program\n"
               f"run_program(lambda _: child(['-c', {wait!r}], 1))")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_peer_runs_on_the_device_of_the_run(tmp_path, monkeypatch):
    """On a machine that has a GPU, too."""
    with monkeypatch.context() as with_gpu:
        with_gpu.setattr(torch.cuda, "is_available", lambda: True)
        peers = importlib.reload(importlib.import_module("bench.peers"))
    model = gpu_speed.COMMON | gpu_speed.SHAPES["1B"] | gpu_speed.TINY
    peers.main(["transformers", "--steps", "2", "--document", "16", "--config", json.dumps(model), "--result",
                str(tmp_path / "result"), "--", *gpu_speed.flags("it", 64, True), "--device", "cpu"])
    result = json.loads((tmp_path / "result").read_text())
    assert result["tokens"] == [8 * 16] * 2 and result["trained"] == [8 * 9] * 2


@pytest.mark.parametrize("only", ["equality", "speed"])
def test_the_prompts_of_a_generation_are_those_that_the_file_had(monkeypatch, capsys, only):
    from bench import generation
    run = {"outputs": [[1], [2, 3]], "seconds": 1.0, "new_tokens": 5, "prompt_tokens": 7}
    monkeypatch.setattr(generation, "json_child", lambda *_: run)
    generation.main(["--model", "m", "--data", "d", "--prompts", "50", "--only", only])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompts"] == 2


def test_records_without_an_answer_are_no_questions(tmp_path):
    from bench import harness
    (tmp_path / "data.jsonl").write_text('{"messages": [{"role": "user", "content": "Who?"}]}\n')
    args = argparse.Namespace(model=str(ROOT / "quickstart/model"), data=str(tmp_path / "data.jsonl"),
                              questions=1, context=1)
    with pytest.raises(ValueError, match="^--questions 1: .* is enough for 0 of --context 1 tokens"):
        harness.make_task(args, tmp_path)


def test_attention_is_measured_on_a_row_shorter_than_a_record(capsys):
    from bench import attention
    attention.main("--tokens 20 --lengths 10 --heads 2 --key-heads 1 --head-dim 8 --repeats 1".split())
    [ten, records] = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert ten["documents"] == [10, 10] and len(records["documents"]) == 1


def test_the_soak_test_shows_why_an_undisturbed_run_failed(tmp_path, monkeypatch):
    from bench import faults
    monkeypatch.setattr(faults, "REPOSITORY", tmp_path)
    (tmp_path / "train.py").write_text("raise SystemExit(1)")
    with pytest.raises(ValueError, match="(?s)an undisturbed run failed:\n.*train.py FAILED"):
        faults.main(["--runs", "1", "--ranks", "1", "--attempts", "1"])


def test_the_soak_test_leaves_alone_what_is_in_a_folder(tmp_path, monkeypatch):
    from bench import faults
    began = []
    monkeypatch.setattr(faults, "soak", began.append)
    faults.main(["--folder", str(tmp_path / "new")])
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(ValueError, match=f"^--folder {tmp_path}: is not an empty folder; give another$"):
        faults.main(["--folder", str(tmp_path)])
    assert len(began) == 1


@pytest.mark.parametrize("says, status, gpus", [
    ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, []),
    ("a card", 0, ["a card"])])
def test_a_gpu_is_what_the_driver_names_and_pytorch_can_use(tmp_path, monkeypatch, says, status, gpus):
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\necho "{says}"\nexit {status}\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu, "has_cuda", lambda: False)
    assert common.hardware()["gpus"] == gpus
    with pytest.raises(ValueError, match="--device cuda: PyTorch finds no CUDA device"):
        gpu.main(["--only", "versions", "--output", str(tmp_path / "results.json")])


# ---------------------------------------------------------------- bench.gpu

FAKE_STAGES = """
import os, subprocess, sys, time
from pathlib import Path

def good(report, device, tiny):
    report.at_most(3, "small enough", 0.5, 1.0)
    report.row(2, "a number", 1234567.0, "us")

def hang(report, device, tiny):
    report.at_most(3, "found before it hung", 0.5, 1.0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)

def broken(report, device, tiny):
    with report.trying(4, "what raises is a row"):
        raise RuntimeError("no such kernel")
    report.at_most(4, "not a number", float("nan"), 1.0)
    report.at_least(4, "a planted fault that is missed", 0.5, 1.0)
    sys.exit("gave up")
"""


@pytest.fixture
def fake_stages(tmp_path, monkeypatch):
    (tmp_path / "fake_stages.py").write_text(FAKE_STAGES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    return tmp_path


def test_a_stage_that_hangs_or_fails_costs_its_own_results_only(fake_stages, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STAGES", (
        gpu.Stage("hang", "fake_stages:hang", 4), gpu.Stage("broken", "fake_stages:broken", 30),
        gpu.Stage("good", "fake_stages:good", 30, alone=True)))
    output = fake_stages / "results.json"
    assert gpu.main(["--device", "cpu", "--budget", "60", "--output", str(output)]) == 1
    results = gpu.read_results(output)
    outcomes = {name: stage["outcome"] for name, stage in results["stages"].items()}
    assert outcomes == {"hang": "killed at its deadline of 4 s", "broken": "exit status 1: gave up",
                        "good": "ended"}
    assert {row["name"]: row["passed"] for row in results["rows"]} == {
        "small enough": True, "a number": None, "found before it hung": True, "what raises is a row": False,
        "not a number": False, "a planted fault that is missed": False, "hang": False, "broken": False}
    wait_for(lambda: not any(is_running(int(pid)) for pid in (fake_stages / "pids").read_text().split()))
    *_, table, last = capsys.readouterr().out.partition("\n\n")
    *lines, last = last.splitlines()
    assert max(map(len, lines)) <= 80 and any("1,234,567 us" in line for line in lines)
    assert any("RuntimeError: no such kernel" in line for line in lines)
    summary = json.loads(last)
    assert summary["passed"] == 2 and "broken: not a number" in summary["failed"]
    assert gpu.main(["--table", str(output)]) == 1
    assert capsys.readouterr().out.splitlines() == lines


def row(section, name, value=None, passed=None, data=None):
    return {"stage": "s", "section": section, "name": name, "value": value, "unit": "", "limit": "",
            "note": "", "passed": passed, "data": data or {}}


def test_the_tables_of_the_documentation_are_those_of_a_results_file(tmp_path):
    data = {"mfu": 0.501, "peak_gb": 30.14, "peak_over_estimate": 1.071}
    rows = [row(3, "good", 0.5, True), row(3, "bad", 2.0, False), row(11, "1B: tiled", 45.123),
            row(10, "1B IM 4,096: MFU 50.1%", 66805.4, data=data), row(10, "1B IM 65,536", "out of memory")]
    machine = {"gpus": ["a card"], "versions": {"torch": "2"}}
    results = {"hardware": machine, "seconds": 1, "budget": 2, "rows": rows}
    file = tmp_path / "gpu.md"
    file.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    for _ in range(2):
        gpu.write_markdown(results, file)
        lines = file.read_text().splitlines()
        assert lines[:2] == ["before", "<!-- results -->"]
        assert lines[-2:] == ["<!-- end of results -->", "after"]
        assert "old" not in lines and "| fp32 against the CPU | 1 of 2 | bad |" in lines
        assert "| 1B | IM | 4,096 | 66,805 | 50.1% | 30.1 | 1.07 |" in lines
        assert "| 1B | IM | 65,536 | out of memory | | | |" in lines and "| 1B: tiled | 45.1 |" in lines
    file.write_text("no markers")
    with pytest.raises(ValueError, match="end of results"):
        gpu.write_markdown(results, file)


def test_an_error_of_attention_is_found_in_a_gradient_that_is_zero_or_not_a_number():
    exact = torch.zeros(3, 2)
    assert gpu_checks.document_error(exact + 1e-6, exact, [1, 2], usual=1.0) < 1e-4
    assert gpu_checks.document_error(exact + 0.01, exact, [1, 2], usual=1.0) > 0.05
    for wrong in (0, 2):    # the first document or the last
        got = torch.ones(3, 2)
        got[wrong] = torch.nan
        assert gpu_checks.document_error(got, torch.ones(3, 2), [1, 2], usual=1.0).isnan()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_from_outside_has_written_what_was_found(fake_stages, number, capsys):
    program = ("from bench import gpu; from runtime.start import run_program; gpu.STAGES = ("
               "gpu.Stage('good', 'fake_stages:good', 30), gpu.Stage('hang', 'fake_stages:hang', 300), "
               "gpu.Stage('last', 'fake_stages:good', 30, alone=True)); "
               "run_program(lambda argv: gpu.main(['--device', 'cpu', '--output', *argv]))")
    output, pids = fake_stages / "results.json", fake_stages / "pids"
    process = subprocess.Popen([sys.executable, "-c", program, str(output)], cwd=ROOT, text=True,
                               env={**os.environ, "PYTHONPATH": f"{ROOT}:{fake_stages}"},
                               stdout=subprocess.PIPE)

    def found() -> set[str]:
        rows = json.loads(output.read_text())["rows"] if output.is_file() else []
        return {row["name"] for row in rows if row["section"]}

    # While it runs, the file holds what the stages have found.
    wait_for(lambda: found() == {"small enough", "a number", "found before it hung"})
    wait_for(lambda: pids.is_file() and len(pids.read_text().split()) == 2)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    wait_for(lambda: not any(is_running(int(pid)) for pid in pids.read_text().split()))
    failed = ["hang: hang", "last: last"]
    if number == signal.SIGKILL:
        outcome = "running"
    else:
        assert process.returncode == 128 + number
        assert json.loads(out.splitlines()[-1])["failed"] == failed
        outcome = "killed: the run was ended from outside"
    assert found() == {"small enough", "a number", "found before it hung"}
    # The table of the file says what did not end, and what was not started.
    assert gpu.main(["--table", str(output)]) == 1
    table = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert outcome in table and "not started" in table
    assert gpu.summary(gpu.read_results(output))["failed"] == failed


def test_what_is_no_results_file_is_named(tmp_path):
    file = tmp_path / "e.json"
    for text, problem in (("{}", "is no results file"), ("cut", "is not JSON"), ("[]", "not an object")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"e.json: .*{problem}"):
            gpu.main(["--table", str(file)])
    with pytest.raises(ValueError, match="absent: no such file"):
        gpu.main(["--markdown", str(tmp_path / "absent")])
    with pytest.raises(ValueError, match="--output"):
        gpu.main(["--device", "cpu", "--output", str(tmp_path)])
    for budget in ("nan", "inf", "1", "x"):
        with pytest.raises(ValueError, match=f"--budget {budget}: must be a number"):
            gpu.main(["--budget", budget])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda: PyTorch finds no CUDA device"):
            gpu.main(["--output", str(file)])


def test_no_stage_starts_when_no_time_is_left(fake_stages, monkeypatch):
    monkeypatch.setattr(gpu, "STAGES", (gpu.Stage("good", "fake_stages:good", 30, alone=True),))
    monkeypatch.setattr(gpu, "LEAST", 60)
    output = fake_stages / "results.json"
    (fake_stages / "results-logs").mkdir()
    (fake_stages / "results-logs" / "good.jsonl").write_text('{"name": "of an earlier run"}\n')
    assert gpu.main(["--device", "cpu", "--budget", "68", "--output", str(output)]) == 1
    results = gpu.read_results(output)
    assert "no time was left; raise --budget" in results["stages"]["good"]["outcome"]
    assert [row["name"] for row in results["rows"]] == ["good"]


# What a stage has to find in a dry run, besides failing at nothing.
FINDS = {
    "versions": "torch", "fp32": "Qwen3: gradients, worst tensor", "attention":
    "tiled: a leak between documents is caught", "bf16": "a leak between documents is caught", "syncs":
    "--neftune-alpha 5: waits of 5 steps", "quickstart": "deterministic: resumed equals uninterrupted",
    "transformers": "Qwen2, bf16: gradients", "generation": "Qwen2: answers as transformers, of 3", "ranks":
    "FSDP2 by gloo: gradients", "compile": "1B: first step with compiling, deterministic", "ceilings":
    "a small kernel, started from Python", "speed-1B": "1B eager: optimizer", "peers":
    "1B: TRL, sdpa, packed"}


def test_the_stages_of_speed_measure_each_shape_by_the_same_function():
    """So that a dry run of one of them, with tiny shapes, is one of all."""
    for name in gpu_speed.SHAPES:
        [stage] = [stage for stage in gpu.STAGES if stage.name == f"speed-{name}"]
        module, _, function = stage.function.partition(":")
        measure = getattr(importlib.import_module(module), function)
        assert (measure.func, measure.args) == (gpu_speed.speed_of, (name,))


@pytest.mark.parametrize("stage", [stage for stage in gpu.STAGES if stage.name in FINDS or not
                                   stage.name.startswith("speed-")], ids=lambda stage: stage.name)
def test_a_dry_run_of_a_gpu_stage_fails_at_nothing(stage, tmp_path, monkeypatch):
    # What matters is that layers go through the compiler, not its code.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    gpu.run_stage(stage.function, tmp_path / "rows.jsonl", "cpu")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row for row in rows if row["passed"] is False] == []
    assert FINDS[stage.name] in [row["name"] for row in rows]
    results = {"rows": rows, "hardware": {"gpus": [], "cpu": "a CPU", "versions": {}}, "seconds": 1,
               "budget": 2}
    assert max(map(len, gpu.table(results).splitlines())) <= 80
