"""The processes of a run: who this one is, how they meet, what they tell each other, who reports an error.

One process without torchrun is rank 0 of 1, for all functions here.
"""
import contextlib
import errno
import os
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from machine import share_threads


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    return rank() == 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


# ---------------------------------------------------------------- meeting


def join_ranks(device: str) -> torch.device:
    """The device of this rank, which has its share of the machine's cores then; under torchrun all ranks
    meet. device: auto, cpu or cuda. ValueError if there is no CUDA."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device; give cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    share_threads()
    if cuda:
        torch.cuda.set_device(local_rank())
    if world_size() > 1 and not dist.is_initialized():
        meet("nccl" if cuda else "gloo")
    return torch.device("cuda", local_rank()) if cuda else torch.device("cpu")


def meet(backend: str, patience: timedelta = timedelta(minutes=10)) -> None:
    """Start torch.distributed among torchrun's ranks. ValueError if they do not all come within `patience`.

    Ranks that torchrun starts again get the store of those before them, and would find the addresses of dead
    processes in it (PyTorch issue 135712; how often torchrun restarted, a machine knows only for itself). So
    every rank shows itself under a name that was never used, and rank 0 tells it a name for the meeting.
    """
    store, me, count = next(dist.rendezvous("env://", timeout=patience))
    name, deadline = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    if me:
        store.set(f"here/{me}", name)
        name = store.get(f"meeting of {name}").decode()     # waits for it
        store.set(f"{name}/{me}", "met")
    told: set[bytes] = set()
    while me == 0 and not store.check([f"{name}/{other}" for other in range(1, count)]):
        for other in range(1, count):
            if store.check([f"here/{other}"]) and (them := store.get(f"here/{other}")) not in told:
                store.set(f"meeting of {them.decode()}", name)      # it may be a dead one's: nobody reads it
                told.add(them)
        if time.monotonic() > deadline:
            raise ValueError(f"of {count} ranks not all have come within {patience}; is --nnodes right?")
        time.sleep(0.01)
    # Hours, because one rank may have much to tokenise, to save or to answer while the others wait.
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=me, world_size=count,
                            timeout=timedelta(hours=2))


# ---------------------------------------------------------------- telling


def from_main(value: object) -> object:
    """Rank 0's value, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def from_all(value: object) -> list:
    """Every rank's value, on every rank, in their order."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_of_machine() -> Iterator[None]:
    """One process of each machine does this first; the others then find what it wrote."""
    if local_rank():
        wait()
    yield
    if not local_rank():
        wait()


def shows_progress() -> bool:
    """Whether this rank has a terminal for bars."""
    return is_main() and sys.stderr.isatty()


def leave(status: int) -> NoReturn:
    """End this process at once. An orderly end would wait for ranks that are no more, and tear gloo down,
    whose destructor holds Python's lock while it waits for a thread that may need the lock to forget a
    barrier. Seen with PyTorch 2.13."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ---------------------------------------------------------------- errors


def message(error: Exception) -> str | None:
    """One line for what a user can mend; None for what only a programmer can."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return (f"{where}{error.strerror or error}"
                + ("; make room there and give the same command again" if full else ""))
    if isinstance(error, ValueError):
        return str(error)
    text = str(error)
    if isinstance(error, RuntimeError) and ("gloo" in text or isinstance(error, dist.DistError)):
        return (f"rank {rank()} lost another one, which said nothing: it was killed, or its machine or "
                f"network failed ({text.splitlines()[0][:150]}). torchrun prints its exit code; the same "
                "command resumes from what was saved")
    return None


def report_error(error: Exception) -> None:
    """Of an error that ends this process: one line, else the traceback; from one rank, the others just end.
    To be called where the error was caught."""
    first = True
    if dist.is_initialized():
        # whoever comes first has the cause; the others only lost their connection to it
        with contextlib.suppress(RuntimeError):     # the store's host is gone
            first = dist.distributed_c10d._get_default_store().add("first_error", 1) == 1
    elif rank():
        time.sleep(5)   # rank 0 has most likely met the same, and torchrun ends us when it has said so
    if first and (line := message(error)):
        print(f"error: {line}", file=sys.stderr)
    elif first:
        traceback.print_exc()
