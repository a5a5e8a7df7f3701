"""Checkpoints that a kill at any moment cannot spoil, and the final Hugging Face folder.

    OUTPUT/checkpoints/step-00000020/   model.safetensors, optimizer.safetensors (all fp32, exact), state.json
    OUTPUT/final/                       what transformers, vLLM and train.py itself load

Every folder is written beside its place, flushed to disk and renamed, so it is there whole or not at all.
state.json has the CRC-32 of every file, so that what a disk spoils later is not trained on. A checkpoint is
the same whatever the number of ranks, with and without --shard, and any resumes from any: rank 0 writes whole
tensors a piece at a time, and each rank reads its rows of them. There is no random state to save: the order
of examples and NEFTune's noise are functions of (seed, step). Nothing is pickled.
"""
import contextlib
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from data import NAMED, Template, Tokenizer
from files import checksum, commit, read_json, writing
from model import DTYPES, Llama, checkpoint_tensors, save_model, weight_files
from ranks import from_all, from_main, is_main
from shard import fill, stored_tensors, write_tensors

AVERAGES = ("exp_avg", "exp_avg_sq")    # AdamW's of a parameter; it counts its steps too, as we do


@contextlib.contextmanager
def _making(folder: Path) -> Iterator[Path]:
    """A folder to fill, which appears as `folder` when this ends; if it fails, as on a full disk, it is
    deleted. On other ranks than 0 it is only a name."""
    part = folder.with_name(f"{folder.name}.part")
    if not is_main():
        yield part
        return
    try:
        with writing(part):
            shutil.rmtree(part, ignore_errors=True)     # of a writer that was killed
            part.mkdir(parents=True)
            yield part
            shutil.rmtree(folder, ignore_errors=True)   # damaged, or of a run that was resumed from before it
            commit(part, folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise


def save_checkpoint(output: str | Path, step: int, model: Llama, optimizer: torch.optim.Optimizer,
                    state: dict, keep: int) -> Path:
    """Write OUTPUT/checkpoints/step-N after `step` finished steps, then delete what is older than the newest
    `keep`. state: JSON-able, given back by read_state. Every rank calls, rank 0 writes.
    Returns the folder."""
    folder = Path(output) / "checkpoints" / f"step-{step:08d}"
    with _making(folder) as part:
        sums = save_model(model, part, torch.float32)
        moments = {f"{key}.{name}": optimizer.state[parameter][key]
                   for name, parameter in model.named_parameters() for key in AVERAGES}
        sums["optimizer.safetensors"] = write_tensors(part / "optimizer.safetensors", moments)
        if is_main():
            state = {**state, "step": step, "crc32": sums}
            state["state_crc32"] = _state_checksum(state)
            (part / "state.json").write_text(json.dumps(state, indent=2))
    if is_main():
        for old in [p for p in find_checkpoints(output) if p.name <= folder.name][:-keep]:
            shutil.rmtree(old)
    return folder


def _state_checksum(state: dict) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def find_checkpoints(output: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in (Path(output) / "checkpoints").glob("step-*")
                  if p.suffix != ".part" and p.is_dir())


def unfinished_checkpoints(output: str | Path) -> list[Path]:
    """What a writer that was killed left behind."""
    return sorted((Path(output) / "checkpoints").glob("step-*.part"))


def read_state(folder: str | Path) -> dict:
    """state.json of a checkpoint; ValueError if the folder is none, or the file is not as it was written."""
    try:
        state = json.loads((Path(folder) / "state.json").read_text())
        if state.pop("state_crc32") != _state_checksum(state):
            raise ValueError("state.json: is not what was written")
        return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: not a whole checkpoint of this trainer ({error})") from None


def check_files(folder: str | Path) -> None:
    """Read all of a checkpoint. ValueError names the file that is not as it was written."""
    for name, crc in read_state(folder)["crc32"].items():
        file = Path(folder) / name
        try:
            same = checksum(file) == crc
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
        if not same:
            raise ValueError(f"{file}: is damaged, its checksum is not the one in state.json")


def newest_whole(output: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint of a run that is as it was written; None if it never wrote one. Names, by say,
    the damaged ones that are newer. ValueError if all are damaged."""
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


def load_checkpoint(folder: str | Path, model: Llama, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's weights and optimizer state into model and optimizer, in place, bit for bit; of a
    sharded model this rank's rows. Every rank calls; those that do not see rank 0's folder are sent theirs.
    Returns how many steps it stands for. ValueError if a tensor is missing."""
    weights, moments, state = from_main(
        (checkpoint_tensors(folder), stored_tensors([Path(folder) / "optimizer.safetensors"]),
         read_state(folder)) if is_main() else None)
    try:
        mine = state if is_main() else read_state(folder)
    except ValueError:      # this machine has no such folder
        mine = None
    everywhere = all(from_all(mine == state))
    steps = float(state["step"])
    for name, parameter in model.named_parameters():
        averages = {key: torch.empty_like(parameter) for key in AVERAGES}
        for x, where, stored in ((parameter, weights, name),
                                 *((value, moments, f"{key}.{name}") for key, value in averages.items())):
            if stored not in where or where[stored].shape != list(x.shape):
                raise ValueError(f"{folder}: {stored} is missing, or not of the model's shape")
            fill(x, where[stored], everywhere)
        optimizer.state[parameter] = {**averages, "step": torch.tensor(steps, device=parameter.device)}
    return state["step"]


def export(output: str | Path, model: Llama, tokenizer: Tokenizer, template: Template, dtype: str) -> Path:
    """Write OUTPUT/final, the checkpoint folder to use, with the template that was trained; dtype: source,
    fp32 or bf16. Every rank calls, rank 0 writes. Returns the folder."""
    folder = Path(output) / "final"
    with _making(folder) as part:
        save_model(model, part, None if dtype == "source" else DTYPES[dtype])
        if is_main():
            _write_tokenizer(part, model, tokenizer, template)
    return folder


# Fields of tokenizer_config.json that are kept, since they change no ids. The others belong to the class
# that the source named (legacy, add_prefix_space), are said by tokenizer.json (add_bos_token), or ask for
# code that is not here.
KEPT = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces",
        "model_input_names")


def _write_tokenizer(folder: Path, model: Llama, tokenizer: Tokenizer, template: Template) -> None:
    """All that stands beside the weights: tokenizer, template, and where an answer ends.

    Training takes tokenizer.json as it stands. So the folder names the class that does so, too, in
    transformers 4 and 5: a class such as LlamaTokenizer would build the splitting anew, with other ids. What
    that class added to the source's files, and what they said of special tokens, is written out.
    """
    def write(name: str, content: dict, indent: int | None = 2) -> None:
        text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")

    source = tokenizer.folder
    spec = read_json(source / "tokenizer.json")
    write("tokenizer.json", {**spec, "added_tokens": tokenizer.added_tokens}, indent=None)
    write("added_tokens.json", {token["content"]: token["id"] for token in tokenizer.added_tokens})
    own = {name: text for name, text in tokenizer.named_tokens.items() if name not in NAMED}
    named = {name: text for name, text in tokenizer.named_tokens.items() if name in NAMED}
    if tokenizer.extra_tokens:
        named["additional_special_tokens"] = tokenizer.extra_tokens
    write("special_tokens_map.json", named)
    found = {**tokenizer.class_defaults, **read_json(source / "tokenizer_config.json")}
    config = {name: found[name] for name in KEPT if found.get(name) is not None}
    if "add_prefix_space" in (splitter := spec.get("pre_tokenizer") or {}):
        config["add_prefix_space"] = splitter["add_prefix_space"]   # transformers 4 sets it to this one's
    if own:     # "image_token" and its like; transformers 4 takes them here only
        config["extra_special_tokens"] = own
    if spec.get("padding"):     # which would else name it
        config["pad_token"] = None
    write("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config, **named,
                                    "chat_template": template.source})
    # Serving stops at eos_token_id: it must name the token that was trained to end a turn.
    generation = read_json(source / "generation_config.json")
    stops = generation.get("eos_token_id")
    stops = model.config.raw.get("eos_token_id") if stops is None else stops
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    end = tokenizer.special[template.end_of_turn]
    stops = stops if end in stops else [end, *stops]
    generation["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    ids = {name: tokenizer.special.get(token) for name, token in tokenizer.named_tokens.items()}
    if ids.get("bos_token") is not None:
        generation["bos_token_id"] = ids["bos_token"]
    # A padding token that was added without a row in the embedding could not be looked up.
    if generation.get("pad_token_id") is None and (pad := ids.get("pad_token")) is not None:
        generation |= {"pad_token_id": pad} if pad < model.config.vocab_size else {}
    write("generation_config.json", generation)


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
