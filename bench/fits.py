"""What fits where: memory of a rank by estimate.memory(), the sum that train.py --dry-run prints, for models
of 1 to 70 billion parameters on 1 to 64 GPUs.

    python -m bench.fits [--tokens 4096]

Arithmetic, in bf16 over fp32 state, for micro-batches of so many tokens that are all trained on, several of
them a step. Shapes stand below, as in the checkpoints' config.json; nothing is downloaded. The last two
columns: the fewest GPUs of 24 and 80 GiB of which each holds its sum and has a tenth left for what is not
counted: the CUDA context, workspaces of cuBLAS and NCCL, and what PyTorch's allocator cannot reuse. That
tenth is an assumption, measured on no GPU.
"""
import argparse

import torch

from eval import estimate
from bench.common import print_table
from model import ModelConfig, parameter_count

GPUS = (1, 2, 4, 8, 16, 32, 64)
CARDS = (24, 80)        # GiB
USABLE = 0.9            # of a card
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "vocab_size", "tie_word_embeddings")
SHAPES = {"TinyLlama-1.1B": (2048, 5632, 22, 32, 4, 32000, False),
          "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True),
          "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000, False),
          "Llama-2-13B": (5120, 13824, 40, 40, 40, 32000, False),
          "Llama-2-70B": (8192, 28672, 80, 64, 8, 32000, False)}
MODES = {"DDP": (False, False), "DDP +recompute": (False, True),        # --shard, --recompute
         "--shard": (True, False), "--shard +recompute": (True, True)}


def read_shape(name: str) -> ModelConfig:
    return ModelConfig.from_dict({"model_type": "llama", **dict(zip(NAMES, SHAPES[name]))})


def gigabytes(config: ModelConfig, gpus: int, shard: bool, recompute: bool, tokens: int) -> float:
    """Of one rank, 1e9 bytes. --shard does nothing on one GPU."""
    packed = {"largest": tokens, "trained": tokens, "other": 0}
    parts = estimate.memory(config, packed, torch.bfloat16, gpus, shard and gpus > 1, recompute, False,
                            cuda=True)
    return sum(parts.values()) / 1e9


def fewest(sums: list[float], card: int) -> str:
    """The first of GPUS on which a rank's sum leaves the margin free on a card of so many GiB."""
    return next((str(n) for n, gb in zip(GPUS, sums) if gb <= USABLE * card * 2**30 / 1e9), "never")


def rows(name: str, tokens: int) -> list[list[str]]:
    config, out = read_shape(name), []
    for mode, (shard, recompute) in MODES.items():
        sums = [gigabytes(config, n, shard, recompute, tokens) for n in GPUS]
        shown = [f"{gb:.1f}" if gb < 100 else f"{gb:.0f}" for gb in sums]
        out.append([f"  {mode}", *(shown if shard else shown[:1] + ["="] * (len(GPUS) - 1)),
                    *(fewest(sums, card) for card in CARDS)])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch, all trained on")
    args = parser.parse_args()
    if args.tokens < 1:
        parser.error(f"--tokens {args.tokens}: must be 1 or more")
    widths = [20] + [6] * len(GPUS) + [8] * len(CARDS)
    print_table(["GB a rank, on", *(str(n) for n in GPUS), *(f"{card} GiB" for card in CARDS)], [], widths)
    for name in SHAPES:
        count = parameter_count(read_shape(name))
        print(f"{name}, {count / 1e9:.2f} billion parameters, {16 * count / 1e9:,.0f} GB of fp32 state")
        for row in rows(name, args.tokens):
            print_table(row, [], widths)


if __name__ == "__main__":
    main()
