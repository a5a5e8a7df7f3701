"""For tests that run programs in eval/sandbox.py: some systems, containers among them, allow no user
namespaces, and the sandbox then rightly refuses to run anything."""
import pytest

from eval.sandbox import run_python

try:
    run_python("pass", 10, 512)
    refused = ""
except RuntimeError as error:
    refused = str(error)
isolated = pytest.mark.skipif(bool(refused), reason=f"the sandbox refuses to run: {refused}")
