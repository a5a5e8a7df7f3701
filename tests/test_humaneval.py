"""pass@k, programs out of answers, and the command from problems to a score, with programs run in the
sandbox."""
import itertools
import json

import pytest

from eval import humaneval
from eval.engine import Engine
from eval.humaneval import pass_at_k, passes, program_of, read_problems
from isolation import isolated
from tiny import setup

PROBLEM = {"task_id": "t/0", "entry_point": "double",
           "prompt": 'import math\n\n\ndef double(x):\n    """Twice x."""\n',
           "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1.5) == -3\n"}


@pytest.mark.parametrize("n, right, k", [(4, 1, 2), (5, 0, 3), (5, 5, 1), (6, 2, 3), (3, 1, 3)])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_sample(n, right, k):
    draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("k", [-1, 0, 3])
def test_k_is_from_1_to_the_number_of_samples(k):
    with pytest.raises(ValueError, match=f"--k {k}: must be from 1 to .* --samples 2"):
        pass_at_k(2, 1, k)


RIGHT = "    return 2 * x\n"
ANSWERS = {     # name: (answer, chat, whether it passes)
    "function in a block": (
        "Sure!\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles.", True, True),
    "space around the language": (
        "```python \ndef double(x):\n    return 2 * x\n```", True, True),
    "lines that end as in Windows": (
        "``` python3\r\ndef double(x):\r\n    return 2 * x\r\n```\r\n", True, True),
    "function right behind the fence": ("```def double(x):\n    return 2 * x```", True, True),
    "block that is not closed": ("```python\ndef double(x):\n    return 2 * x", True, True),
    "needs the problem's import": ("```\ndef double(x):\n    return math.prod([2, x])\n```", True, True),
    "second block is it": (
        "```python\nx = 1\n```\n```python\ndef double(x):\n    return x + x\n```", True, True),
    "block of another function with such a name": (
        "```\ndef double_all(x):\n    return 0\n```\n```\ndef double(x):\n    return 2 * x\n```", True, True),
    "only the body": (f"```python\n{RIGHT}```", True, True),
    "no block": ("def double(x):\n    return 2 * x\n", True, True),
    "wrong": ("```python\ndef double(x):\n    return x\n```", True, False),
    "prose": ("I cannot.", True, False),
    "text goes on": ("\n" + RIGHT, False, True),
    "text goes on with another function": (
        "\n" + RIGHT + "\n\ndef other():\n    return oops(\n", False, True),
}


@isolated
@pytest.mark.parametrize("name", ANSWERS)
def test_programs_out_of_answers(name):
    answer, chat, expected = ANSWERS[name]
    assert passes(PROBLEM, program_of(PROBLEM, answer, chat), 10, 512)[0] == expected


@isolated
@pytest.mark.parametrize("body", ["import sys; sys.exit(0)", "import os; os._exit(0)", "while True: pass",
                                  "import os; os.kill(0, 9)", "print('passed'); raise SystemExit",
                                  "import os; os._exit(113)", "import os; os.close(1)"])
def test_leaving_early_or_never_is_no_success(body):
    passed, why = passes(PROBLEM, PROBLEM["prompt"] + f"    {body}\n", 1, 512)
    assert not passed and why


@isolated
def test_the_least_memory_is_enough_for_a_right_program():
    assert passes(PROBLEM, PROBLEM["prompt"] + RIGHT, 10, 64)[0]


@pytest.mark.parametrize("line", ["{", "{}", "[]"])
def test_a_wrong_problem_is_named_by_file_and_line(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(PROBLEM) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"p\.jsonl:2: (not a problem|is not JSON)"):
        read_problems(str(file), None)


@pytest.mark.parametrize("changes", [{"prompt": None}, {"test": 5}, {"entry_point": "triple"}])
def test_a_problem_that_no_program_could_solve_is_named(tmp_path, changes):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({**PROBLEM, **changes}) + "\n")
    says = r"p\.jsonl:(1: not a problem .* type str| problem t/0: the prompt must)"
    with pytest.raises(ValueError, match=says):
        read_problems(str(file), None)


@pytest.mark.parametrize("flag, value, says", [
    ("seconds", "nan", "nan: must be a number"), ("seconds", "inf", "inf: must be a number"),
    ("seconds", "-1", "-1: must be a number from 1 to 86,400"), ("seconds", "1e300", "1e300: must be a num"),
    ("megabytes", "0", "0: must be a whole number from 64 to 1,048,576"),
    ("megabytes", str(2**64), f"{2**64}: must be"), ("top-p", "0", "0: must be a number from 1e-06 to 1"),
    ("temperature", "nan", "nan: must be a number"), ("seed", "-1", "-1: must be a whole number, 0 or more"),
    ("seed", str(2**40), f"{2**40}: must be a whole number from 0 to 2,147,483,648"),
    ("workers", "0", "0: must be a whole number from 1"), ("workers", "9999", "9999: must be a whole number"),
])
def test_limits_that_would_not_hold_are_refused(tmp_path, flag, value, says):
    with pytest.raises(ValueError, match=f"--{flag} {says}"):
        humaneval.main([*arguments(tmp_path, tmp_path / "out.jsonl", "chat"), f"--{flag}={value}"])


def test_a_result_without_execution_is_refused_rather_than_left_out(tmp_path):
    with pytest.raises(ValueError, match="result.json: without --execute there is no result"):
        humaneval.main([*arguments(tmp_path, tmp_path / "out.jsonl", "chat"),
                        "--json", str(tmp_path / "result.json")])


def test_without_a_sandbox_nothing_is_generated(tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apt-get install bubblewrap"):
        humaneval.main([*arguments(tmp_path, output, "chat"), "--execute"])
    assert not output.exists()


def arguments(folder, output, format):
    """Of a run on three problems, two samples each. The model has no chat template of its own."""
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps({**PROBLEM, "task_id": f"t/{i}"}) + "\n" for i in range(3)))
    template = ["--template", "llama3"] if format == "chat" else []
    return ["--model", str(folder / "model"), *template, "--data", str(file), "--output", str(output),
            "--max-new-tokens", "4", "--samples", "2", "--temperature", "1", "--format", format,
            "--k", "1", "2", "--dtype", "fp32", "--device", "cpu"]


@pytest.mark.parametrize("format", ["chat", "text"])
def test_a_run_that_is_interrupted_makes_only_what_is_missing(tmp_path, monkeypatch, format):
    folder, whole, cut = setup(tmp_path), tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    humaneval.main(arguments(folder, whole, format))
    original, made = Engine.answers, []

    def interrupted(self, prompts, *given):
        made.append(len(prompts))
        for number, answer in enumerate(original(self, prompts, *given)):
            if number == 4 and len(made) == 1:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(Engine, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        humaneval.main(arguments(folder, cut, format))
    assert len(cut.read_text().splitlines()) == 4
    humaneval.main(arguments(folder, cut, format))
    assert made == [6, 2] and cut.read_bytes() == whole.read_bytes()
    assert len({line["output"] for line in map(json.loads, cut.read_text().splitlines())}) > 3
    argv = arguments(folder, cut, format)
    (tmp_path / "p.jsonl").write_text((tmp_path / "p.jsonl").read_text().replace("Twice", "Two times"))
    with pytest.raises(ValueError, match="contents of the data was"):
        humaneval.main(argv)


@isolated
@pytest.mark.parametrize("format", ["chat", "text"])
def test_from_problems_to_a_score_and_on_from_a_file(tmp_path, monkeypatch, format, capsys):
    output = tmp_path / "out.jsonl"
    argv = arguments(setup(tmp_path), output, format)
    humaneval.main(argv)
    assert "none was run" in " ".join(capsys.readouterr().out.split())
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["index"], line["sample"]) for line in lines] == [(i, s) for i in range(3) for s in range(2)]
    # answers that pass where we say so: the command must find them in the file, not write them anew
    for line, answer in zip(lines, (RIGHT, "", RIGHT, RIGHT, "", "")):
        line["output"] = ("\n" + answer if format == "text" else
                          f"```\ndef double(x):\n{answer or '    pass'}```")
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    humaneval.main([*argv, "--execute", "--seconds", "5", "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["pass@1"] == pytest.approx((0.5 + 1 + 0) / 3) and result["pass@2"] == pytest.approx(2 / 3)
    # Three draws, 0.5, 1 and 0, deviate from their mean by 0.5; two of 1 and one of 0 by the root of a third.
    assert result["pass@1_standard_error"] == pytest.approx(0.5 / 3**0.5)
    assert result["pass@2_standard_error"] == pytest.approx(1 / 3)
    assert [json.loads(line)["passed"] for line in output.read_text().splitlines()] == [
        True, False, True, True, False, False]
