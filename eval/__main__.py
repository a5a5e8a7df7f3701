"""python -m eval: the evaluation commands, one line each."""
import ast
import textwrap
from pathlib import Path

from runtime.start import run_program


def commands() -> dict[str, str]:
    """The name of each module of this folder that is a program, and the first sentence of its docstring."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
            found[file.stem] = ast.get_docstring(tree).partition("\n\n")[0].replace("\n", " ")
    return found


def main(argv: list[str]) -> None:
    if argv and argv[0] in commands():
        raise ValueError(f"it is python -m eval.{argv[0]}, with a dot")
    if argv and argv[0] not in ("-h", "--help"):
        raise ValueError(f"{argv[0]}: no such command; python -m eval lists them")
    print("python -m eval.COMMAND --help lists a command's flags. The commands:\n")
    for name, purpose in commands().items():
        print(f"{name:<14}{textwrap.shorten(purpose, 65, placeholder=' ...')}")


if __name__ == "__main__":
    run_program(main)
