"""For tests that run programs in eval/sandbox.py, which needs bwrap: many containers deny it namespaces."""
import shutil
import subprocess

import pytest

refused = "bwrap is not installed (apt-get install bubblewrap)"
if shutil.which("bwrap"):
    # bwrap alone: a fault in eval/sandbox.py must fail its tests, not skip them
    refused = subprocess.run(["bwrap", "--unshare-all", "--unshare-user", "--ro-bind", "/", "/", "true"],
                             capture_output=True, text=True).stderr
isolated = pytest.mark.skipif(bool(refused), reason=refused or "bwrap runs")
