import os
import sys
from datetime import datetime
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests need no network, and must not try
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers_for_tests import DATE  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture
def today(monkeypatch):
    """transformers' templates are rendered on DATE."""
    from transformers.utils import chat_template_utils

    class Frozen(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(DATE)

    monkeypatch.setattr(chat_template_utils, "datetime", Frozen)
