import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests need no network, and must not try
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """train.main() replaces the handlers of the process that runs it, also in fixtures that several tests
    share. Every test starts with those of the beginning."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
