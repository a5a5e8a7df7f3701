"""Flags of TRL, axolotl, LLaMA-Factory and transformers' Trainer, and what does the same here.

    answer("--learning_rate", "1e-4", {"--lr"})     -> "--learning_rate 1e-4: here it is --lr 1e-4"
"""
import difflib
import textwrap
from collections.abc import Collection

_FULL = "not done; all weights are trained (full fine-tuning)"
_PACKED = "always so: a step's examples are packed, and attend only to themselves"
_SHARD = "here it is --shard, under torchrun"
_KERNELS = "not needed; --compile and the kernels here do that"
_FILES = "here it is --train-data {}, files of records in any usual layout"
_TRACK = "here it is --track wandb, which reads WANDB_PROJECT and its other variables"
_STEP = ("here --batch-size is the examples of a whole step, over all ranks, and --micro-batch-tokens is "
         "what one pass takes")
_COMPLETIONS = "here it is --loss it", "here it is --loss im"

# {the name with dashes: a sentence}, in which {} is the value that was given. Two sentences: if the value is
# true, and if it is false. A name that ends in * stands for all that begin so.
HABITS: dict[str, str | tuple[str, str]] = {
    # model and data
    "model-name-or-path": "here it is --model {}",
    "base-model": "here it is --model {}",
    "tokenizer-name*": "not needed; the tokenizer is the one in the folder of --model",
    "trust-remote-code": "not done; no code from a model's folder is run",
    "attn-implementation": _KERNELS,
    "flash-att*": _KERNELS,
    "dataset-name": _FILES,
    "dataset": _FILES,
    "datasets": _FILES,
    "train-file": _FILES,
    "dataset-text-field": "here records have prompts and completions; --columns reads other names",
    "dataset-split": "here it is --train-data owner/name:SPLIT",
    "dataset-train-split": "here it is --train-data owner/name:SPLIT",
    "data-path": _FILES,
    "validation-file": "here it is --eval-data {}",
    "eval-dataset": "here it is --eval-data {}",
    "val-size": "here it is --eval-fraction {}",
    "val-set-size": "here it is --eval-fraction {}",
    "max-samples": "here it is --max-examples {}",
    "max-train-samples": "here it is --max-examples {}",
    "max-seq-length": "here it is --max-length {}",
    "max-seq-len": "here it is --max-length {}",
    "sequence-len": "here it is --max-length {}",
    "cutoff-len": "here it is --max-length {}",
    "model-max-length": "here it is --max-length {}",
    "block-size": "here it is --max-length {}",
    "chat-template*": "here it is --template {}",
    "packing*": _PACKED,
    "sample-packing*": _PACKED,
    "neat-packing": _PACKED,
    "padding-free": _PACKED,
    "pad-to-*": _PACKED,
    "group-by-length": _PACKED,
    "preprocessing-num-workers": "not needed; records are tokenized once and kept in --cache-dir",
    "dataset-num-proc": "not needed; records are tokenized once and kept in --cache-dir",
    "dataloader-*": "not needed; tokenized records are read from --cache-dir",
    # loss
    "completion-only-loss": _COMPLETIONS,
    "assistant-only-loss": _COMPLETIONS,
    "train-on-responses-only": _COMPLETIONS,
    "train-on-inputs": _COMPLETIONS[::-1],
    "train-on-prompt": _COMPLETIONS[::-1],
    "mask-history": "here a message of a record is left out with \"weight\": 0",
    "roles-to-train": "here --loss it trains on assistant messages, --loss im on all messages",
    "neftune-noise-alpha": "here it is --neftune-alpha {}",
    "label-smoothing*": "not done; the loss is the plain cross-entropy",
    "loss-type": "not done; the loss is the plain cross-entropy, of the spans that --loss names",
    # optimization
    "num-train-epochs": "here it is --epochs {}",
    "num-epochs": "here it is --epochs {}",
    "per-device-train-batch-size": _STEP,
    "per-gpu-train-batch-size": _STEP,
    "micro-batch-size": _STEP,
    "gradient-accumulation-steps": "not needed; a step has --batch-size examples, over all ranks, in as many "
                                   "micro-batches as fit",
    "per-device-eval-batch-size": "not needed; --micro-batch-tokens holds for evaluations, too",
    "learning-rate": "here it is --lr {}",
    "lr-scheduler*": "here it is --schedule {}",
    "warmup-steps": "here it is --warmup-ratio, a fraction of the steps",
    "max-grad-norm": "here it is --clip-grad-norm {}",
    "adam-beta1": "here it is --beta1 {}",
    "adam-beta2": "here it is --beta2 {}",
    "adam-epsilon": "here it is --adam-eps {}",
    "optim": "not done; the optimizer is AdamW, made by make_optimizer() in train.py",
    "optimizer": "not done; the optimizer is AdamW, made by make_optimizer() in train.py",
    "data-seed": "here it is --seed {}",
    # machine
    "bf16": ("here it is --dtype bf16, the default", "here it is --dtype fp32"),
    "fp16": ("not done; --dtype is bf16 or fp32", "not needed; it is never fp16"),
    "torch-dtype": "here it is --dtype, bf16 or fp32",
    "gradient-checkpointing": ("here it is --recompute", "here it is --no-recompute, the default"),
    "deepspeed": _SHARD,
    "fsdp*": _SHARD,
    "ddp-*": "not needed; under torchrun the ranks share each step",
    "local-rank": "not needed; torchrun tells each rank its number",
    "torch-compile": ("here it is --compile", "here it is --no-compile"),
    "use-liger*": _KERNELS,
    "enable-liger*": _KERNELS,
    "liger-*": _KERNELS,
    "use-unsloth": _KERNELS,
    "use-cpu": "here it is --device cpu",
    "no-cuda": "here it is --device cpu",
    "use-peft": _FULL,
    "peft-*": _FULL,
    "lora-*": _FULL,
    "use-lora": _FULL,
    "adapter": _FULL,
    "finetuning-type": _FULL,
    "load-in-*": _FULL,
    "quantization-*": _FULL,
    "bnb-*": _FULL,
    # output
    "report-to": "here it is --track {}",
    "wandb-*": _TRACK,
    "run-name": "here it is the name of the folder in --output-dir",
    "logging-dir": "here it is --output-dir, with --track tensorboard",
    "logging-steps": "here it is --log-every {}",
    "save-steps": "here it is --save-every {}",
    "save-strategy": "here it is --save-every, a number of steps",
    "save-total-limit": "here it is --keep-checkpoints {}",
    "eval-steps": "here it is --eval-every {}",
    "eval-strategy": "here it is --eval-every, a number of steps",
    "evaluation-strategy": "here it is --eval-every, a number of steps",
    "predict-with-generate": "here it is --eval-generate, a number of prompts",
    "resume-from-checkpoint": "not needed: the same command resumes; --resume DIR names another checkpoint",
    "overwrite-output-dir": "here it is --overwrite",
    "push-to-hub": "not done; hf upload OWNER/NAME OUTPUT/final does it",
    "hub-*": "not done; hf upload OWNER/NAME OUTPUT/final does it",
    "stage": "not needed; train.py does instruction tuning (sft) alone",
    "do-train": "not needed; train.py trains, and evaluates with --eval-data",
    "do-eval": "not needed; train.py trains, and evaluates with --eval-data",
}


def answer(name: str, value: str | None, flags: Collection[str]) -> str:
    """What to tell somebody who gave a flag that a program does not have, in lines of 79 columns. name: as it
    was given, with or without dashes in front; value: what followed it, if anything; flags: the program's."""
    plain = name.lstrip("-").lower().replace("_", "-")
    sentence = _sentence(plain, value, flags)
    if not sentence:
        begun = [flag for flag in flags if len(plain) > 1 and flag.startswith(f"--{plain}")]
        near = begun or difflib.get_close_matches(f"--{plain}", flags, 1, 0.75)
        sentence = f"unrecognized; is {near[0]} meant?" if near else "unrecognized"
    given = name if value is None else f"{name} {value}"
    # The first line will stand behind "error: ".
    return textwrap.fill(f"{given}: {sentence}", 79, initial_indent=" " * 7, subsequent_indent=" " * 4,
                         break_long_words=False, break_on_hyphens=False)[7:]


def _sentence(plain: str, value: str | None, flags: Collection[str]) -> str:
    """What the flag is here; "" if nothing is known, or if that flag is another program's. plain: its name,
    with dashes and in small letters."""
    if f"--{plain}" in flags:
        sentence: str | tuple[str, str] = f"here it is --{plain} {{}}"
    else:
        found = [key for key in HABITS if plain == key or key[-1] == "*" and plain.startswith(key[:-1])]
        sentence = HABITS[found[0]] if found else ""
    if isinstance(sentence, tuple):
        sentence = sentence[(value or "").lower() in ("false", "no", "0")]
    named = [word.strip(",;:.") for word in sentence.split() if word.startswith("--")]
    if named and named[0] not in flags:
        return ""
    return sentence.replace(" {}", "" if value is None else f" {value}")
