"""Who imports whom. Arrows fall one way: eval, bench, studies and quickstart -> train -> data, loss, model ->
records -> chat; all of them -> kernels and runtime; and nothing but tests imports tests."""
import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny import ROOT

CORE = {"chat", "data", "loss", "model", "records", "train"}
PACKAGES = {"bench", "eval", "kernels", "quickstart", "runtime", "studies", "tests"}
# What each part may import, apart from itself.
MAY_IMPORT = {
    "kernels": set(),
    "runtime": set(),
    "chat": {"runtime"},
    "records": {"chat", "runtime"},
    "data": {"chat", "records", "runtime"},
    "model": {"kernels", "runtime"},
    "loss": {"chat", "data", "kernels", "runtime"},
    "train": {"chat", "data", "eval", "kernels", "loss", "model", "records", "runtime"},
    "eval": CORE | {"kernels", "runtime"},
    "bench": CORE | {"eval", "kernels", "runtime"},
    "quickstart": CORE | {"eval", "kernels", "runtime"},
    "studies": CORE | {"eval", "kernels", "runtime"},
    "tests": CORE | PACKAGES,
}


def files() -> dict[str, Path]:
    """Every module of the repository, by the name it is imported by. Those of tests/ lie on sys.path
    themselves; here they are tests.NAME too."""
    paths = [*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
            for path in paths}


def imported(node: ast.AST) -> Iterator[str]:
    """Full names of what a tree imports, in functions too; not what is only for type checkers."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "a relative import hides which part it is from"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.orelse:
            yield from imported(child)
    else:
        for child in ast.iter_child_nodes(node):
            yield from imported(child)


def arrows() -> dict[str, set[str]]:
    """{module: the modules of the repository that it imports}."""
    modules = files()
    out = {}
    for module, path in modules.items():
        out[module] = set()
        for name in imported(ast.parse(path.read_text())):
            # "runtime.files.lock" is a name in runtime.files, "tiny.setup" one in tests.tiny.
            owners = [name, name.rpartition(".")[0], f"tests.{name}", f"tests.{name.rpartition('.')[0]}"]
            owner = next((owner for owner in owners if owner in modules), None)
            if owner:
                out[module].add(owner)
            else:
                assert name.partition(".")[0] not in CORE | PACKAGES, f"{path}: {name} does not exist"
    return out


ARROWS = arrows()


def reached(module: str) -> set[str]:
    """Every module that is imported with this one."""
    found, waiting = set(), [module]
    while waiting:
        for other in ARROWS[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found


def test_the_arrows_are_read_at_all():
    assert {"chat", "runtime.files", "runtime.tokenizer"} <= ARROWS["data"] | ARROWS["chat"]
    assert {"tests.tiny", "train"} <= ARROWS["tests.test_train"]
    assert "chat" not in ARROWS["runtime.tokenizer"], "for type checkers only"
    assert "eval.engine" in ARROWS["tests.test_train"], "imported in a function"


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_lies_below_it(part):
    own = [module for module in ARROWS if module.partition(".")[0] == part]
    assert own
    for module in own:
        others = {other.partition(".")[0] for other in ARROWS[module]} - {part}
        assert others <= MAY_IMPORT[part], f"{module} imports {sorted(others - MAY_IMPORT[part])}"


@pytest.mark.parametrize("module", ["eval.estimate", "eval.generate", "eval.spans"])
def test_what_train_takes_from_eval_knows_nothing_of_train(module):
    assert module in ARROWS["train"] and "train" not in reached(module)


def test_train_takes_nothing_else_from_eval():
    taken = {module for module in ARROWS["train"] if module.startswith("eval")}
    assert taken == {"eval.estimate", "eval.generate", "eval.spans"}


def test_no_module_imports_itself_over_others():
    assert [module for module in ARROWS if module in reached(module)] == []


def test_the_root_holds_the_six_files_of_the_core():
    assert {path.stem for path in ROOT.glob("*.py")} == CORE
