"""A tiny checkpoint folder, tiny records and ways to run train.py on them."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import forks
import tokenizers_for_tests
import train

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("red blue a plum fig pear town sea sunny hello world station "
         "name colour be brief the is and by").split()


def make_model(folder: Path, tokenizer: str = "llama3", tie: bool = True, seed: int = 0, layers: int = 2
               ) -> Path:
    """A random Llama whose embedding has a few rows more than the tokenizer has ids, as real ones have."""
    tokenizers_for_tests.write(tokenizer, folder)
    built = tokenizers_for_tests.build(tokenizer)
    vocabulary = built.get_vocab_size() + 5
    bos, eos, *_ = tokenizers_for_tests.CAST[tokenizer]
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tie,
        initializer_range=0.3, bos_token_id=built.token_to_id(bos) if bos else None,
        eos_token_id=built.token_to_id(eos))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_records(file: Path, count: int, seed: int = 0, longest: int = 25) -> Path:
    """Records of very unlike lengths, some with a system message, some with two turns,
    some with a given answer."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    with open(file, "w") as out:
        for i in range(count):
            turns = [{"role": role, "content": text()}
                     for _ in range(1 + i % 2) for role in ("user", "assistant")]
            system = [{"role": "system", "content": text()}] if i % 3 == 0 else []
            if i % 4 == 1:
                turns[1]["weight"] = 0
            out.write(json.dumps({"messages": system + turns}) + "\n")
    return file


def flags(**values: object) -> list[str]:
    """lr=1 -> ["--lr", "1"]; True is a bare flag, a list several words, None leaves a flag out."""
    words = []
    for name, value in values.items():
        if value is None:
            continue
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return words


def arguments(folder: Path, out: str, **more: object) -> list[str]:
    """The flags of a small run in fp32 whose learning rate is large enough for every step to show."""
    base = dict(model=folder / "model", train_data=folder / "train.jsonl", template="llama3",
                output_dir=folder / out, cache_dir=folder / "cache", max_length=120, epochs=2, batch_size=6,
                micro_batch_tokens=4096, lr=1e-2, dtype="fp32", device="cpu", save_dtype="fp32")
    return flags(**{**base, **more})


def setup(folder: Path, count: int = 20, **more: object) -> Path:
    make_model(folder / "model", **more)
    make_records(folder / "train.jsonl", count)
    return folder


def run_here(argv: list[str]) -> int:
    """train.py in this process."""
    return train.main(argv)


def command(argv: list[str], ranks: int = 1, python: list[str] = ()) -> list[str]:
    if ranks == 1:
        return [sys.executable, *python, str(ROOT / "train.py"), *argv]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            str(ROOT / "train.py"), *argv]


def run_apart(argv: list[str], ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """train.py, or torchrun train.py, in processes of its own (forks.py)."""
    return checked(forks.run([str(ROOT / "train.py"), *argv], ranks), check)


def run_script(script: str, argument: Path, ranks: int) -> str:
    """torchrun tests/SCRIPT ARGUMENT; returns what was printed."""
    return checked(forks.run([str(ROOT / "tests" / script), str(argument)], ranks)).stdout


def run_many(folder: Path, runs: list[list[str]], ranks: int) -> str:
    """Runs of train.py one after the other in the same ranks (many_runs.py)."""
    file = folder / f"runs-{ranks}.json"
    file.write_text(json.dumps(runs))
    return run_script("many_runs.py", file, ranks)


def run_module(module: str, argv: list[str], ranks: int = 1, check: bool = True
               ) -> subprocess.CompletedProcess:
    """python -m MODULE, with all its imports, or torchrun -m MODULE (forks.py)."""
    return checked(forks.run(["-m", module, *argv], ranks, fresh=ranks == 1), check)


def checked(done: subprocess.CompletedProcess, check: bool = True) -> subprocess.CompletedProcess:
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    """Whether the results of two runs are equal, bit for bit."""
    ours, theirs = weights(a / "final"), weights(b / "final")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of two sets of weights: ||a - b|| / ||b|| over their tensors."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in b)

# ---------------------------------------------------------------- what the host waits for


def copies_of_meta_tensors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes code run on the meta device, in place of CUDA. Tensors there have no numbers, so what the host
    would wait for raises; but x.cpu() and x.tolist() give zeros. Returns a list that gets the name of each
    such call."""
    names: list[str] = []

    def zeros_instead(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def function(x: torch.Tensor) -> object:
            if x.is_meta:
                names.append(name)
                x = torch.zeros(x.shape, dtype=x.dtype)
            return original(x)
        monkeypatch.setattr(torch.Tensor, name, function)

    zeros_instead("cpu")
    zeros_instead("tolist")
    # The meta device has no autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    return names


# ---------------------------------------------------------------- stop and resume


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in step `steps` - 1 when the ranks have agreed to go on,
    so it ends after `steps`."""
    original, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(*args, **kwargs):
        calls.append(1)
        if len(calls) == steps - 1:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def is_running(pid: int) -> bool:
    """Not a zombie either, which a dead process is until its parent asks for its status."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
