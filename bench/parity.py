"""The model and the loss before the first step against transformers, on real records, in fp32.

    python -m bench.parity --model FOLDER --train-data FILE [--template auto] [--examples 16]

Packs the first examples into one row, and compares logits and the IT and IM losses with what transformers
gives for each example on its own. Needs transformers.
"""
import argparse
import json

import numpy as np
import torch

from chat import Tokenizer, load_template
from data import CACHE_DIR, collate, load_dataset
from kernels.head import weighted_nll
from loss import coefficients, span_weights
from model import load_model
from runtime.weights import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train-data", nargs="+", required=True)
    parser.add_argument("--template", default="auto")
    parser.add_argument("--examples", type=int, default=16)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM
    folder = resolve_model(args.model)
    tokenizer = Tokenizer(folder)
    dataset = load_dataset(args.train_data, tokenizer, load_template(args.template, tokenizer), 2048,
                           "truncate", CACHE_DIR)
    examples = np.arange(min(args.examples, len(dataset)))
    mine, theirs = load_model(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result = {"examples": len(examples), "tokens": int(dataset.lengths[examples].sum())}
    with torch.no_grad():
        table = np.ones((len(examples), 5))
        batch = collate(dataset, examples, table)
        hidden = mine(batch.ids, batch.positions, batch.cu_seqlens)
        logits = hidden @ mine.head_weight.T
        expected = torch.cat([theirs(ids[None]).logits[0] for ids in batch.ids.split(
            batch.cu_seqlens.diff().tolist())])
        result["largest_logit_difference"] = (logits - expected).abs().max().item()
        result["largest_logit"] = expected.abs().max().item()
        for loss in ("it", "im"):
            weights = span_weights(loss)
            scale = collate(dataset, examples, coefficients(dataset.counts[examples], weights, "token"))
            rows = scale.rows
            value, _ = weighted_nll(hidden[rows], mine.head_weight, batch.targets[rows],
                                    scale.coefficients[rows])
            reference = torch.nn.functional.cross_entropy(expected[rows], batch.targets[rows])
            result[f"{loss}_loss"], result[f"{loss}_loss_transformers"] = value.item(), reference.item()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
