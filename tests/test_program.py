"""Every program of the repository in its first seconds, as a user sees them: --help and wrong flags are
answered before PyTorch is imported, and Ctrl-C is one line at any moment."""
import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.start import run_program
from tiny import ROOT

# Without those that only tests start.
FILES = [file.relative_to(ROOT) for file in sorted(ROOT.rglob("*.py"))
         if "tests" not in file.relative_to(ROOT).parts
         and any(line.startswith('if __name__ == "__main__":') for line in file.read_text().splitlines())]


def words_of(file) -> str:
    """What follows "python": modules of packages are started as such."""
    module = ".".join(file.with_suffix("").parts).removesuffix(".__main__")
    return f"-m {module}" if (ROOT / file).with_name("__init__.py").exists() else str(file)


PROGRAMS = {words_of(file): file for file in FILES}

# Python imports this before the program. Importing torch fails. MOMENT says when Ctrl-C is pressed: at the
# first "import" after the program has begun to answer it, or at the first "call" of a function of its own.
SITE = """
import os, signal, sys

def press():
    sys.meta_path.remove(Finder), sys.setprofile(None)
    os.kill(os.getpid(), signal.SIGINT)

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise RuntimeError("torch is imported")
        started = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        if started and os.environ.get("MOMENT") == "import":
            press()

def watch(frame, event, _):
    of_program = frame.f_globals.get("__name__") == "__main__"
    if event == "call" and of_program and frame.f_code.co_name != "<module>":
        press()

sys.meta_path.insert(0, Finder)
sys.modules |= dict.fromkeys(filter(None, [os.environ.get("MISSING")]))
if os.environ.get("MOMENT") == "call":
    sys.setprofile(watch)
"""


# Runs the programs of a list, each in a forked process, which saves most of their 0.4 s: what takes long
# before PyTorch is imported already. Prints their exit statuses; what they print is in FOLDER.
EACH = """
import json, os, runpy, sys
import jinja2, numpy

folder, statuses = sys.argv[2], []
for number, (program, *words) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        for stream, descriptor in ("out", 1), ("err", 2):
            os.dup2(os.open(f"{folder}/{number}.{stream}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = [program, *words[program == "-m":]]
        if program == "-m":
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(program))
            runpy.run_path(program, run_name="__main__")
        sys.exit()
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(SITE)
    return folder


@pytest.fixture(scope="module")
def answers(site) -> dict[tuple[str, str], tuple[int, str, str]]:
    """{(program, flag): (exit status, output, errors)} of --help and of a wrong flag."""
    asked = [(program, words) for program in PROGRAMS for words in ("--help", "--frobnicate 1")]
    argv = [[*program.split(), *words.split()] for program, words in asked]
    done = subprocess.run([sys.executable, "-c", EACH, json.dumps(argv), str(site)], cwd=ROOT, check=True,
                          env={**os.environ, "PYTHONPATH": str(site)}, stdout=subprocess.PIPE)
    return {each: (status, *((site / f"{i}.{stream}").read_text() for stream in ("out", "err")))
            for i, (each, status) in enumerate(zip(asked, json.loads(done.stdout)))}


@pytest.fixture(scope="module")
def start(site):
    def start(argv: list[str], moment: str = "", missing: str = "") -> subprocess.CompletedProcess:
        """As from a terminal: a test in the background ignores Ctrl-C, and its children would too."""
        return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, timeout=60,
                              env={**os.environ, "PYTHONPATH": str(site), "MOMENT": moment,
                                   "MISSING": missing},
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return start


def test_programs_of_every_folder_are_found():
    assert {"train.py", "-m eval", "-m eval.spans", "-m bench.step", "-m studies.report",
            "quickstart/make.py"} <= PROGRAMS.keys()


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_a_wrong_flag_are_answered_before_pytorch_is_imported(program, answers):
    status, printed, errors = answers[program, "--help"]
    assert (status, errors) == (0, "") and "--help" in printed
    status, _, errors = answers[program, "--frobnicate 1"]
    assert status == 1 and errors.startswith("error: --frobnicate")
    assert "Traceback" not in errors and "torch is imported" not in errors


STUDY = ["eval.study", "--model", "quickstart/model", "--train-data", "quickstart/train.jsonl", "--eval-data",
         "quickstart/test.jsonl"]
RUN = ["--model", "quickstart/model"]
NOT_WRITABLE = "/proc is not a writable folder (No such file or directory); give another"


@pytest.mark.parametrize("argv, says", [
    ([*STUDY, "--validation-data", "nowhere.csv"], "--validation-data nowhere.csv: no such file or folder"),
    ([*STUDY, "--validation-data", "nowhere/*.jsonl"], "--validation-data nowhere/*.jsonl: no file matches"),
    ([*STUDY, "--template", "nowhere.jinja"], "--template nowhere.jinja: no such file"),
    (["eval.look", *RUN, "--train-data", "quickstart/train.jsonl", "--template", "qwen"],
     "--template qwen: neither auto, nor one of alpaca, chatml, llama2, llama3, plain, tulu, nor a .jinja "
     "file"),
    (["eval.generate", *RUN, "--prompt", "Hi", "--template", ""],
     "--template : neither auto, nor one of alpaca, chatml, llama2, llama3, plain, tulu, nor a .jinja file"),
    (["eval.generate", *RUN, "--prompt", "Hi", "--date", "2024-13-01"],
     "--date 2024-13-01: write it as YYYY-MM-DD"),
    ([*STUDY, "--output-dir", "README.md"],
     f"--output-dir README.md: {ROOT}/README.md is not a writable folder (Not a directory); give another"),
    ([*STUDY, "--output-dir", "docs"],
     "--output-dir docs: is not empty and is not a study's folder; give another"),
    (["eval.study", "--from", "nowhere.jsonl"], "--from nowhere.jsonl: no such file"),
    ([*STUDY, "--losses", "rl"],
     "--losses rl: must be one of it, im, lm, or such a name with :token, :example, :span"),
    (["eval.spans", "--model", "/nowhere", "--data", "x"],
     "--model /nowhere: no such folder, nor a hub id (owner/name)"),
    (["eval.spans", *RUN, "--data", "x", "--json", "/proc/x"], f"--json /proc/x: {NOT_WRITABLE}"),
    (["eval.harness", *RUN, "--tasks", "x", "--json", "/proc/x"], f"--json /proc/x: {NOT_WRITABLE}"),
    (["eval.harness", *RUN, "--tasks", "x", "--output_path", "/proc/x"],
     f"--output_path /proc/x: {NOT_WRITABLE}"),
    (["eval.spans", *RUN, "--data", "quickstart/test.jsonl", "nowhere/x/"],
     "--data nowhere/x/: no such file or folder"),
    (["eval.memorization", *RUN, "--data", "nowhere.jsonl"], "--data nowhere.jsonl: no such file or folder"),
    (["eval.open_ended", "mt-bench", *RUN, "--questions", "nowhere", "--output", "x.jsonl"],
     "--questions nowhere: no such file"),
    (["eval.compare", "runs/a", "--prompts", "nowhere.csv"], "--prompts nowhere.csv: no such file or folder"),
    (["eval.compare", "runs/a", "--results", "nowhere.json"], "--results nowhere.json: no such file")])
def test_what_cannot_be_used_is_named_before_pytorch_is_imported(argv, says, start):
    done = start(["-m", *argv])
    assert (done.returncode, done.stderr) == (1, f"error: {says}\n")


@pytest.mark.parametrize("moment", ["import", "call"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_is_one_line(program, moment, start):
    done = start(program.split(), moment)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr.startswith("error: interrupted") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_ends_in_what_answers_ctrl_c_and_errors(program):
    """Later moments: the last statement of each file runs main() in one of the functions that do so."""
    last = ast.unparse(ast.parse((ROOT / PROGRAMS[program]).read_text()).body[-1])
    assert last in ("if __name__ == '__main__':\n    run(main)",
                    "if __name__ == '__main__':\n    run_program(main)",
                    "if __name__ == '__main__':\n    sys.exit(run(sys.argv[1:]))")


@pytest.mark.parametrize("error, status, line", [
    (KeyboardInterrupt(), 130, "error: interrupted\n"),
    (ValueError("--lr x: must be a number"), 1, "error: --lr x: must be a number\n"), (None, 3, "")])
def test_the_end_of_a_program(error, status, line, capsys, monkeypatch):
    def main(argv: list[str]) -> int:
        if error:
            raise error
        return 3

    for rank, shown in (("0", line), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            run_program(main)
        assert ended.value.code == status and capsys.readouterr().err == shown


@pytest.mark.parametrize("argv, package", [
    (["eval.compare", "runs/a"], "matplotlib"), (["eval.harness", *RUN, "--tasks", "mmlu"], "lm_eval"),
    (["eval.memorization", *RUN, "--data", "quickstart/test.jsonl"], "sacrebleu"), (STUDY, "scipy"),
    ([*STUDY, "--tasks", "mmlu"], "lm_eval"),
    (["eval.study", "--from", "quickstart/test.jsonl"], "matplotlib")])
def test_a_missing_package_is_named_before_pytorch_is_imported(argv, package, start):
    done = start(["-m", *argv], missing=package)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {package} is not installed, and ")
    assert done.stderr.endswith("needs it: pip install -r requirements-eval.txt\n")
