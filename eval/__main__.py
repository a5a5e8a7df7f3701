"""python -m eval: the evaluation commands, one line each."""
import ast
import sys
import textwrap
from pathlib import Path


def commands() -> dict[str, str]:
    """The name of each module of this folder that is a program, and the first sentence of its docstring."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
            found[file.stem] = ast.get_docstring(tree).partition("\n\n")[0].replace("\n", " ")
    return found


def main(argv: list[str]) -> int:
    if argv and argv[0] in commands():
        print(f"error: it is python -m eval.{argv[0]}, with a dot", file=sys.stderr)
        return 1
    print("python -m eval.COMMAND --help lists a command's flags. The commands:\n")
    for name, purpose in commands().items():
        print(f"{name:<14}{textwrap.shorten(purpose, 65, placeholder=' ...')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
