"""What README and the tour tell a reader to type: it is typed here, with fewer steps."""
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import train
from eval import study
from tiny import ROOT, run_here

# Over the documented flags, so that a test takes seconds.
QUICK = ["--max-steps", "2", "--eval-generate", "2", "--dtype", "fp32"]


def blocks(page: str) -> list[str]:
    """The fenced blocks of a page, with continued lines joined."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block.replace("\\\n", " ") for block in re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)]


def commands(block: str) -> list[list[str]]:
    """The words of a block's lines, without comments; of those with &&, the last command."""
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [words for words in lines if words]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """An empty folder with the repository's files that the commands name, as the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "quickstart").symlink_to(ROOT / "quickstart")
    return tmp_path


def type_in(words: list[str]) -> None:
    """Run what stands behind `python` in this process."""
    assert words[0] == "python"
    if words[1] == "train.py":
        assert run_here([*words[2:], *QUICK, "--cache-dir", "cache"]) == 0
        return
    assert words[1] == "-m"
    main = importlib.import_module(words[2]).main
    if words[2] == "eval.study":    # minutes: its flags are read, and its contenders
        config = train.parse_args(words[3:], study.StudyConfig)
        assert len(study.parse_contenders(config)) > 1 and study.parse_lrs(config)
        study.check(config, study.parse_lrs(config))
        return
    main([*words[3:], *(["--cache-dir", "cache"] if words[2] in ("eval.look", "eval.compare") else [])])


def test_readmes_first_commands_are_those_that_ci_types():
    script = (ROOT / ".ci" / "run").read_text()
    install, run = blocks("README.md")[0].splitlines()
    assert run == "python train.py" and "\npython train.py " in script
    assert install.endswith("pip install -r requirements.txt")
    assert "pip install -q -r requirements.txt" in script


def test_readmes_comparison_gives_the_page_of_both_runs(clone, capsys):
    type_in(commands(blocks("README.md")[0])[-1])
    [block] = [block for block in blocks("README.md") if "eval.compare runs/quickstart" in block]
    for words in commands(block):
        if words[0] == "python":
            type_in(words)
    page = (clone / commands(block)[-1][-1]).read_text()
    assert "2 runs compared" in page and "quickstart-it" in page and "quickstart-im" in page
    assert "B - A" in capsys.readouterr().out


def test_the_tour_can_be_typed(clone, capsys):
    typed = []
    for block in blocks("docs/tour.md"):
        if block.startswith("python3 -m venv"):
            continue
        if block.startswith(("cat ", "head ")):
            subprocess.run(["bash", "-ec", block], check=True, capture_output=True)
            continue
        for words in commands(block):
            type_in(words)
            typed.append(words[1] if words[1] != "-m" else words[2])
    assert typed == ["eval.look", "train.py", "train.py", "eval.compare", "eval.study", "eval.generate"]
    assert (clone / "page.html").is_file() and (clone / "runs/im/final/README.md").is_file()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """What a link's #part may be, as GitHub makes it of a heading."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_page_is_in_the_index_and_its_links_lead_somewhere(page):
    if page.parent.name == "docs" and page.name != "README.md":
        assert f"]({page.name})" in (ROOT / "docs" / "README.md").read_text()
    for name, anchor in re.findall(r"\]\((?!https:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        target = page.parent / name if name else page
        assert target.exists() and (not anchor or anchor in anchors(target)), f"{name}#{anchor}"
