"""A model in parts, one a rank: FSDP2 for training, and tensors in and out of files a piece at a time.

    shard(model, torch.bfloat16)            # on every rank, before the model has any weights
    fill(parameter, stored_tensors(files)[name])            # this rank's rows of a stored tensor
    write_tensors("model.safetensors", dict(model.named_parameters()))

Each rank keeps an equal share of the rows of every parameter, of its gradient and of AdamW's averages, in
fp32. A layer's rows are gathered when the layer is about to run, and let go of after; its gradient is added
up over the ranks, each keeping its rows, as soon as the layer's backward pass is done. What differs from the
usual way: files do not know of parts. A row is a run of bytes, so a file of a sharded model is that of a
whole one, read and written by rows.

Functions take whole tensors too, as those of one rank or of DDP are.
"""
import json
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ranks import from_all, is_main, rank

if TYPE_CHECKING:
    from model import Llama

PIECE = 2**26       # bytes read, sent or written at once
DTYPE_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names


# ---------------------------------------------------------------- training


def shard(model: "Llama", device: torch.device, dtype: torch.dtype) -> None:
    """Divide a model without weights (on the meta device) among the ranks, in place; dtype: to compute in.

    A layer is gathered in that dtype, so that it is half as large in bf16 and what autograd keeps of it is no
    copy but the gathered weights themselves, whose memory is let go of between forward and backward pass.
    Embeddings, last norm and head are gathered in fp32, as they are used without --shard, and stay from the
    model's forward pass to the end of its backward pass, or to release(): the loss needs the head. Gradients
    are added up in fp32, over the ranks and over micro-batches.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fast = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=fast)
    fully_shard(model, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    for module in (model, *model.model.layers):     # gloo has no mean: a sum, divided
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(model: "Llama | None") -> bool:
    return isinstance(model, FSDPModule)


def release(*models: "Llama | None") -> None:
    """Let go of the gathered embeddings and head, which a forward pass without a backward pass keeps."""
    for model in filter(is_sharded, models):
        model.reshard()


def whole(x: Tensor) -> Tensor:
    """The same on every rank, from a tensor that may be spread over them. For small ones."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---------------------------------------------------------------- rows


def part(x: Tensor) -> Tensor:
    """What of x is on this rank, sharing its memory; x itself if it is not sharded."""
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def rows_of(x: Tensor, owner: int) -> tuple[int, int]:
    """The first row that a rank has, and the first after its own. Shares are equal, the last may be smaller
    or empty, as FSDP2 makes them: of 10 rows 4 ranks have (0, 3), (3, 6), (6, 9), (9, 10)."""
    rows = x.shape[0]
    if not isinstance(x, DTensor):
        return 0, rows
    share = -(-rows // x.device_mesh.size())
    return min(owner * share, rows), min((owner + 1) * share, rows)


def _slices(x: Tensor, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Rows start to end of x in pieces of PIECE bytes, or of a row."""
    step = max(1, PIECE // (x.itemsize * x.shape[1:].numel()))
    return ((i, min(i + step, end)) for i in range(start, end, step))


def fill(x: Tensor, stored: "Stored", everywhere: bool = True) -> None:
    """Read this rank's rows of a stored tensor, and convert them to x's dtype. everywhere: whether every rank
    sees the file; else every rank must ask, and rank 0 reads all and sends their rows. ValueError names the
    tensor if it holds NaN or Inf."""
    def read(a: int, b: int) -> Tensor:
        piece = _read(stored, a, b).to(mine)
        # One pass without a temporary, a tenth of the time of isfinite().all().
        if not torch.stack(piece.aminmax()).isfinite().all():
            raise ValueError(f"{stored.file}: tensor {stored.name} holds NaN or Inf; the checkpoint is "
                             "damaged or was saved by a run that diverged")
        return piece

    mine, divided = part(x), isinstance(x, DTensor)
    first = rows_of(x, rank())[0]
    if everywhere:
        for a, b in _slices(x, *rows_of(x, rank())):
            mine[a - first:b - first] = read(a, b)
        return
    for owner in range(x.device_mesh.size() if divided else 1):
        for a, b in _slices(x, *rows_of(x, owner)):
            piece = read(a, b) if is_main() else mine.new_empty(b - a, *x.shape[1:])
            if not divided:
                dist.broadcast(piece, 0)
            elif owner and is_main():
                dist.send(piece, owner)
            elif owner and rank() == owner:
                dist.recv(piece, 0)
            if not divided or rank() == owner:
                mine[a - first:b - first] = piece


def pieces(x: Tensor) -> Iterator[Tensor]:
    """On rank 0 all rows of x in order, on the CPU, a piece at a time; on the others nothing. Of a sharded
    tensor every rank must ask: the others send their rows."""
    mine, start = part(x), rows_of(x, rank())[0]
    owners = x.device_mesh.size() if isinstance(x, DTensor) else 1
    for owner in range(owners):
        for a, b in _slices(x, *rows_of(x, owner)):
            if owner == rank():
                piece = mine[a - start:b - start].contiguous()
                if owner:
                    dist.send(piece, 0)
            elif is_main():
                piece = mine.new_empty(b - a, *x.shape[1:])
                dist.recv(piece, owner)
            if is_main():
                yield piece.cpu()


# ---------------------------------------------------------------- files


class Stored(NamedTuple):
    """A tensor in a safetensors file."""
    file: Path
    name: str
    shape: list[int]
    dtype: str          # safetensors' name


def _read(stored: Stored, a: int, b: int) -> Tensor:
    """Rows a to b of a stored tensor."""
    with safe_open(stored.file, framework="pt") as opened:  # anew: what was read stays mapped until it closes
        return opened.get_slice(stored.name)[a:b]


def stored_tensors(files: list[Path], chosen: dict[str, Path] | None = None) -> dict[str, Stored]:
    """What files hold, by name, from their headers. chosen: the file of each name, if several hold it.
    ValueError for a file that cannot be read, and for a name that is not in its chosen file or is in several
    of which none is chosen."""
    found: dict[str, Stored] = {}
    chosen = chosen or {}
    for file in files:
        try:
            with open(file, "rb"):  # says why it cannot be read, unlike safe_open
                pass
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    if chosen.get(name, file) != file:
                        continue
                    if name in found:
                        raise ValueError(f"{file}: holds {name}, and so does {found[name].file.name}; the "
                                         "index must say which one counts")
                    stored = opened.get_slice(name)
                    found[name] = Stored(file, name, stored.get_shape(), stored.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
    if missing := [f"{name} in {file.name}" for name, file in chosen.items() if name not in found]:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ValueError(f"{files[0].parent}: the index names tensors that are not in their file: "
                         f"{', '.join(missing[:8])}{more}")
    return found


def equal(one: Stored, other: Stored) -> bool:
    """Whether two stored matrices hold the same numbers. A piece of each is read at a time."""
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    rows = _slices(torch.empty(one.shape, device="meta"), 0, one.shape[0])
    return all(torch.equal(_read(one, a, b).float(), _read(other, a, b).float()) for a, b in rows)


def first_above(tensors: dict[str, Tensor], limit: float) -> str:
    """Name of the first tensor with a number that is larger than limit, or less than -limit; "" if there is
    none. Every rank must ask, each looks at its rows, and all get the same answer."""
    own = next((name for name, x in tensors.items() if part(x).numel()
                and max(abs(edge.item()) for edge in part(x).aminmax()) > limit), "")
    return next(filter(None, from_all(own)), "")


def write_tensors(file: str | Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> int:
    """Write a safetensors file (format: safetensors' README) as it comes, without holding it; dtype: of the
    file, default each tensor's own. Every rank calls, rank 0 writes. Returns the file's CRC-32, there."""
    names = {kind: name for name, kind in DTYPE_NAMES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        kind = dtype or x.dtype
        start, end = end, end + x.numel() * kind.itemsize
        header[name] = {"dtype": names[kind], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    crc = 0
    with open(file, "wb") if is_main() else nullcontext() as out:
        def write(data: bytes | memoryview) -> None:
            nonlocal crc
            out.write(data)
            crc = zlib.crc32(data, crc)

        if is_main():
            write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            for piece in pieces(x):
                write(piece.to(dtype or x.dtype).view(torch.uint8).numpy().data)
    return crc
