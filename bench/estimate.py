"""train.py --dry-run's estimate of memory beside what the same trainings take.

    python -m bench.estimate --model DIR --train-data FILE

One rank, two ranks of DDP, two and four of --shard, each with and without --recompute; of the checkpoint,
and of a model in which layers are nearly all: 12 of width 1,024 with the embedded default's tokenizer,
random weights. Each is train.py in processes of its own but for its plan: a step of one example on each
rank, so that there are averages, then one of two micro-batches, both of the first examples that come to
--tokens, so that what is estimated is what is trained. GB of rank 0:

  estimate  estimate.memory() and what the process holds before the model
  live      the most that was not free: what the process held before the model, and what malloc has handed out
            since, looked at every 5 ms, so that what lives shorter may be missed
  peak      of resident memory, as metrics.jsonl has it
  holes     peak less live: what the C library holds free between blocks

The last line printed is one JSON object.
"""
import argparse
import contextlib
import ctypes
import itertools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench.common import REPOSITORY, child, cores, hardware, json_child, print_table

RUNS = ((1, False), (2, False), (2, True), (4, True))   # ranks, --shard
WIDE = {"num_hidden_layers": 12, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 64}


class _Allocator(ctypes.Structure):
    """glibc's struct mallinfo2."""
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
        "keepcost")]


class Live(threading.Thread):
    """Looks every 5 ms at how much malloc has handed out; most: bytes above what it was at first."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.look = ctypes.CDLL(None).mallinfo2
        self.look.restype = _Allocator
        self.most, self.first = 0, self.now()

    def now(self) -> int:
        info = self.look()
        return info.uordblks + info.hblkhd

    def run(self) -> None:
        while True:
            self.most = max(self.most, self.now() - self.first)
            time.sleep(0.005)


def one(args: argparse.Namespace) -> None:
    """A run of train.py, on each of its ranks; rank 0 writes the result and ends."""
    import numpy as np
    import torch

    from eval import estimate
    import data
    import model
    from runtime import distributed
    import train
    from runtime.machine import peak_memory_mb
    from model import read_config

    cpu = torch.device("cpu")
    seen = {"largest": 0, "trained": 0, "other": 0}
    collate, load_model, Reserve = data.collate, model.load_model, train.Reserve

    def full(lengths: np.ndarray, *_: object) -> list:
        first = np.arange(np.searchsorted(lengths.cumsum(), args.tokens, "right"))
        return [[[first[:1]]] * args.ranks, [[first, first]] * args.ranks]

    def counting(*arguments: object) -> object:
        batch = collate(*arguments)
        tokens, trained = len(batch.ids), len(batch.rows)
        for name, count in (("largest", tokens), ("trained", trained), ("other", tokens - trained)):
            seen[name] = max(seen[name], count)
        return batch

    class Later(Reserve):
        """Begins with the model: what it takes is not of the process before."""
        def __init__(self, size: int) -> None:
            self.size = size

    def watching(*arguments: object) -> object:
        begun.update(program=peak_memory_mb(cpu) * 2**20, live=Live())
        begun["live"].start()
        Reserve.__init__(begun["reserve"], begun["reserve"].size)
        return load_model(*arguments)

    begun: dict = {}
    train.Reserve = lambda size: begun.setdefault("reserve", Later(size))
    data.collate, model.load_model, data.plan = counting, watching, full
    train.checkpoint.export = lambda *_: None
    flags = ["--model", args.model, "--train-data", *args.train_data, "--max-length", "1024", "--max-steps",
             "2", "--micro-batch-tokens", str(max(args.tokens, 1024)), "--device", "cpu", "--cache-dir",
             args.folder, "--output-dir", f"{args.folder}/run", "--overwrite",
             *(["--shard"] if args.shard else []), *(["--recompute"] if args.recompute else [])]
    with contextlib.redirect_stdout(sys.stderr):
        finish = os._exit
        os._exit = lambda status: None      # how train.py ends under torchrun
        status = train.run(flags)
    assert status == 0
    if distributed.is_main():
        parts = estimate.memory(read_config(Path(args.model)), seen, torch.bfloat16, args.ranks, args.shard,
                                args.recompute, False)
        Path(args.result).write_text(json.dumps({
            **seen, "parts": parts, "program": begun["program"],
            "estimate_gb": (sum(parts.values()) + begun["program"]) / 1e9,
            "live_gb": (begun["live"].most + begun["program"]) / 1e9,
            "peak_gb": peak_memory_mb(cpu) * 2**20 / 1e9}))
    sys.stderr.flush()
    finish(0)


def make_wide(folder: Path) -> None:
    """A checkpoint of random weights that is nearly all layers."""
    from model import Llama, ModelConfig, init_weights
    from runtime.weights import save_model
    source = REPOSITORY / "quickstart" / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, folder / name)
    model = Llama(ModelConfig.from_dict({**json.loads((source / "config.json").read_text()), **WIDE}))
    init_weights(model, 0)
    save_model(model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint folder")
    parser.add_argument("--train-data", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch, at most")
    parser.add_argument("--threads", type=int, default=cores(), help="of all ranks together")
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        return make_wide(args.make)
    if args.ranks:
        return one(args)
    machine = hardware()
    print(f"{machine['cpu']}, {args.threads} threads, torch {machine['versions'].get('torch')}")
    widths = [14, 7, 13, 13, 9, 10, 8, 8, 8]
    print_table(["model", "ranks", "", "", "tokens", "estimate", "live", "peak", "holes"], [], widths)
    runs = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        child(["-m", "bench.estimate", "--model", "", "--train-data", "", "--make", f"{folder}/wide"],
              args.threads)     # not here: Linux counts what a process was forked from into its peak
        for model in (args.model, f"{folder}/wide"):
            child([str(REPOSITORY / "train.py"), "--model", model, "--train-data", *args.train_data,
                   "--max-length", "1024", "--cache-dir", folder, "--dry-run"],     # so that no run tokenises
                  args.threads)
            for (ranks, shard), recompute in itertools.product(RUNS, (False, True)):
                options = [word for word, on in (("--shard", shard), ("--recompute", recompute)) if on]
                launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
                run = json_child([*(launch if ranks > 1 else []), "-m", "bench.estimate", "--ranks",
                                  str(ranks), *options, "--folder", folder, "--model", model, "--train-data",
                                  *args.train_data, "--tokens", str(args.tokens)],
                                 max(1, args.threads // ranks))
                name, holes = Path(model).name, run["peak_gb"] - run["live_gb"]
                shown = [run["estimate_gb"], run["live_gb"], run["peak_gb"], holes]
                print_table([name, str(ranks), "--shard" * shard, "--recompute" * recompute,
                             f"{run['largest']:,}", *(f"{x:.2f}" for x in shown)], [], widths)
                runs.append({"model": name, "ranks": ranks, "shard": shard, "recompute": recompute, **run})
    print(json.dumps({"hardware": machine, "runs": runs}))


if __name__ == "__main__":
    main()
