"""The model card in final/README.md: from what a model was made, by which loss, and what that changed.

It names files, never their folders, and nothing of the machine or the user, so that final/ can be published
as it is. It holds no times either: the same run writes the same bytes, interrupted or not.
"""
import dataclasses
import glob
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Sized
from pathlib import Path

import torch

from runtime.flags import flag_name, is_boolean
from runtime.foreign import printable
from runtime.report import changes

# Flags that hold paths, and those that may change on resume but say something about the result.
PATHS, TOLD = ("model", "train_data", "mix", "eval_data", "template"), ("eval_data", "eval_generate")


def bare_name(path: str) -> str:
    """A path without its folders: /home/a/smollm2 -> smollm2, runs/im/final -> im, data/*.jsonl -> *.jsonl. A
    hub id stays as it is. Characters that would be markup are replaced."""
    full = Path(path).expanduser()
    if full.exists() or full.is_absolute() or glob.has_magic(path):
        path = [part for part in Path(os.path.abspath(full)).parts if part != "final"][-1]
    return re.sub("[|`<>\n\t]", "?", printable(path))


def bare_share(word: str) -> str:
    """A FILE=SHARE of --mix, with the file's bare name."""
    file, equals, share = word.rpartition("=")
    return bare_name(file) + equals + share


def bare_names(paths: list[str]) -> list[str]:
    """bare_name() of each; those that are the same get numbers: test.jsonl, test.jsonl (2)."""
    names = list(map(bare_name, paths))
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name
            for i, name in enumerate(names)]


def command(config: object) -> str:
    """The command that repeats the run, with bare names. config: config.Config."""
    words = ["python", "train.py"]
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        told = not field.metadata["free"] or field.name in TOLD
        if not told or value == default or value in ("", []):
            continue
        if is_boolean(field):
            words.append(flag_name(field.name) if value else flag_name(f"no_{field.name}"))
            continue
        values = map(str, value if isinstance(value, list) else [value])
        if field.name in PATHS:
            values = map(bare_share if field.name == "mix" else bare_name, values)
        words += [flag_name(field.name), *values]
    return shlex.join(words)


def table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def model_card(config: object, dataset: object, examples: Sized, kinds: tuple[str, ...], steps: int,
               before: dict, after: dict) -> str:
    """The card as Markdown. config: config.Config; dataset: data.Dataset; examples: those of an
    epoch, by index; kinds: names of the columns of dataset.counts; steps: of the run; before, after: the
    first and the last line of eval.jsonl, or {}."""
    base = bare_name(config.model)
    of_file = Counter(dataset.origins[examples, 0].tolist())
    names = bare_names(dataset.files)
    tokens = dataset.counts[examples].sum(0)
    text = f"""---
base_model: {json.dumps(base.partition("@")[0])}
library_name: transformers
pipeline_tag: text-generation
tags: [instruction-tuning, spantune]
---
# {base}, instruction-tuned

Made from `{base}` by spantune's `train.py`, which wrote this card, with PyTorch {torch.__version__}:
{steps:,} steps of up to {config.batch_size:,} examples.

## Training data

{table(["file", "examples in an epoch"], [[name, f"{of_file[i]:,}"] for i, name in enumerate(names)])}

The loss (`--loss {config.loss} --normalize {config.normalize}`) weighs the kinds of span like this:

{table(["span", "tokens in an epoch", "weight"],
       [[kind, f"{count:,}", f"{weight:g}"] for kind, count, weight in zip(kinds, tokens, config.span_weights)
        if count])}
"""
    if before and after:
        shown = dict(zip(after["data"], bare_names([Path(name).name for name in after["data"]])))
        rows = [[shown[name], kind, f"{now['tokens']:,}", "-" if old is None else f"{old:.4f}",
                 f"{now['nll_token_mean']:.4f}"] for name, kind, now, old in changes(before, after)]
        text += f"""
## Evaluation

Held-out NLL in nats a token, at step {before["step"]} and step {after["step"]}:

{table(["data", "span", "tokens", "before", "after"], rows)}
"""
        if "exact_match" in after:
            text += f"\nExact match on {after['answers']:,} held-out answers: {after['exact_match']:.1%}.\n"
    settings = ("max_steps" if config.max_steps else "epochs", "lr", "schedule", "warmup_ratio",
                "weight_decay", "beta1", "beta2", "adam_eps", "clip_grad_norm", "neftune_alpha", "kl_weight",
                "max_length", "overlong", "dtype", "seed")
    return text + f"""
## Settings

{table(["flag", "value"], [[f"`{flag_name(name)}`", getattr(config, name)] for name in settings])}

```
{command(config)}
```
"""
