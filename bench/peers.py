"""One run of another trainer in a process of its own; bench.training starts it.

    python -m bench.peers trl --result FILE -- --model DIR --train-data FILE --batch-size 64

  trl           TRL's SFTTrainer with packing, in rows of --max-length: what its guide advises for speed
  trl-liger     the same with Liger's kernels
  trl-liger-padded  the same without packing, in batches as of trainer
  trainer       transformers' Trainer; records of similar length share a batch of --padded-rows
  transformers  a plain loop; records of similar length share a step, in padded micro-batches of at most
                --micro-batch-tokens

What follows `--` are flags of train.py. With --document N the records are random tokens, N targets each; with
--config the model has random weights. All use PyTorch's sdpa: given packed rows, transformers masks other
documents by their positions. TRL advises flash-attn for that, a package of its own.

Each peer trains on the ids and targets that train.py makes of the records, on its device, with its optimizer
settings and precision, and as near to --batch-size records a step as its micro-batches allow. The result has,
for each step, seconds (loading its data included), real tokens and trained tokens; and the peak memory.
"""
from argparse import Namespace

from bench.common import PEERS, document_length, make_parser, split_flags
from config import Config
from config import parse_args as parse_flags
from runtime.start import answer_flags, run_program


def parse_args(argv: list[str]) -> tuple[Namespace, Config]:
    """Its own flags, and train.py's."""
    parser = make_parser("peers", __doc__, "PEER [flags] -- flags of train.py")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--padded-rows", type=int, default=8, help="records of a micro-batch of trainer")
    parser.add_argument("--document", type=document_length, default=0,
                        help="targets of each synthetic record")
    parser.add_argument("--config", metavar="JSON", help="config.json of a model with random weights")
    parser.add_argument("--result", required=True, metavar="FILE")
    own, passed = split_flags(argv)
    args, config = parser.parse_args(own), parse_flags(passed)
    if bool(args.document) != bool(args.config):
        raise ValueError("--document and --config belong together: give both or neither")
    return args, config


answer_flags(__name__, parse_args)

import json
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import train
from bench.step import synthetic
from runtime.distributed import join_ranks
from runtime.machine import peak_memory_mb


def read_records(config: train.Config, args: Namespace) -> list[dict]:
    """{"input_ids", "labels"} of each example. Labels are not shifted; -100 is not trained on."""
    if args.document:
        config.max_length = args.document + 1
        vocabulary = json.loads(args.config)["vocab_size"]
        dataset = synthetic([args.document] * (4 * config.batch_size), vocabulary)
        usable = range(len(dataset))
    else:
        dataset, usable, _ = train.load_data(config, train.open_source(config))
    trained = config.span_weights != 0
    records = []
    for example in usable:
        tokens = slice(*dataset.offsets[example:example + 2])
        labels = np.where(trained[dataset.kinds[tokens]], dataset.ids[tokens], -100)
        records.append({"input_ids": dataset.ids[tokens].tolist(), "labels": labels.tolist()})
    return records


class Meter:
    """Counts what each micro-batch holds and times steps of `micro_batches`."""

    def __init__(self, micro_batches: int, device: torch.device) -> None:
        self.micro_batches, self.device = micro_batches, device
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.trained: list[int] = []
        self.began = time.monotonic()

    def count(self, tokens: int, trained: int) -> None:
        """A micro-batch. tokens: its real targets; a document of n tokens has n - 1 of them."""
        self.tokens.append(tokens)
        self.trained.append(trained)

    def end_step(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.monotonic()
        self.seconds.append(now - self.began)
        self.began = now

    def result(self, note: str) -> dict:
        def by_step(counts: list[int]) -> list[int]:
            # A trainer may load micro-batches ahead: those after the last step do not count.
            size = self.micro_batches
            return [sum(counts[i * size:(i + 1) * size]) for i in range(len(self.seconds))]

        return {"seconds": self.seconds, "tokens": by_step(self.tokens), "trained": by_step(self.trained),
                "peak_memory_gib": peak_memory_mb(self.device) / 1024, "note": note}


def padded(records: list[dict], pad_id: int) -> dict[str, Tensor]:
    """(B, L) ids, labels and mask, each record padded to the longest."""
    shape = len(records), max(len(record["input_ids"]) for record in records)
    batch = {"input_ids": torch.full(shape, pad_id), "labels": torch.full(shape, -100),
             "attention_mask": torch.zeros(shape, dtype=torch.int64)}
    for i, record in enumerate(records):
        n = len(record["input_ids"])
        batch["input_ids"][i, :n] = torch.tensor(record["input_ids"])
        batch["labels"][i, :n] = torch.tensor(record["labels"])
        batch["attention_mask"][i, :n] = 1
    return batch


def load_model(config: train.Config, args: Namespace) -> tuple[torch.nn.Module, int]:
    """The model in fp32, with its id for padding."""
    how = dict(dtype=torch.float32, attn_implementation="sdpa")
    if args.config:
        with args.device:
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(args.config)), **how), 0
    pad_id = AutoConfig.from_pretrained(config.model).pad_token_id or 0
    return AutoModelForCausalLM.from_pretrained(config.model, **how), pad_id


def load_tokenizer(config: train.Config, args: Namespace) -> PreTrainedTokenizerFast:
    """TRL asks for one, although the records have ids already. Without a model's folder it knows one word."""
    if args.config:
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"pad": 0}, "pad")),
                                       pad_token="pad", eos_token="pad")
    return AutoTokenizer.from_pretrained(config.model)


def run_trainer(config: train.Config, args: Namespace, trl: bool, packed: bool, liger: bool = False
                ) -> dict:
    """TRL's SFTTrainer, which is a Trainer of transformers, or that Trainer itself."""
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    records = read_records(config, args)
    model, pad_id = load_model(config, args)
    rows, rows_a_step = min(args.padded_rows, config.batch_size), config.batch_size
    if packed:
        # A row of n tokens has n - 1 targets.
        rows = max(1, config.micro_batch_tokens // (config.max_length - 1))
        mean = sum(len(record["input_ids"]) for record in records) / len(records)
        rows_a_step = mean * config.batch_size / config.max_length
    meter = Meter(max(1, round(rows_a_step / rows)), args.device)
    settings = dict(
        output_dir=args.folder, per_device_train_batch_size=rows, max_steps=args.steps,
        gradient_accumulation_steps=meter.micro_batches, bf16=config.compute_dtype == torch.bfloat16,
        use_cpu=args.device.type == "cpu", learning_rate=config.lr, adam_beta1=config.beta1,
        adam_beta2=config.beta2, adam_epsilon=config.adam_eps, weight_decay=config.weight_decay,
        max_grad_norm=config.clip_grad_norm, optim="adamw_torch_fused", lr_scheduler_type="constant",
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10**6, seed=config.seed,
        gradient_checkpointing=False, use_liger_kernel=liger,
        **({} if packed else {"train_sampling_strategy": "group_by_length"}))

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            meter.began = time.monotonic()

        def on_step_end(self, *_: object, **__: object) -> None:
            meter.end_step()

    common = dict(model=model, train_dataset=Dataset.from_list(records), callbacks=[Timer()])
    if trl:
        from trl import SFTConfig, SFTTrainer
        trainer = SFTTrainer(args=SFTConfig(**settings, max_length=config.max_length, packing=packed),
                             processing_class=load_tokenizer(config, args), **common)
        collate = trainer.data_collator
    else:
        trainer = Trainer(args=TrainingArguments(**settings), **common)

        def collate(examples: list[dict]) -> dict[str, Tensor]:
            return padded(examples, pad_id)

    def counted(examples: list[dict]) -> dict[str, Tensor]:
        documents = sum(len(x["seq_lengths"]) for x in examples) if packed else len(examples)
        batch = collate(examples)
        meter.count(sum(len(x["input_ids"]) for x in examples) - documents,
                    int((batch["labels"][:, 1:] != -100).sum()))
        return batch

    trainer.data_collator = counted
    trainer.train()
    return meter.result(f"{meter.micro_batches} micro-batches a step, of {rows} "
                        + (f"rows of {config.max_length} tokens" if packed else "padded records"))


def run_transformers(config: train.Config, args: Namespace) -> dict:
    records = sorted(read_records(config, args), key=lambda record: len(record["input_ids"]))
    starts = torch.randperm(len(records) // config.batch_size or 1,
                            generator=torch.Generator().manual_seed(config.seed)).tolist()
    model, pad_id = load_model(config, args)
    model.train().to(args.device)
    optimizer = train.make_optimizer(model, config)
    meter = Meter(1, args.device)
    for step in range(args.steps):
        start = starts[step % len(starts)] * config.batch_size
        chosen = records[start:start + config.batch_size]
        trained = sum(label != -100 for record in chosen for label in record["labels"][1:])
        meter.count(sum(len(record["input_ids"]) - 1 for record in chosen), trained)
        # In order of length, so a micro-batch is as wide as the record that joins it.
        micro_batches: list[list[dict]] = [[]]
        for record in chosen:
            size = (len(micro_batches[-1]) + 1) * (len(record["input_ids"]) - 1)
            if size > config.micro_batch_tokens and micro_batches[-1]:
                micro_batches.append([])
            micro_batches[-1].append(record)
        for micro_batch in micro_batches:
            batch = padded(micro_batch, pad_id)
            if batch["attention_mask"].all():
                del batch["attention_mask"]
            batch = {name: x.to(args.device) for name, x in batch.items()}
            with train.autocast(config, args.device):
                loss = model(**batch, use_cache=False, num_items_in_batch=trained).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        meter.end_step()
    return meter.result(f"padded micro-batches of at most {config.micro_batch_tokens} tokens")


RUNS = {"trl": partial(run_trainer, trl=True, packed=True),
        "trl-liger": partial(run_trainer, trl=True, packed=True, liger=True),
        "trl-liger-padded": partial(run_trainer, trl=True, packed=False, liger=True),
        "trainer": partial(run_trainer, trl=False, packed=False), "transformers": run_transformers}


def main(argv: list[str]) -> None:
    args, config = parse_args(argv)
    args.device = join_ranks(config.device)
    with tempfile.TemporaryDirectory() as args.folder:
        Path(args.result).write_text(json.dumps(RUNS[args.peer](config, args)))


if __name__ == "__main__":
    run_program(main)
