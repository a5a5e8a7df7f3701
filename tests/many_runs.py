"""Several runs of train.py in the same ranks, one after another: starting the ranks takes longer than a run.

    torchrun --nproc-per-node 2 tests/many_runs.py RUNS.json       [[flag, ...], ...]; tiny.run_many() does it

A run of several ranks ends by os._exit(), which is kept from ending the process. Each rank has a folder of
its own to work in, RUNS.json.RANK, for relative paths.
"""
import contextlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from runtime import distributed, weights  # noqa: E402

# Bytes, so that tiny tensors too are read, sent and written in several pieces, and added up in two buckets.
weights.PIECE = dist._DEFAULT_FIRST_BUCKET_BYTES = 2048
# With --compile the traced operations run as they are: what is tested is that they can be traced.
torch.compile = partial(torch.compile, backend="eager")


class Ended(BaseException):
    """os._exit() was called."""


def end(status: int) -> None:
    raise Ended(status)


def main(file: str) -> None:
    runs, own = json.loads(Path(file).read_text()), Path(f"{file}.{os.environ['RANK']}")
    own.mkdir(exist_ok=True)
    os.chdir(own)
    for argv in runs:
        os._exit, exit_now = end, os._exit
        try:
            with contextlib.suppress(Ended):
                train.main(argv)
        finally:
            os._exit = exit_now
    dist.barrier()


try:
    main(sys.argv[1])
    status = 0
except Exception as error:
    distributed.report_error(error)
    status = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
