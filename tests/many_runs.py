"""Several runs of train.py in the same ranks, one after the other: starting the ranks takes longer than a run.

    torchrun --nproc-per-node 2 tests/many_runs.py RUNS.json        [[flag, ...], ...]; tiny.run_many() does it

A run ends by os._exit(), which is kept from ending the process; its status is printed by rank 0. A run whose
flags begin with "--stop-after N" is sent SIGTERM in its step N.
"""
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402


class Ended(BaseException):
    """os._exit() was called."""


def end(status: int) -> None:
    raise Ended(status)


def stop_in_step(steps: int) -> None:
    """Every step clips the gradient once; what is asked for there the ranks agree on in the next step."""
    original, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)
    torch.nn.utils.clip_grad_norm_ = clip


def main(file: str) -> None:
    exit_now, clip, meet = os._exit, torch.nn.utils.clip_grad_norm_, dist.init_process_group
    for argv in json.loads(Path(file).read_text()):
        torch.nn.utils.clip_grad_norm_ = clip
        if argv[0] == "--stop-after":
            stop_in_step(int(argv[1]))
            argv = argv[2:]
        os._exit = end
        dist.init_process_group = (lambda *a, **k: None) if dist.is_initialized() else meet
        try:
            train.main(argv)
        except Ended as ended:
            if train.is_main():
                print(f"ended with {ended}", flush=True)
        os._exit = exit_now
    dist.barrier()
    os._exit(0)


try:
    main(sys.argv[1])
except Exception as error:
    train.report_error(error)
    os._exit(1)
