"""Checkpoints that a kill at any moment cannot spoil, and the final Hugging Face folder.

    OUTPUT/checkpoints/step-00000020/   model.safetensors, optimizer.safetensors (all fp32, exact), state.json
    OUTPUT/final/                       what transformers, vLLM and train.py itself load

Every folder is written beside its place, flushed to disk and renamed, so it is there whole or not at all.
There is no random state to save: the order of examples and NEFTune's noise are functions of (seed, step).
Nothing is pickled.
"""
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import Template, Tokenizer, read_json
from model import DTYPES, Llama, save_model, weight_files


def write_text(path: str | Path, text: str) -> None:
    """Replace a file by one with this text, whole or not at all."""
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _commit(part: Path, folder: Path) -> None:
    """Make the folder `part` appear under its name, only once all that is in it is on the disk."""
    for file in part.iterdir():
        _sync(file)
    _sync(part)
    os.rename(part, folder)
    _sync(folder.parent)


def _new_part(folder: Path) -> Path:
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a writer that was killed
    part.mkdir(parents=True)
    return part


def save_checkpoint(output: str | Path, step: int, model: Llama, optimizer: torch.optim.Optimizer,
                    state: dict, keep: int) -> Path:
    """Write OUTPUT/checkpoints/step-N after `step` finished steps, then delete all but the newest `keep`.
    state: JSON-able, given back by load_checkpoint. Returns the folder."""
    folder = Path(output) / "checkpoints" / f"step-{step:08d}"
    if not folder.exists():
        part = _new_part(folder)
        save_model(model, part, torch.float32)
        moments = {f"{key}.{name}": value.detach().cpu().contiguous()
                   for name, parameter in model.named_parameters()
                   for key, value in optimizer.state[parameter].items()}
        save_file(moments, part / "optimizer.safetensors")
        (part / "state.json").write_text(json.dumps({**state, "step": step}, indent=2))
        _commit(part, folder)
    for old in find_checkpoints(output)[:-keep]:
        shutil.rmtree(old)
    return folder


def find_checkpoints(output: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in (Path(output) / "checkpoints").glob("step-*")
                  if p.suffix != ".part" and p.is_dir())


def unfinished_checkpoints(output: str | Path) -> list[Path]:
    """What a writer that was killed left behind."""
    return sorted((Path(output) / "checkpoints").glob("step-*.part"))


def read_state(folder: str | Path) -> dict:
    """state.json of a checkpoint; ValueError if the folder is none."""
    try:
        return json.loads((Path(folder) / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume {folder}: not a checkpoint of this trainer ({error})") from None


def load_checkpoint(folder: str | Path, model: Llama, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state into model and optimizer, in place, bit for bit.
    ValueError if a tensor is missing."""
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, dict[str, torch.Tensor]] = {}    # by parameter, then exp_avg, exp_avg_sq, step
    optimizer_file = Path(folder) / "optimizer.safetensors"
    for file in [*weight_files(folder), optimizer_file]:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    if file == optimizer_file:
                        key, _, parameter = name.partition(".")
                        moments.setdefault(parameter, {})[key] = opened.get_tensor(name)
                    else:
                        weights[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot be read ({error}); delete {folder} to resume from the "
                             "checkpoint before it") from None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in weights or name not in moments:
                raise ValueError(f"{folder}: the tensor {name} or its optimizer state is missing")
            parameter.copy_(weights[name])
            # clone: a mapped tensor would keep the file open and change with it
            optimizer.state[parameter] = {key: value.to(parameter.device, copy=True)
                                          for key, value in moments[name].items()}


def export(output: str | Path, model: Llama, tokenizer: Tokenizer, template: Template, dtype: str) -> Path:
    """Write OUTPUT/final, the checkpoint folder to use, with the template that was trained; dtype: source,
    fp32 or bf16. Returns the folder."""
    folder = Path(output) / "final"
    part = _new_part(folder)
    save_model(model, part, None if dtype == "source" else DTYPES[dtype])
    source = tokenizer.folder
    shutil.copyfile(source / "tokenizer.json", part / "tokenizer.json")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, part / name)
    config = read_json(source / "tokenizer_config.json") or {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["chat_template"] = template.source
    (part / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    # Serving stops at eos_token_id: it must name the token that was trained to end a turn.
    generation = read_json(source / "generation_config.json")
    stops = generation.get("eos_token_id", model.config.raw.get("eos_token_id"))
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    end = tokenizer.special[template.end_of_turn]
    stops = stops if end in stops else [end, *stops]
    generation["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    if tokenizer.bos_token in tokenizer.special:
        generation.setdefault("bos_token_id", tokenizer.special[tokenizer.bos_token])
    (part / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    _commit(part, folder)
    return folder


def model_fingerprint(folder: str | Path) -> str:
    """A hash that tells checkpoints apart: config.json, and of each weight file its size, header
    and 64 samples of 64 KB. Reading all of a large model would cost minutes; training changes
    every tensor, so samples show it."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            for i in range(64):
                file.seek(i * max(0, size - 65536) // 63)
                digest.update(file.read(65536))
    return digest.hexdigest()[:32]
