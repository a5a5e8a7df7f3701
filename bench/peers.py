"""One run of another trainer, in its own process; bench.training starts it. Not a trainer to use.

    python -m bench.peers trl-packed --model DIR --records FILE --steps 6 --folder DIR --result FILE

records: what data.export writes, one {"input_ids", "labels"} a line, so all train on the same ids and
targets. The result holds, for each step, seconds (from the end of the step before, so with fetching data),
real tokens, trained tokens and computed ones (with padding), and the peak memory after the last step.
"""
import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

ADAMW = dict(lr=2e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True)    # train.py's defaults
CLIP = 1.0


class Meter:
    """Counts what a batch holds and times steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.trained: list[int] = []
        self.computed: list[int] = []
        self.at = time.monotonic()

    def start(self) -> None:
        self.at = time.monotonic()

    def batch(self, labels: Tensor, tokens: int) -> None:
        """labels: (B, L) unshifted; tokens: real targets of the batch, each example's tokens less one."""
        self.tokens.append(tokens)
        self.trained.append(int((labels[:, 1:] != -100).sum()))
        self.computed.append(labels.numel())

    def step(self) -> None:
        now = time.monotonic()
        self.seconds.append(now - self.at)
        self.at = now

    def result(self, loss: float | None, note: str) -> dict:
        """A trainer may fetch batches ahead: those beyond the last step are not counted."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB on Linux, bytes on a Mac
        peak /= 2**20 if sys.platform == "linux" else 2**30
        n = len(self.seconds)
        return {"seconds": self.seconds, "tokens": self.tokens[:n], "trained": self.trained[:n],
                "computed": self.computed[:n], "peak_memory_gb": peak, "loss": loss, "note": note}


def read(file: str) -> list[dict]:
    with open(file, encoding="utf-8") as lines:
        return [{key: record[key] for key in ("input_ids", "labels")} for record in map(json.loads, lines)]


def pad(examples: list[dict], pad_id: int) -> dict[str, Tensor]:
    longest = max(len(x["input_ids"]) for x in examples)
    ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), -100)
    mask = torch.zeros((len(examples), longest), dtype=torch.int64)
    for row, example in enumerate(examples):
        n = len(example["input_ids"])
        ids[row, :n], labels[row, :n] = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])
        mask[row, :n] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def load_transformers(folder: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


# ---------------------------------------------------------------- TRL


def run_trl(args: argparse.Namespace, packed: bool) -> dict:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = max(1, args.micro_batch_tokens // args.max_length) if packed else args.padded_batch
    config = SFTConfig(
        output_dir=args.folder, per_device_train_batch_size=rows, gradient_accumulation_steps=1,
        max_steps=args.steps, max_length=args.max_length, packing=packed, gradient_checkpointing=False,
        bf16=True, use_cpu=True, learning_rate=ADAMW["lr"], adam_beta1=ADAMW["betas"][0],
        adam_beta2=ADAMW["betas"][1], adam_epsilon=ADAMW["eps"], max_grad_norm=CLIP,
        optim="adamw_torch_fused", lr_scheduler_type="constant", save_strategy="no", report_to="none",
        disable_tqdm=True, logging_steps=10**6, seed=0)
    meter = Meter()

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            meter.start()

        def on_step_end(self, *_: object, **__: object) -> None:
            meter.step()

    trainer = SFTTrainer(
        load_transformers(args.model), config, train_dataset=Dataset.from_list(read(args.records)),
        callbacks=[Timer()], processing_class=AutoTokenizer.from_pretrained(args.model))
    collate = trainer.data_collator

    def counted(examples: list[dict]) -> dict[str, Tensor]:
        documents = sum(len(x["seq_lengths"]) for x in examples) if packed else len(examples)
        batch = collate(examples)
        meter.batch(batch["labels"], sum(len(x["input_ids"]) for x in examples) - documents)
        return batch

    trainer.data_collator = counted
    loss = trainer.train().training_loss
    layout = "laid end to end" if trainer.padding_free else "padded"
    return meter.result(loss, f"{rows} rows of at most {args.max_length}, {layout}; sdpa, autocast over fp32")


# ---------------------------------------------------------------- a plain loop over transformers


def run_transformers(args: argparse.Namespace) -> dict:
    from transformers import AutoConfig

    records = sorted(read(args.records), key=lambda x: len(x["input_ids"]))
    batches: list[list[dict]] = [[]]
    for record in records:      # ascending, so a record's length is its batch's
        if (len(batches[-1]) + 1) * len(record["input_ids"]) > args.micro_batch_tokens and batches[-1]:
            batches.append([])
        batches[-1].append(record)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    pad_id = AutoConfig.from_pretrained(args.model).pad_token_id or 0
    model = load_transformers(args.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    meter = Meter()
    for step in range(args.steps):
        chosen = batches[order[step % len(order)]]
        batch = pad(chosen, pad_id)
        meter.batch(batch["labels"], sum(len(x["input_ids"]) - 1 for x in chosen))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        meter.step()
    padding = 1 - sum(meter.tokens) / sum(meter.computed)
    return meter.result(value, f"sorted by length, {padding:.1%} padding, sdpa, autocast over fp32")


# ---------------------------------------------------------------- litgpt


class Enough(Exception):
    """Raised from the data loader after the last measured step: litgpt would go on to save its checkpoint."""


def litgpt_checkpoint(model: str, folder: Path) -> Path:
    """Convert the checkpoint with litgpt's own script; the name is that of a model of the same shape."""
    from litgpt.config import configs
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
    raw = json.loads((Path(model) / "config.json").read_text())
    fields = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_head": "num_attention_heads",
              "intermediate_size": "intermediate_size", "padded_vocab_size": "vocab_size"}
    names = [config["name"] for config in configs
             if all(config.get(theirs) == raw.get(name) for theirs, name in fields.items())]
    if not names:
        raise RuntimeError("litgpt has no configuration of this model's shape")
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(model).resolve().iterdir():
        if file.suffix in (".json", ".safetensors"):
            (folder / file.name).symlink_to(file)
    convert_hf_checkpoint(folder, model_name=names[0])
    return folder


def run_litgpt(args: argparse.Namespace) -> dict:
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.finetune.full import setup
    from torch.utils.data import DataLoader

    checkpoint = litgpt_checkpoint(args.model, Path(args.folder) / "checkpoint")
    records = [{**x, "token_counts": {}} for x in read(args.records)]
    meter = Meter()

    def collate(examples: list[dict], counted: bool = True) -> dict:
        if counted and meter.tokens:
            meter.step()
        if len(meter.seconds) == args.steps:
            raise Enough
        if counted and not meter.tokens:
            meter.start()
        batch = pad(examples, 0)
        lengths = torch.tensor([len(x["input_ids"]) for x in examples])
        if counted:
            meter.batch(batch["labels"], int((lengths - 1).sum()))
        return {"input_ids": batch["input_ids"], "labels": batch["labels"],
                "token_counts": {"raw": lengths, "raw_plus_prompt_template": lengths}}

    class Records(DataModule):
        def connect(self, *_: object, **__: object) -> None:
            pass

        def train_dataloader(self) -> DataLoader:
            return DataLoader(records, args.padded_batch, shuffle=True, collate_fn=collate,
                              generator=torch.Generator().manual_seed(0))

        def val_dataloader(self) -> DataLoader:  # litgpt insists on a look before training: one short record
            return DataLoader([min(records, key=lambda x: len(x["input_ids"]))],
                              collate_fn=lambda examples: collate(examples, False))

    try:
        setup(checkpoint, Path(args.folder) / "out", "bf16-mixed", 1, data=Records(),
              train=TrainArgs(save_interval=None, global_batch_size=args.padded_batch, epochs=10**6,
                              micro_batch_size=args.padded_batch, lr_warmup_steps=1,
                              max_steps=args.steps + 1, max_seq_length=args.max_length),
              eval=EvalArgs(interval=10**9, max_new_tokens=1, final_validation=False),
              optimizer={"class_path": "torch.optim.AdamW", "init_args": dict(ADAMW)})
    except Enough:
        pass
    return meter.result(None, f"{args.padded_batch} rows, padded; bf16-mixed; no clipping, head not tied")


PEERS = {"trl-packed": lambda args: run_trl(args, True), "trl-padded": lambda args: run_trl(args, False),
         "transformers": run_transformers, "litgpt": run_litgpt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("peer", choices=tuple(PEERS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--records", required=True)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--padded-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--folder", required=True, help="for what the trainer writes")
    parser.add_argument("--result", required=True, metavar="FILE")
    args = parser.parse_args()
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    Path(args.result).write_text(json.dumps(PEERS[args.peer](args)))


if __name__ == "__main__":
    main()
