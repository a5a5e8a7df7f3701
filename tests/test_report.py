"""What a run says: nothing is wider than a terminal of 79 columns, and no number is cut off."""
import ast
import fcntl
import os
import re
import select
import struct
import sys
import termios

import pytest

from runtime import report
from runtime.foreign import printable
from runtime.report import Progress, print_change
from tiny import ROOT, arguments, make_records, run_here, setup


def test_a_run_whose_reader_is_gone_goes_on(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        report.say("step 1")
        report.say("step 2")


def test_a_log_on_a_full_disk_is_a_warning_and_the_run_goes_on(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stdout = open("/dev/full", "w")
        patch.setattr(sys, "stdout", stdout)
        report.say("step 1")
        report.say("step 2")
        stdout.close()
    assert capsys.readouterr().err == ("warning: standard output: No space left on device; nothing more is "
                                       "printed there\n")


def record(step: int, value: float) -> dict:
    """A line of metrics.jsonl as far as it is shown."""
    return {"step": step, "loss": value, "nll_completion": value, "nll_instruction": value,
            "tokens_per_second": 123_456.7}


@pytest.mark.parametrize("columns", [79, 80, 200])
@pytest.mark.parametrize("total, value, shown, least", [(152, 1.23423, "1.234", 9),
                                                        (100_000, 12.3423, "12.34", 4)])
def test_a_terminal_shows_a_bar_and_whole_numbers(monkeypatch, columns, total, value, shown, least):
    main, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    monkeypatch.setattr(report, "shows_progress", lambda: True)
    with open(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        progress = Progress(total // 2, total)
        # So that ten hours are left.
        progress.bar.start_t -= 36_000 / (total // 2)
        progress.update(record(total // 2 + 1, value), line=True)
        progress.close()
        written = b""
        while select.select([main], [], [], 0.3)[0]:
            written += os.read(main, 100_000)
    os.close(main)
    frames = [frame for frame in re.split(r"[\r\n]+", written.decode()) if frame.strip()]
    last = frames[-1]
    assert max(map(len, frames)) <= columns
    assert last.startswith(f"{total // 2 + 1}/{total} ")
    assert last.endswith(f" left, loss {shown} compl {shown} instr {shown} 123k tok/s")
    bar = re.match(r"\d+/\d+ (\S+ *) \d+", last).group(1)
    assert len(bar) >= least and len(bar.split()[0]) == pytest.approx(len(bar) / 2, abs=2)


@pytest.mark.parametrize("value, shown", [(1.23423, "1.234"), (12.3423, "12.34"), (123_456.0, "1e+05"),
                                          (float("nan"), "nan")])
def test_a_log_file_has_lines_of_79_columns(capsys, value, shown):
    progress = Progress(0, 100_000)
    progress.update(record(100_000, value), line=True)
    [line] = capsys.readouterr().out.splitlines()
    assert line == (f"step 100000/100000: loss {shown}, completion {shown}, instruction {shown}, 123k tok/s")
    assert len(line) <= 79


def evaluation(step: int, *names: str) -> dict:
    return {"step": step, "contents": {name: name for name in names},
            "data": {name: {"completion": {"nll_token_mean": 1.5, "tokens": 12_345_678}} for name in names}}


def test_the_table_tells_long_names_apart_by_their_ends(capsys):
    names = [f"{'deep/' * 20}{name}/test.jsonl" for name in ("near", "clear")]
    print_change(evaluation(0, *names), evaluation(9, *names))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 79
    assert [line.split()[0][-15:] for line in lines[-2:]] == ["near/test.jsonl", "lear/test.jsonl"]


def test_no_line_of_a_run_is_wider_than_a_terminal(tmp_path, capsys):
    setup(tmp_path)
    held_out = [make_records(tmp_path / f"{'long-name-' * 8}{i}.jsonl", 3, seed=i) for i in range(2)]
    run_here(arguments(tmp_path, "run", eval_data=held_out, eval_generate=3, max_steps=3))
    lines = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path) not in line]
    assert len(lines) > 20
    assert [line for line in lines if len(line) > 79] == []
    assert any(line.startswith("step 3: ...") for line in lines)


def test_what_commands_a_terminal_is_shown_in_one_way():
    """A file's name in a table as in any text, but in one line."""
    name = "a\x1b[2J\u202e\x9b.jsonl"
    assert report.ending(name, 99) == printable(name)
    assert report.ending("a\nb\tc", 99) == "a b c" and report.ending("x" * 9 + "\x07", 9) == "...\\u0007"
    assert report.ending("a\xa0b 日本", 99) == "a\xa0b 日本"


@pytest.mark.parametrize("folder", ["bench", "eval", "quickstart", "studies"])
def test_how_wide_lines_are_stands_in_one_place(folder):
    for file in sorted((ROOT / folder).glob("*.py")):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
                 and ast.unparse(node.func) in ("textwrap.fill", "textwrap.wrap")]
        assert not [call for call in calls if ast.unparse(call.args[1]).isdecimal()]
        assert "\nWIDTH = " not in file.read_text()
