"""Logits and losses before the first step next to those of transformers, on real records, in fp32.

    python -m bench.parity --model FOLDER --train-data FILE [--template auto] [--examples 16]

Packs the first examples into one row. Its logits and its IT and IM losses are compared with what transformers
computes for each example by itself. Needs transformers.
"""
from bench.common import make_parser
from config import Config, check_files
from config import parse_args as parse_flags
from runtime.start import answer_flags, run_program


def parse_args(argv: list[str]) -> tuple[int, dict[str, Config]]:
    """The number of examples, and a run's flags by loss."""
    parser = make_parser("parity", __doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train-data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--examples", type=int, default=16)
    args = parser.parse_args(argv)
    flags = ["--model", args.model, "--train-data", *args.train_data, "--template", args.template,
             "--dtype", "fp32", "--device", "cpu"]
    configs = {loss: parse_flags([*flags, "--loss", loss]) for loss in ("it", "im")}
    check_files(configs["it"])
    return args.examples, configs


answer_flags(__name__, parse_args)

import json

import numpy as np
import torch
import torch.nn.functional as F

import train
from data import collate
from loss import coefficients


def main(argv: list[str]) -> None:
    from transformers import AutoModelForCausalLM
    count, configs = parse_args(argv)
    config = configs["it"]
    source, device = train.open_source(config), torch.device("cpu")
    dataset, _, _ = train.load_data(config, source)
    examples = np.arange(min(count, len(dataset)))
    model = train.prepare_model(config, source.folder, device)
    reference = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    result = {"examples": len(examples), "tokens": int(dataset.lengths[examples].sum())}
    with torch.no_grad():
        for loss, config in configs.items():
            table = coefficients(dataset.counts[examples], config.span_weights, config.normalize)
            batch = collate(dataset, examples, table)
            if loss == "it":    # the logits are the same for every loss
                logits = model(batch.ids, batch.positions, batch.cu_seqlens) @ model.head_weight.T
                documents = batch.ids.split(batch.cu_seqlens.diff().tolist())
                expected = torch.cat([reference(ids[None]).logits[0] for ids in documents])
                result["largest_logit_difference"] = (logits - expected).abs().max().item()
                result["largest_logit"] = expected.abs().max().item()
            value, _, _ = train.micro_batch_loss(model, None, batch, config, 0, False)
            by_transformers = F.cross_entropy(expected[batch.trained], batch.targets[batch.trained])
            result[f"{loss}_loss"] = value.item()
            result[f"{loss}_loss_transformers"] = by_transformers.item()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_program(main)
