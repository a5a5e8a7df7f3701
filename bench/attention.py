"""Attention over packed documents: kernels.attention next to PyTorch's fused kernel.

    python -m bench.attention --heads 9 --key-heads 3 --head-dim 64

The fused kernel (scaled_dot_product_attention) is given one document at a time. Forward and backward in bf16
on a CPU, in turn, the shortest of --repeats; and how far each is from attention_reference() in fp32: the
largest relative error, in the Euclidean norm, of output and gradients. `records`: documents as long as
records are, drawn from a log-normal distribution with a mean near 200.
"""
from argparse import Namespace

from bench.common import cores, hardware, make_parser, print_machine, print_table
from runtime.start import answer_flags, run_program


def parse_args(argv: list[str]) -> Namespace:
    parser = make_parser("attention", __doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=cores())
    args = parser.parse_args(argv)
    if args.heads % args.key_heads:
        raise ValueError(f"--key-heads {args.key_heads}: must divide --heads {args.heads}")
    return args


answer_flags(__name__, parse_args)

import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention, attention_reference
from runtime.machine import keep_freed_memory


def fused(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    bounds = cu_seqlens.tolist()
    outs = [F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True,
                                           enable_gqa=True)[0].transpose(0, 1)
            for a, b in zip(bounds, bounds[1:])]
    return torch.cat(outs)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    machine = hardware()
    print_machine(machine, args.threads)
    drawn = np.random.default_rng(0).lognormal(4.9, 0.8, 1000).clip(8, 1024).astype(int)
    rows = {str(n): [n] * max(1, args.tokens // n) for n in args.lengths}
    rows["records"] = drawn[:max(1, int((drawn.cumsum() <= args.tokens).sum()))].tolist()
    results, table = [], []
    for name, lengths in rows.items():
        n, cu_seqlens = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
        make = torch.Generator().manual_seed(0)
        inputs = [torch.randn(n, h, args.head_dim, generator=make).bfloat16().requires_grad_()
                  for h in (args.heads, args.key_heads, args.key_heads)]
        grad = torch.randn(n, args.heads, args.head_dim, generator=make).bfloat16()
        exact_inputs = [x.detach().float().requires_grad_() for x in inputs]
        out = attention_reference(*exact_inputs, cu_seqlens)
        exact = [out.detach(), *torch.autograd.grad(out, exact_inputs, grad.float())]
        del out
        times: dict[str, list[float]] = {"fused": [], "ours": []}
        errors = {}
        for _ in range(args.repeats):
            for which, function in (("fused", fused), ("ours", attention)):
                began = time.perf_counter()
                out = function(*inputs, cu_seqlens)
                tensors = [out, *torch.autograd.grad(out, inputs, grad)]
                times[which].append(1000 * (time.perf_counter() - began))
                errors[which] = max(((a.float() - b).norm() / b.norm()).item()
                                    for a, b in zip(tensors, exact))
        best = {which: min(values) for which, values in times.items()}
        table.append([str(len(lengths)), name, f"{best['fused']:.0f}", f"{best['ours']:.0f}",
                      f"{best['fused'] / best['ours']:.1f}", f"{errors['fused']:.2%}",
                      f"{errors['ours']:.2%}"])
        results.append({"documents": lengths, "milliseconds": times, "relative_error": errors})
    print_table(["documents", "of tokens", "fused ms", "ours ms", "ratio", "error: fused", "ours"], table,
                [11, 11, 11, 9, 8, 14, 9])
    print(json.dumps({"hardware": machine, "results": results}))


if __name__ == "__main__":
    run_program(main)
