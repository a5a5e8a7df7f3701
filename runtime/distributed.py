"""The processes of a run: how ranks meet, what they tell each other, DDP and FSDP2, who reports an error.

One process without torchrun is rank 0 of 1, for all functions here.
"""
import contextlib
import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from runtime.machine import share_threads
from runtime.start import is_main, launched, line_of, local_rank, print_error, rank, world_size


# ---------------------------------------------------------------- meeting


def join_ranks(device: str) -> torch.device:
    """Give this rank its share of the cores and, under torchrun, let all ranks meet. device: auto, cpu or
    cuda. Returns this rank's device. ValueError if there is no CUDA, or the environment is not as torchrun
    sets it."""
    _check_environment()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device; give cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda and local_rank() >= torch.cuda.device_count():
        raise ValueError(f"LOCAL_RANK={local_rank()}: PyTorch finds only {torch.cuda.device_count()} CUDA "
                         "device(s); start no more processes on this machine than it has devices")
    share_threads()
    if cuda:
        torch.cuda.set_device(local_rank())
    if world_size() > 1 and not dist.is_initialized():
        meet("nccl" if cuda else "gloo")
    return torch.device("cuda", local_rank()) if cuda else torch.device("cpu")


def _check_environment() -> None:
    """ValueError that names a variable which torchrun sets, and which is not as it would set it."""
    fix = "torchrun sets it; to run without torchrun, unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
    for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        text = os.environ.get(name)
        if text is not None and not (re.fullmatch(r"\d{1,6}", text) and int(text) >= least):
            raise ValueError(f"{name}={text}: must be a whole number, {least} or more; {fix}")
    for name, total in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        value = launched(name, 0)
        if total in os.environ and name not in os.environ and launched(total, 1) > 1:
            raise ValueError(f"{total}={os.environ[total]}, but {name} is not set; {fix}")
        if value >= launched(total, 1) and (total in os.environ or name == "RANK"):
            raise ValueError(f"{name}={value}: must be less than {total}, which is "
                             f"{os.environ.get(total, 'not set')}; {fix}")
    if world_size() > 1:
        port = os.environ.get("MASTER_PORT", "")
        if not (re.fullmatch(r"\d{1,5}", port) and 0 < int(port) < 2**16):
            raise ValueError(f"MASTER_PORT={port}: must be rank 0's port, a number from 1 to 65535; torchrun "
                             "sets it")
        if not os.environ.get("MASTER_ADDR"):
            raise ValueError("MASTER_ADDR is not set or empty: must be the name or address of rank 0's "
                             "machine; torchrun sets it")


def meet(backend: str, patience: timedelta = timedelta(minutes=10), silent: float = 10) -> None:
    """Start torch.distributed among torchrun's ranks, saying after `silent` seconds what is waited for.
    ValueError if rank 0's address does not answer, or some ranks have not joined within `patience`."""
    place = f"rank 0 at MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
    awaited = f"all of {world_size()} ranks to reach" if is_main() else "the answer of"
    timer = threading.Timer(silent, print, [f"rank {rank()} waits for {awaited} {place}; it gives up after "
                                            f"{patience}"], dict(file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        _meet(backend, patience)
    except dist.DistError as error:
        raise ValueError(f"rank {rank()} cannot reach {place} ({str(error).splitlines()[0][:150]}); is that "
                         "where rank 0 runs, and may this machine connect to it?") from None
    finally:
        timer.cancel()


def _meet(backend: str, patience: timedelta) -> None:
    """meet() itself.

    Restarted ranks get the same store as the ranks before them, and would find the addresses of dead
    processes in it (PyTorch issue 135712; each machine counts torchrun's restarts for itself, so the count
    tells nothing). So every rank registers under a fresh name, and rank 0 answers it with the name of the
    group to join.
    """
    store, me, count = next(dist.rendezvous("env://", timeout=patience))
    name, deadline = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    if me:
        store.set(f"registered/{me}", name)
        name = store.get(f"group of {name}").decode()   # waits for it
        store.set(f"{name}/{me}", "joined")
    answered: set[bytes] = set()
    while me == 0 and not store.check([f"{name}/{other}" for other in range(1, count)]):
        for other in range(1, count):
            key = f"registered/{other}"
            if store.check([key]) and (registered := store.get(key)) not in answered:
                # It may be a dead process's: then nobody reads the answer.
                store.set(f"group of {registered.decode()}", name)
                answered.add(registered)
        if time.monotonic() > deadline:
            raise ValueError(f"only some of the {count} ranks joined within {patience}; is --nnodes right?")
        time.sleep(0.01)
    # Hours, because the others wait while one rank tokenizes, saves or answers.
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
    """The values of all ranks, in their order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_of_machine() -> Iterator[None]:
    """One process of each machine runs this first; the others then find what it wrote."""
    if local_rank():
        wait()
    yield
    if not local_rank():
        wait()


def shows_progress() -> bool:
    """Whether this rank writes to a terminal, where a progress bar can be seen."""
    return is_main() and sys.stderr.isatty()


def finish(status: int) -> int:
    """End all ranks together. Returns status where there is only one."""
    wait()
    if world_size() > 1:
        leave(status)
    return status


def leave(status: int) -> NoReturn:
    """End this process at once. An orderly exit would wait for dead ranks, and could deadlock: gloo's
    destructor holds Python's lock while it waits for a thread that may need the lock (PyTorch 2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Sums(dict):
    """Tensors by name, which micro-batches and then ranks add up. All have the same names and shapes."""

    def add(self, statistics: dict[str, Tensor]) -> None:
        for name, value in statistics.items():
            self[name] = self[name] + value.detach() if name in self else value.detach()

    def over_ranks(self, *others: Tensor) -> tuple[dict[str, float | list[float]], list[float]]:
        """The sums over all ranks as numbers, or lists of numbers; and `others`, scalars that are the same on
        every rank, as numbers. The host waits for the device here."""
        flat = torch.cat([x.reshape(-1).double() for x in self.values()])
        if dist.is_initialized():
            dist.all_reduce(flat)
        numbers = iter(torch.cat([flat, *(x.reshape(1).double() for x in others)]).tolist())
        totals = {name: [next(numbers) for _ in x] if x.dim() else next(numbers) for name, x in self.items()}
        return totals, list(numbers)


# ---------------------------------------------------------------- one model on all ranks


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Divide a model without weights (on the meta device) among the ranks, in place; dtype: to compute in.

    Each rank holds an equal share of the rows of every parameter, its gradient and its optimizer state, in
    fp32. A layer is gathered just before it runs, in dtype, and freed after: half the size in bf16, and what
    autograd keeps is the gathered weights themselves, whose memory is freed between the forward and the
    backward pass. Embeddings, last norm and head are gathered in fp32, as they are used without --shard, and
    stay from the forward pass to the end of the backward pass, or to release(): the loss needs the head.
    Gradients are summed in fp32, over ranks and micro-batches.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fast = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=fast)
    fully_shard(model, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    for module in (model, *model.model.layers):
        # gloo cannot average: a sum, divided.
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module | None) -> bool:
    return isinstance(model, FSDPModule)


def release(*models: nn.Module | None) -> None:
    """Free the gathered embeddings and head of sharded models, which a forward pass without a backward pass
    leaves in memory."""
    for model in filter(is_sharded, models):
        model.reshard()


def whole(x: Tensor) -> Tensor:
    """All of a tensor that may be divided among the ranks, on every rank. For small ones."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """DDP around the model of several ranks; a sharded model, or that of a single rank, as it is.

    DDP is not told the device, or it would move the documents' bounds there, which the host needs.
    It rebuilds its buckets after a process's first backward pass. With three or more ranks the order of the
    buckets affects rounding. A pass over two tokens with loss 0 fixes the order before the first step, so a
    resumed run matches an uninterrupted one bit for bit. The second pass makes the gradients views of the
    final buckets, so that micro-batches accumulate in place.
    """
    if not dist.is_initialized() or is_sharded(model):
        return model
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    for _ in range(2):
        hidden = wrapped(ids, torch.arange(2, device=device), torch.tensor([0, 2], dtype=torch.int32))
        (0.0 * (hidden.sum() + model.head_weight.sum())).backward()
        wrapped.zero_grad(set_to_none=False)
    return wrapped


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without DDP around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def sync_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass averages DDP's gradients over the ranks, or leaves that to a later one.
    Any other model is left alone: a sharded one would have to keep whole gradients meanwhile."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now


# ---------------------------------------------------------------- errors


def message(error: Exception) -> str | None:
    """One line for an error that a user can fix; None for one that only a programmer can."""
    if isinstance(error, ValueError | OSError):
        return line_of(error)
    text = str(error)
    # The first is CUDA's, the second the CPU's, a plain RuntimeError.
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        return (f"rank {rank()} has no memory left ({text.splitlines()[0][:150]}). A smaller "
                "--micro-batch-tokens needs less, when training --recompute and --shard too, when generating "
                "a smaller --batch-size")
    if isinstance(error, RuntimeError) and ("gloo" in text or isinstance(error, dist.DistError)):
        return (f"rank {rank()} lost another one, which said nothing: it was killed, or its machine or "
                f"network failed ({text.splitlines()[0][:150]}). torchrun prints its exit code; the same "
                "command resumes from what was saved")
    return None


def report_error(error: Exception) -> None:
    """Print the error that ends this process: one line if a user can fix it, else the traceback. Only one
    rank prints. To be called where the error is caught."""
    first = True
    if dist.is_initialized():
        # The first to report has the cause; the others only lost their connection to it. If the store's host
        # is dead, everybody reports.
        with contextlib.suppress(RuntimeError):
            first = dist.distributed_c10d._get_default_store().add("first_error", 1) == 1
    elif rank():
        # Rank 0 has most likely met the same error, and torchrun ends the others when it has reported.
        time.sleep(5)
    if first and (line := message(error)):
        print_error(line)
    elif first:
        traceback.print_exc()

