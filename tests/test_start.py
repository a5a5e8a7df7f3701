"""The first seconds of a program, as a user sees them: --help, wrong flags and Ctrl-C, before PyTorch."""
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.start import answer_interrupts, print_error, raise_interrupts
from tiny import ROOT, command

COMMANDS = sorted(file.stem for file in (ROOT / "eval").glob("*.py") if "    run(main)" in file.read_text())


def start(argv: list[str], **env: str) -> subprocess.CompletedProcess:
    """As from a terminal: a test in the background ignores Ctrl-C, and its children would too."""
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, timeout=60,
                          env={**os.environ, **env}, preexec_fn=lambda: signal.signal(
                              signal.SIGINT, signal.SIG_DFL))


def imported(stderr: str) -> set[str]:
    return set(re.findall(r"^import time:.*\| +(\S+)$", stderr, re.M))


@pytest.mark.parametrize("argv, says", [
    (["--help"], ""), (["--lr", "x"], "error: --lr x: must be a finite number above 0 and below 100\n"),
    (["--adam-eps", "1e-50"], "error: --adam-eps 1e-50: must be a finite number, 1e-30 or more\n"),
    (["--config", "nowhere"], "error: --config nowhere: no such file\n"),
    (["--model", "/nowhere", "--train-data", "x.jsonl"],
     "error: --model /nowhere: no such folder, nor a hub id (owner/name)\n"),
    (["--model", "n" * 300, "--train-data", "x.jsonl"], f"error: {'n' * 300}: File name too long\n"),
    (["--model", "quickstart/model", "--train-data", "nowhere.jsonl"],
     "error: --train-data nowhere.jsonl: no such file or folder\n"),
    (["--model", "quickstart/model", "--train-data", "nowhere/*.csv.gz"],
     "error: --train-data nowhere/*.csv.gz: no file matches\n"),
    (["--template", "nowhere.jinja"], "error: --template nowhere.jinja: no such file\n"),
    *((["--output-dir", name], f"error: --output-dir {name}: {place} is not a writable folder ({why}); give "
       "another\n") for name, place, why in (
           ("README.md/x", f"{ROOT}/README.md", "Not a directory"),
           ("/proc/x", "/proc", "No such file or directory"), ("n" * 300, ROOT, "File name too long"))),
    (["--output-dir", "runs/x", "--cache-dir", "runs/x/cache"],
     "error: --cache-dir runs/x/cache: is in --output-dir, which is for the run's own files; give another "
     "folder\n"),
    (["--completion-weight", "0", "--loss", "it"],
     "error: all span weights are 0, so there is nothing to train; raise --completion-weight\n")])
def test_help_and_errors_of_values_files_and_models_come_before_pytorch(argv, says):
    done = start(["-X", "importtime", "train.py", *argv])
    assert done.returncode == bool(says) and "torch" not in imported(done.stderr)
    assert re.sub(r"^import time:.*\n", "", done.stderr, flags=re.M) == says
    assert ("usage: train.py" in done.stdout) == (argv == ["--help"])


# A superuser reads everything, unless started so.
UNPRIVILEGED = [] if os.getuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search",
                                       "--inh-caps=-dac_override,-dac_read_search"]


@pytest.mark.skipif(bool(UNPRIVILEGED) and not shutil.which("setpriv"), reason="needs setpriv for root")
@pytest.mark.parametrize("closed, mode, argv, names", [
    *(("M/" + name, 0, "--model M --train-data D", "M/" + name)
      for name in ("model.safetensors", "config.json", "tokenizer.json")),
    ("M", 0, "--model M --train-data D", "M/model.safetensors"), ("D", 0, "--model M --train-data D", "D"),
    ("D", 0o600, "--model M --train-data D", "D/a.jsonl"),
    *(("D", 0, f"--model M --train-data D/{name}", f"D/{name}") for name in ("a.jsonl", "*.jsonl"))])
def test_what_may_not_be_read_is_one_line(closed, mode, argv, names, tmp_path):
    shutil.copytree(ROOT / "quickstart" / "model", tmp_path / "M")
    (tmp_path / "D").mkdir()
    (tmp_path / "D" / "a.jsonl").write_text("")
    words = [str(tmp_path / word) if word[0] in "MD" else word for word in argv.split()]
    (tmp_path / closed).chmod(mode)
    done = subprocess.run([*UNPRIVILEGED, sys.executable, "train.py", *words], cwd=ROOT, text=True,
                          capture_output=True, timeout=60)
    (tmp_path / closed).chmod(0o700)
    assert done.returncode == 1
    assert done.stderr.endswith(f"{tmp_path}/{names}: Permission denied\n") and done.stderr.count("\n") == 1


def test_streams_that_are_closed_get_no_file_and_stop_nothing(tmp_path):
    """The shell's `>&-`. The next file that is opened would get its number."""
    flags = f"--max-steps 1 --max-examples 8 --eval-generate 0 --device cpu --output-dir {tmp_path}/run"
    done = subprocess.run(["sh", "-c", f"{sys.executable} train.py {flags} >&- 2>&-"], cwd=ROOT)
    assert done.returncode == 0 and (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_a_reader_that_goes_is_one_line():
    program = ("import sys; from runtime.start import run_program\n"
               "def main(argv):\n    sys.stdin.read()\n    print('x' * 10**6)\nrun_program(main)")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == "error: nobody reads the output any more\n" and process.wait() == 1


@pytest.mark.parametrize("during", ["numpy", "torch"])
@pytest.mark.parametrize("program", [
    "train.py", "-m eval.spans --model quickstart/model --data quickstart/test.jsonl"])
def test_ctrl_c_during_imports_is_one_line(tmp_path, program, during):
    """The module that is being imported presses it, and swallows what an import may swallow."""
    (tmp_path / f"{during}.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    signal.pause()\n"
        "except BaseException:\n    raise ImportError\n")
    done = start(program.split(), PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (130, "error: interrupted before anything was done\n")
    other = start(program.split(), PYTHONPATH=str(tmp_path), RANK="1")
    assert (other.returncode, other.stderr) == (130, "")


def test_who_ignores_ctrl_c_goes_on_ignoring_it_and_cleaning_up_needs_the_exception():
    for before, between, after in ((signal.SIG_IGN, signal.SIG_IGN, signal.SIG_IGN),
                                   (signal.default_int_handler, None, signal.default_int_handler)):
        signal.signal(signal.SIGINT, before)
        answer_interrupts()
        assert between in (None, signal.getsignal(signal.SIGINT))
        assert (signal.getsignal(signal.SIGINT) is before) == (before is signal.SIG_IGN)
        raise_interrupts()
        assert signal.getsignal(signal.SIGINT) is after


def test_on_a_terminal_an_error_breaks_between_words_and_elsewhere_it_is_one_line(capsys, monkeypatch):
    path = "/a/very/long/path" * 6 + "/with-hyphens/and-more"
    message = (f"--config {path}: " + "some words " * 12 + f"{path} \x1b[2J\n"
               "  an item of a list " + "with words " * 9 + "\n"
               "hf download OWNER/NAME --local-dir " + "x" * 70 + "\n    indented code " + "y" * 80)
    shown = message.replace("\x1b", "\\u001b")
    print_error(message)
    assert capsys.readouterr().err == f"error: {shown}\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    print_error(message)
    lines = capsys.readouterr().err.splitlines()
    assert " ".join(line.strip() for line in lines).split() == f"error: {shown}".split(), "nothing is lost"
    assert f"  {path}" in lines and lines[-2:] == shown.splitlines()[-2:], "paths and commands stay whole"
    assert all(len(line) <= 80 for line in lines[:-2] if path not in line)
    item = next(i for i, line in enumerate(lines) if line.startswith("  an item"))
    assert lines[item + 1].startswith("    w") and not lines[1].startswith("   ")


def test_torchrun_ends_with_the_error_of_the_rank():
    """Below its own traceback."""
    done = subprocess.run(command(["--learning-rate", "1"], ranks=2), capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 1
    end = done.stderr.rpartition("Root Cause (first observed failure):")[2]
    assert "traceback : error: --learning-rate 1: here it is --lr 1\n" in end and "rank      : 0 " in end


# ---------------------------------------------------------------- python -m eval


def test_python_m_eval_lists_every_command_in_a_line_of_80_columns():
    listed = start(["-m", "eval"]).stdout
    assert start(["-m", "eval", "-h"]).stdout == listed
    lines = listed.splitlines()
    assert [line.split()[0] for line in lines[2:]] == COMMANDS
    assert max(map(len, lines)) <= 80
    for line, name in zip(lines[2:], COMMANDS):
        doc = ast.get_docstring(ast.parse(Path(ROOT, "eval", f"{name}.py").read_text()))
        assert doc.startswith(line.split(maxsplit=1)[1].removesuffix("...").rstrip())
    done = start(["-m", "eval", "look", "--show", "1"])
    assert (done.returncode, done.stderr) == (1, "error: it is python -m eval.look, with a dot\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_started_as_a_file_says_how_it_is_started(name):
    done = start([f"eval/{name}.py", "--model", "x"])
    assert done.returncode == 1
    assert done.stderr == f"error: start it as a module, in the folder above: python -m eval.{name}\n"
