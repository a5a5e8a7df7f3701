"""train.py whose ranks are killed (SIGKILL) once in each of several places, by themselves.

    torchrun --max-restarts 5 --nproc-per-node 2 tests/killed_ranks.py MARKS FLAG ...

MARKS: a folder; a file there for each place where a rank is still to be killed.
"""
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from runtime import checkpoint, distributed  # noqa: E402

MARKS = Path(sys.argv[1])


def kill_once(place: str, module: object, name: str, rank: int, call: int = 1) -> None:
    """Rank `rank` is killed when it calls module.name for the call-th time, if it is still to be."""
    original, calls = getattr(module, name), []

    def killed(*args: object, **more: object) -> object:
        calls.append(name)
        if int(os.environ["RANK"]) == rank and len(calls) == call and (MARKS / place).exists():
            (MARKS / place).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **more)
    setattr(module, name, killed)


kill_once("token cache", data, "tokenize_batch", 0)
kill_once("forward", model.Llama, "forward", 1, call=3)
kill_once("backward", torch.Tensor, "backward", 0, call=3)
kill_once("all-reduce", distributed.dist, "all_reduce", 1, call=4)
kill_once("checkpoint", checkpoint, "write_tensors", 0)
kill_once("final", train, "write_tokenizer", 0)
kill_once("the end", train, "finish", 1)
if __name__ == "__main__":
    sys.exit(train.run(sys.argv[2:]))
