"""Checkpoints that a kill at any moment cannot spoil.

    OUTPUT/checkpoints/step-00000020/   model.safetensors, optimizer.safetensors, state.json

Each is written under another name, flushed to disk and renamed, so it is there whole or not at all.
state.json holds the CRC-32 of every file, so that what a disk spoils later is not trained on. A checkpoint is
the same whatever the number of ranks, with and without --shard, and any run resumes from it: rank 0 writes
whole tensors a piece at a time, and each rank reads its rows of them. Weights and whatever tensors and
numbers the optimizer keeps for a parameter are exact. There is no random state to save: the order of examples
and NEFTune's noise are functions of (seed, step). Nothing is pickled.
"""
import contextlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.distributed import from_all, from_main, is_main
from runtime.files import checksum, commit, writing
from runtime.foreign import parse_json, read_text, shorten
from runtime.weights import (DTYPE_BY_NAME, NAME_BY_DTYPE, checkpoint_tensors, fill, first_above, save_model,
                             stored_tensors, write_tensors)

# The name of a finished checkpoint's folder.
STEP_FOLDER = re.compile(r"step-\d{8,}")
# The fields of state.json, apart from its own checksum.
STATE = {"step": int, "identity": dict, "optimizer": str, "crc32": dict, "numbers": dict}


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to fill, which appears as `folder` at the end, complete and flushed to disk; an error,
    as of a full disk, deletes it. Ranks other than 0 get only the name."""
    part = folder.with_name(f"{folder.name}.part")
    if not is_main():
        yield part
        return
    try:
        with writing(part):
            # A killed writer may have left one.
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            yield part
            # One that exists is damaged, or of a run that was resumed from an earlier step.
            shutil.rmtree(folder, ignore_errors=True)
            commit(part, folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise


def save_checkpoint(output: str | Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer,
                    state: dict, keep: int) -> Path:
    """Write OUTPUT/checkpoints/step-N after `step` finished steps, then delete all but the newest `keep`.
    state: JSON-able, returned by read_state. All ranks call, rank 0 writes. Returns the folder. ValueError as
    optimizer_state(), and for a weight that is not finite."""
    folder = Path(output) / "checkpoints" / f"step-{step:08d}"
    # A step checks its loss and gradient before the update; after the last one nothing else would.
    if name := first_above(dict(model.named_parameters()), torch.finfo(torch.float32).max):
        raise ValueError(f"step {step}: {name} holds NaN or Inf after the update, so nothing is saved: "
                         "lower --lr or raise --adam-eps")
    tensors, numbers = optimizer_state(model, optimizer)
    with new_folder(folder) as part:
        sums = save_model(model, part, torch.float32)
        sums["optimizer.safetensors"] = write_tensors(part / "optimizer.safetensors", tensors)
        if is_main():
            state = {**state, "step": step, "optimizer": type(optimizer).__qualname__, "crc32": sums,
                     "numbers": numbers}
            state["state_crc32"] = _state_checksum(state)
            (part / "state.json").write_text(json.dumps(state, indent=2))
    if is_main():
        for old in [p for p in find_checkpoints(output) if p.name <= folder.name][:-keep]:
            shutil.rmtree(old)
    return folder


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer
                    ) -> tuple[dict[str, Tensor], dict[str, tuple[float, str | None]]]:
    """What the optimizer keeps for the model's parameters: tensors, {"exp_avg.model.norm.weight": tensor},
    and numbers with their dtype, {"step.model.norm.weight": (20.0, "F32")}, or None if it is not a tensor.
    ValueError if it keeps anything else."""
    tensors, numbers = {}, {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dtype in NAME_BY_DTYPE:
                if value.dim():
                    tensors[f"{key}.{name}"] = value
                else:
                    numbers[f"{key}.{name}"] = value.item(), NAME_BY_DTYPE[value.dtype]
            elif isinstance(value, bool | int | float):
                numbers[f"{key}.{name}"] = value, None
            elif value is not None:
                raise ValueError(f"{type(optimizer).__qualname__} keeps {key!r} for {name}, a "
                                 f"{type(value).__name__}, which a checkpoint cannot hold: only tensors and "
                                 "numbers")
    return tensors, numbers


def _state_checksum(state: dict) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def find_checkpoints(output: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first. Folders with other names, such as a copy of one that a
    user keeps there, are not the run's: it neither resumes from them nor deletes them."""
    return sorted(p for p in (Path(output) / "checkpoints").glob("step-*")
                  if STEP_FOLDER.fullmatch(p.name) and p.is_dir())


def read_state(folder: str | Path) -> dict:
    """state.json of a checkpoint. ValueError if the folder is not one, or the file has changed since it was
    written."""
    try:
        state = parse_json(read_text(Path(folder) / "state.json"))
        if state.pop("state_crc32") != _state_checksum(state):
            raise ValueError("state.json has changed since it was written")
        if wrong := [name for name, kind in STATE.items() if type(state.get(name)) is not kind]:
            raise ValueError(f"state.json: {wrong[0]} is missing or not of type {STATE[wrong[0]].__name__}")
        for name in state["crc32"]:
            if name != Path(name).name:
                raise ValueError(f"state.json names {shorten(name, 100)}, which is not in the folder")
        return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: not a whole checkpoint of this trainer ({error})") from None


def check_files(folder: str | Path) -> None:
    """Read all of a checkpoint. ValueError names a file that has changed since it was written."""
    for name, crc in read_state(folder)["crc32"].items():
        file = Path(folder) / name
        try:
            same = checksum(file) == crc
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
        if not same:
            raise ValueError(f"{file}: is damaged, its checksum is not the one in state.json")


def newest_whole(output: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest undamaged checkpoint of a run, None if it never wrote one. say: is told of newer ones that
    are damaged. ValueError if all are."""
    found = find_checkpoints(output)
    for folder in reversed(found):
        try:
            check_files(folder)
            return folder
        except ValueError as error:
            say(f"warning: {error}; looking for a checkpoint before it")
    if found:
        raise ValueError(f"--output-dir {output}: none of its {len(found)} checkpoint(s) is whole; restore "
                         "one, or give --overwrite to start from scratch")
    return None


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's weights and optimizer state into model and optimizer, bit for bit; this rank's rows
    if the model is sharded. All ranks call; those that do not see rank 0's folder are sent theirs. Returns
    the number of finished steps. ValueError if a tensor is missing, or it is another optimizer's."""
    weights, tensors, state = from_main(
        (checkpoint_tensors(folder), stored_tensors([Path(folder) / "optimizer.safetensors"]),
         read_state(folder)) if is_main() else None)
    try:
        own_state = state if is_main() else read_state(folder)
    except ValueError:
        # This machine does not have the folder.
        own_state = None
    everywhere = all(from_all(own_state == state))
    if state["optimizer"] != type(optimizer).__qualname__:
        raise ValueError(f"{folder}: was written with the optimizer {state['optimizer']}, this run has "
                         f"{type(optimizer).__qualname__}; resume with the code that it was started with, or "
                         "give another --output-dir")
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name not in weights or weights[name].shape != list(parameter.shape):
            raise ValueError(f"{folder}: {name} is missing, or not of the model's shape")
        fill(parameter, weights[name], everywhere)
    if others := [stored_name for stored_name in (*tensors, *state["numbers"])
                  if stored_name.partition(".")[2] not in parameters]:
        raise ValueError(f"{folder}: {shorten(others[0], 100)} is not optimizer state of this model")
    for stored_name, stored in tensors.items():
        key, _, name = stored_name.partition(".")
        parameter, dtype = parameters[name], DTYPE_BY_NAME[stored.dtype]
        if stored.shape == list(parameter.shape):
            # Divided among the ranks as its parameter is.
            value = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:
            value = torch.empty(stored.shape, dtype=dtype, device=parameter.device)
        fill(value, stored, everywhere)
        optimizer.state[parameter][key] = value
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for stored_name, (number, dtype) in state["numbers"].items():
        key, _, name = stored_name.partition(".")
        if dtype is not None:
            # torch.optim keeps its step counts on the CPU unless it needs them on the device.
            group = groups[parameters[name]]
            on_device = group.get("fused") or group.get("capturable")
            number = torch.tensor(number, dtype=DTYPE_BY_NAME[dtype],
                                  device=parameters[name].device if on_device else "cpu")
        optimizer.state[parameters[name]][key] = number
    return state["step"]
