"""For tests that run programs in eval/sandbox.py: it refuses to run anything without bwrap, or where user
namespaces are denied, as in many containers."""
import pytest

from eval.sandbox import run_python

try:
    run_python([], 10, 512)
    refused = ""
except ValueError as error:
    refused = str(error)
isolated = pytest.mark.skipif(bool(refused), reason=refused)
