"""A checkpoint folder's weights in and out, a piece at a time, whole or divided among ranks.

    stored = match(folder, {"model.norm.weight": [576], ...}, tied=True)
    fill(parameter, stored["model.norm.weight"])            # this rank's rows
    save_model(model, "out")

Files know nothing of ranks. A row is a run of bytes, so the file of a sharded model is that of a whole one,
read and written by rows, and memory stays near what the parameters need.
"""
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from runtime.distributed import from_all, is_main, rank
from runtime.model_folder import INDEX, SINGLE, weight_map
from runtime.start import warn_once

PIECE = 2**26               # bytes read, sent or written at once
MAX_FILE_BYTES = 5 * 10**9  # of a weight file
# safetensors' names
DTYPE_BY_NAME = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
                 "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
                 "U8": torch.uint8, "BOOL": torch.bool}
NAME_BY_DTYPE = {dtype: name for name, dtype in DTYPE_BY_NAME.items()}
# Of weights, as --save-dtype calls them.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# ---------------------------------------------------------------- tensors of a file


class Stored(NamedTuple):
    """A tensor in a safetensors file."""
    file: Path
    name: str
    shape: list[int]
    dtype: str          # safetensors' name


def _read(stored: Stored, a: int, b: int) -> Tensor:
    """Rows a to b of a stored tensor."""
    # The file is opened each time, because what was read stays mapped until it is closed.
    with safe_open(stored.file, framework="pt") as opened:
        return opened.get_slice(stored.name)[a:b]


def stored_tensors(files: list[Path], chosen: dict[str, Path] | None = None) -> dict[str, Stored]:
    """What files hold, by name, from their headers. chosen: the file of each name, if several hold it.
    ValueError for a file that cannot be read, and for a name that is not in its chosen file or is in several
    of which none is chosen."""
    found: dict[str, Stored] = {}
    chosen = chosen or {}
    for file in files:
        try:
            # Says why a file cannot be read, which safe_open does not.
            with open(file, "rb"):
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


# ---------------------------------------------------------------- rows of a tensor


def local_rows(x: Tensor) -> Tensor:
    """The rows of x on this rank, sharing its memory; all of them if it is not sharded."""
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def row_range(x: Tensor, owner: int) -> tuple[int, int]:
    """The first row of a rank, and the first after its last. Shares are equal, the last ones may be smaller
    or empty, as FSDP2 makes them: of 10 rows 4 ranks have (0, 3), (3, 6), (6, 9), (9, 10)."""
    rows = x.shape[0]
    if not isinstance(x, DTensor):
        return 0, rows
    share = -(-rows // x.device_mesh.size())
    return min(owner * share, rows), min((owner + 1) * share, rows)


def _slices(x: Tensor, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Rows start to end of x, cut into pieces of at most PIECE bytes or one row."""
    step = max(1, PIECE // (x.itemsize * max(1, x.shape[1:].numel())))
    return ((i, min(i + step, end)) for i in range(start, end, step))


def fill(x: Tensor, stored: Stored, everywhere: bool = True) -> None:
    """Read this rank's rows of a stored tensor into x, in x's dtype. everywhere: whether every rank sees the
    file; if not, all ranks must call, and rank 0 reads it and sends the rows to all. ValueError names the
    tensor if it holds NaN or Inf."""
    local, (first, last) = local_rows(x), row_range(x, rank())
    for a, b in _slices(x, first, last) if everywhere else _slices(x, 0, x.shape[0]):
        if everywhere or is_main():
            piece = _read(stored, a, b).to(local)
            # One pass without a temporary, a tenth of the time of isfinite().all().
            if not torch.stack(piece.aminmax()).isfinite().all():
                raise ValueError(f"{stored.file}: tensor {stored.name} holds NaN or Inf; the checkpoint is "
                                 "damaged or was saved by a run that diverged")
        else:
            piece = local.new_empty(b - a, *x.shape[1:])
        if not everywhere:
            dist.broadcast(piece, 0)
        # Those of the piece's rows that are this rank's.
        start, end = max(a, first), min(b, last)
        if start < end:
            local[start - first:end - first] = piece[start - a:end - a]


def stream_rows(x: Tensor) -> Iterator[Tensor]:
    """Yields all rows of x in order on rank 0, on the CPU, a piece at a time; nothing on the others. If x is
    sharded, all ranks must iterate: the others send their rows."""
    local, start = local_rows(x), row_range(x, rank())[0]
    owners = x.device_mesh.size() if isinstance(x, DTensor) else 1
    for owner in range(owners):
        for a, b in _slices(x, *row_range(x, owner)):
            if owner == rank():
                piece = local[a - start:b - start].contiguous()
                if owner:
                    dist.send(piece, 0)
            elif is_main():
                piece = local.new_empty(b - a, *x.shape[1:])
                dist.recv(piece, owner)
            if is_main():
                yield piece.cpu()


def first_above(tensors: dict[str, Tensor], limit: float) -> str:
    """The name of the first tensor with a NaN or a number above limit or below -limit; "" if there is none.
    All ranks must call, each checks its own rows, and all get the same answer."""
    # Written so that NaN, which is then both edges, is found.
    own = next((name for name, x in tensors.items() if local_rows(x).numel()
                and not max(abs(edge.item()) for edge in local_rows(x).aminmax()) <= limit), "")
    return next(filter(None, from_all(own)), "")


def write_tensors(file: str | Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> int:
    """Write a safetensors file (format: safetensors' README) piece by piece, without holding it in memory.
    dtype: of the file, by default each tensor's own. All ranks call, rank 0 writes and gets the file's
    CRC-32."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        kind = dtype or x.dtype
        start, end = end, end + x.numel() * kind.itemsize
        header[name] = {"dtype": NAME_BY_DTYPE[kind], "shape": list(x.shape), "data_offsets": [start, end]}
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
            for piece in stream_rows(x):
                write(piece.to(dtype or x.dtype).view(torch.uint8).numpy().data)
    return crc


# ---------------------------------------------------------------- checkpoint folders

def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, sorted: model.safetensors, or those that the index names.
    Where a folder has both, the index is ignored, as in transformers. ValueError if a file is missing."""
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        if (folder / INDEX).is_file():
            warn_once(f"{folder}: holds {SINGLE} and {INDEX}; {SINGLE} is read, as transformers does")
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    files = sorted({folder / name for name in weight_map(folder).values()})
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder}: {INDEX} names files that are not there: {', '.join(missing)}")
    return files


def checkpoint_tensors(folder: str | Path) -> dict[str, Stored]:
    """The tensors in the weight files of a checkpoint folder, by name, from the files' headers. If several
    files hold a tensor, the index decides. ValueError for files and indexes that are missing, broken or do
    not agree."""
    folder, files = Path(folder), weight_files(folder)
    chosen = {} if files == [folder / SINGLE] else weight_map(folder)
    return stored_tensors(files, {name: folder / file for name, file in chosen.items()})


def match(folder: str | Path, wanted: dict[str, list[int]], tied: bool) -> dict[str, Stored]:
    """Where each of the wanted tensors is in a checkpoint folder, from the files' headers alone. wanted: the
    shapes by name; tied: whether the embedding is also the head. ValueError lists tensors that are missing,
    surplus, or have another shape or dtype."""
    # Old files contain RoPE's table. Like transformers we compute it from config.json: the stored one may be
    # rounded, or lack the scaling that config.json asks for.
    found = {name: stored for name, stored in checkpoint_tensors(folder).items()
             if not name.endswith("rotary_emb.inv_freq")}
    if tied and HEAD in found:
        # The same values under both names (read_config has compared them), or under the head's name only.
        found.setdefault(EMBEDDING, found.pop(HEAD))
    problems: list[str] = []
    for name, stored in found.items():
        if name not in wanted:
            problems.append(f"surplus {name}")
        elif stored.shape != wanted[name]:
            problems.append(f"{name} is {stored.shape}, should be {wanted[name]}")
        elif DTYPE_BY_NAME.get(stored.dtype) not in DTYPES.values():
            problems.append(f"{name} is {stored.dtype}, should be F32, BF16 or F16")
    problems += [f"missing {name}" for name in wanted if name not in found]
    if HEAD in wanted and HEAD not in found:
        problems[-1] += " (if the head is the embedding, config.json must say tie_word_embeddings: true)"
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ValueError(f"{folder}: the weights do not fit config.json:\n  " + "\n  ".join(shown))
    return found


def save_model(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None,
               max_file_bytes: int = MAX_FILE_BYTES) -> dict[str, int]:
    """Write config.json and the weights into an existing folder, in Hugging Face's layout. model: a
    model.Llama; dtype: of the file, by default that of the files it was loaded from, but fp32 with a warning
    where fp16 would make a weight infinite; max_file_bytes: of weights in a file, unless one tensor is
    larger. All ranks call; rank 0 writes and gets the CRC-32 of each weight file."""
    folder, dtype = Path(folder), dtype or model.source_dtype
    # The names of the tensors in each file.
    files: list[list[str]] = [[]]
    total = used = 0
    tensors = dict(model.named_parameters())
    if dtype == torch.float16 and (name := first_above(tensors, torch.finfo(dtype).max)):
        warn_once(f"{folder}: {name} holds values beyond float16's range; the weights are saved as float32")
        dtype = torch.float32
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if files[-1] and used + size > max_file_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used, total = used + size, total + size
    file_names = [SINGLE] if len(files) == 1 else [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    sums = {file_name: write_tensors(folder / file_name, {name: tensors[name] for name in names}, dtype)
            for file_name, names in zip(file_names, files)}
    if not is_main():
        return {}
    if len(files) > 1:
        file_of_tensor = {name: file_name for file_name, names in zip(file_names, files) for name in names}
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": file_of_tensor}, indent=2))
    # transformers 5 reads dtype; transformers 4 and many other programs torch_dtype.
    raw = {**model.config.raw, **dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))}
    # transformers 4 writes there which folder it had loaded, somebody's path of another model.
    raw.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    return sums


def model_fingerprint(folder: str | Path) -> str:
    """A hash that tells checkpoint folders apart: of config.json, and of each weight file's size and 64
    samples of 64 KB, the first of which is its header. Reading all of a large model would take minutes.
    Training changes every tensor, so samples show it."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            for i in range(64):
                file.seek(i * max(0, size - 65536) // 63)
                digest.update(file.read(65536))
    return digest.hexdigest()[:32]

