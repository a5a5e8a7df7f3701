"""The flags of a run: every one of them once, with its help, default and limits.

    config = parse_args(["--model", "DIR", "--train-data", "FILE", "--loss", "it"])
    config.max_length                                              --max-length is max_length here

Nothing here needs PyTorch, so --help and the answer to a wrong flag come at once.
"""
import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chat import COMPLETION, INSTRUCTION, KINDS, SYSTEM, TEMPLATE, TEMPLATES, check_template_flags
from records import data_files, is_on_hub, parse_columns
from runtime.files import check_writable
from runtime.flags import BELOW, at_home, flag, flag_name, given_flags
from runtime.foreign import check_file
from runtime.model_folder import check_model
from runtime.start import is_main

if TYPE_CHECKING:
    import torch

# Paper: arXiv 2405.14394, eq. 2 (IT) and eq. 4 (IM). A system message is not the template's, so IM counts it.
PRESETS = {
    "it": {COMPLETION: 1.0},
    "im": {SYSTEM: 1.0, INSTRUCTION: 1.0, COMPLETION: 1.0},
    "lm": {TEMPLATE: 1.0, SYSTEM: 1.0, INSTRUCTION: 1.0, COMPLETION: 1.0},
}
NORMALIZE = ("token", "example", "span")
OVERLONG = ("truncate", "drop", "error")
# --track: the package that each needs.
TRACKERS = ("tensorboard", "wandb")
# Flags that name records, as data_files() reads them.
RECORDS = "train_data", "eval_data", "validation_data", "data", "prompts"
CACHE_DIR = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "spantune")
QUICKSTART = Path(__file__).resolve().parent / "quickstart"


def span_weights(loss: str, template: float | None = None, system: float | None = None,
                 instruction: float | None = None, completion: float | None = None) -> np.ndarray:
    """(K,) the weight of each kind of target: a preset, it, im or lm, with any of its weights overridden.
    CONTEXT is always 0. ValueError for a negative weight or if all are 0.

        span_weights("im", instruction=0.3) -> template 0, system 1, instruction 0.3, completion 1, context 0
    """
    weights = np.zeros(len(KINDS))
    for kind, given in enumerate((template, system, instruction, completion)):
        weights[kind] = PRESETS[loss].get(kind, 0.0) if given is None else given
        if not 0 <= weights[kind] < math.inf:
            raise ValueError(f"--{KINDS[kind]}-weight {given}: must be a finite number, 0 or more")
    if not weights.any():
        raise ValueError("all span weights are 0, so there is nothing to train; raise --completion-weight")
    return weights


# The flags that override a preset's weights.
WEIGHT_FLAGS = tuple(f"{kind}_weight" for kind in KINDS if kind != "context")
COMPUTE_DTYPES = "auto", "bf16", "fp32"
# What --micro-batch-tokens 0 chooses from; on a CPU the first, because more is no faster there.
MICRO_BATCH_TOKENS = 4096, 8192, 16384, 32768, 65536
# Parameters from which the layers are compiled on a CPU. Smaller models train for a shorter time than that
# takes.
COMPILED_ON_CPU = 50_000_000


@dataclass
class Config:
    """Every flag of the command line, once: --max-length is max_length here. free: may change on resume."""
    # model and data
    model: str = flag("", "checkpoint folder or hub id (owner/name[@revision]); none: the embedded default")
    train_data: list[str] = flag(list, "records to train on: .jsonl, .json, .csv and .parquet files, also as "
                                 ".gz or .zst; folders and globs of them; owner/name[:split][@revision] on "
                                 "the hub; - for standard input", metavar="FILE")
    mix: list[str] = flag(list, "in place of --train-data: names as there, each with its share of an epoch's "
                          "examples, such as a.jsonl=0.7 b.jsonl=0.3. An epoch has as many examples as all "
                          "together; what has a larger share is repeated within it, what has a smaller one "
                          "takes several epochs", metavar="FILE=SHARE")
    max_examples: int = flag(0, "train on this many examples only, the first of the files; with --mix: "
                             "examples of an epoch; 0: all", least=0)
    eval_data: list[str] = flag(list, "held-out records, named the same way; each name is reported on its "
                                "own", metavar="FILE", free=True)
    eval_fraction: float = flag(0.0, "hold out this share of the training records and report it as held-out; "
                                "records with the same first user message stay together", least=0, below=1)
    split_seed: int = flag(0, "seed of what is held out, so that runs with several --seed share it", least=0,
                           below=2**32)
    columns: list[str] = flag(list, "fields of the records under other names, such as prompt=query "
                              "completion=reply", metavar="KNOWN=NAME")
    template: str = flag("auto",
                         f"chat template: auto (the checkpoint's own), {', '.join(TEMPLATES)} or FILE.jinja")
    date: str = flag("", "YYYY-MM-DD for templates that print the date; default the day the run starts",
                     free=True)
    max_length: int = flag(2048, "tokens an example may have", least=2)
    overlong: str = flag("truncate", "what to do with longer ones", choices=OVERLONG)
    require_completion: bool = flag(True, "leave out examples without a completion target, so that every "
                                    "--loss trains on the same examples")
    cache_dir: str = flag(CACHE_DIR, "where tokenized data is kept between runs", metavar="DIR", free=True)
    # loss
    loss: str = flag("im", "it: completions; im: instructions too; lm: every token", choices=tuple(PRESETS))
    template_weight: float | None = flag(None, "override the loss's weight of the template's own tokens",
                                         least=0)
    system_weight: float | None = flag(None, "... of system messages", least=0)
    instruction_weight: float | None = flag(None, "... of user and tool messages", least=0)
    completion_weight: float | None = flag(None, "... of assistant messages with their end-of-turn tokens",
                                           least=0)
    normalize: str = flag("token", "what the loss is a mean over, within a step", choices=NORMALIZE)
    neftune_alpha: float = flag(0.0, "noise on the embeddings while training (the paper: 5); 0: none",
                                least=0, below=1e6)
    kl_weight: float = flag(0.0, "adds this times KL(model || starting model) on the trained targets; 0: "
                            "none", least=0)
    # optimization; the paper's values
    epochs: int = flag(2, "passes over the training data", least=1)
    max_steps: int = flag(0, "stop the schedule after this many steps; 0: by --epochs", least=0)
    batch_size: int = flag(128, "examples in a step, over all ranks", least=1)
    micro_batch_tokens: int = flag(0, "tokens of one forward and backward pass; changes memory and speed "
                                   f"only; 0: {MICRO_BATCH_TOKENS[0]} on a CPU, up to "
                                   f"{MICRO_BATCH_TOKENS[-1]} on CUDA, as memory allows", least=0, free=True)
    lr: float = flag(2e-5, "peak learning rate", above=0, below=100)
    schedule: str = flag("linear", "learning rate after warm-up", choices=("linear", "cosine", "constant"))
    warmup_ratio: float = flag(0.03, "fraction of the steps with rising learning rate", least=0, below=1)
    weight_decay: float = flag(0.0, "AdamW's, on matrices only", least=0)
    beta1: float = flag(0.9, "AdamW's", least=0, below=1)
    beta2: float = flag(0.98, "AdamW's", least=0, below=1)
    adam_eps: float = flag(1e-6, "AdamW's; far less would be 0 in fp32, and 0 / 0 an update", least=1e-30)
    clip_grad_norm: float = flag(1.0, "largest gradient norm; 0: no clipping", least=0)
    seed: int = flag(0, "seed of the order of examples and of NEFTune's noise", least=0, below=2**32)
    # machine
    dtype: str = flag("auto", "bf16: autocast over fp32 parameters; fp32: no autocast; auto: bf16 where the "
                      "device has instructions for it", choices=COMPUTE_DTYPES)
    device: str = flag("auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"), free=True)
    shard: bool = flag(False, "under torchrun: each rank holds a part of the parameters, gradients and "
                       "optimizer state", free=True)
    recompute: bool = flag(False, "recompute activations in the backward pass: less memory, more time",
                           free=True)
    compile: bool | None = flag(None, "torch.compile the decoder layers; default: where it works, on CUDA "
                                f"and from {COMPILED_ON_CPU // 10**6} million parameters",
                                free=True)
    deterministic: bool = flag(False, "on CUDA: the same bits every time, at the cost of some speed (a CPU "
                               "always gives them)", free=True)
    # output
    track: str = flag("none", "send what metrics.jsonl and eval.jsonl hold to TensorBoard or Weights & "
                      "Biases, too", choices=("none", *TRACKERS), free=True)
    output_dir: str = flag("", "folder of this run; default runs/MODEL-LOSS", metavar="DIR", free=True)
    overwrite: bool = flag(False, "delete what a run left in --output-dir and start from scratch", free=True,
                           in_file=False)
    save_every: int = flag(0, "steps between checkpoints; 0: only when interrupted, and after the last step "
                           "until final/ is written", least=0, free=True)
    keep_checkpoints: int = flag(2, "newest checkpoints to keep", least=1, free=True)
    save_dtype: str = flag("source", "dtype of final/; source: that of --model's files",
                           choices=("source", "fp32", "bf16"), free=True)
    resume: str = flag("auto", "auto: resume where the same run was interrupted; never; or the folder of a "
                       "checkpoint to start from", free=True, in_file=False)
    eval_every: int = flag(0, "steps between evaluations; 0: only before and after", least=0, free=True)
    eval_generate: int = flag(0, "answer this many held-out prompts before and after, and count exact "
                              "matches", least=0, free=True)
    log_every: int = flag(10, "steps between lines of a log file, and between measurements of the NLL of "
                          "untrained spans", least=1, free=True)

    @property
    def span_weights(self) -> np.ndarray:
        """(K,) what a target of each kind counts. ValueError for weights that leave nothing to train."""
        return span_weights(self.loss, self.template_weight, self.system_weight, self.instruction_weight,
                            self.completion_weight)

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.eval_data) or self.eval_fraction > 0

    @property
    def max_grad_norm(self) -> float:
        """As clip_grad_norm_() wants it, which would make 0 of all gradients for 0."""
        return self.clip_grad_norm or math.inf

    @property
    def compute_dtype(self) -> "torch.dtype":
        import torch

        from runtime.machine import resolve_dtype
        return torch.bfloat16 if resolve_dtype(self.dtype, self.device) == "bf16" else torch.float32


# What the embedded default needs other than the paper's values: a small model learns with a high rate.
EMBEDDED = dict(model=str(QUICKSTART / "model"), train_data=[str(QUICKSTART / "train.jsonl")],
                eval_data=[str(QUICKSTART / "test.jsonl")], max_length=512, epochs=8, batch_size=16, lr=5e-4,
                beta2=0.95, schedule="cosine", warmup_ratio=0.1, eval_generate=1000)


def parse_args(argv: list[str], flags: type[Config] = Config, program: str = "train.py",
               description: str = "Instruction-tune a Llama-style checkpoint with the loss over the spans "
                                  "you choose.") -> Config:
    """Flags over --config's file over the embedded default (if no model is named) over the class's defaults.
    flags: Config, or a subclass with more of them. ValueError for what they may not be."""
    given = given_flags(flags, argv, program, description, either=("train_data", "mix"))
    embedded = "model" not in given
    if embedded:
        for name in ("train_data", "mix"):
            if name in given:
                raise ValueError(f"{flag_name(name)} is given but no --model: name the checkpoint folder to "
                                 "train")
        answers = {"eval_generate": 0} if given.get("shard") else {}
        given = EMBEDDED | answers | given
    config = flags(**given)
    # But for the cache, so that somebody else can use run_config.json.
    for name in vars(config).keys() - {"cache_dir"}:
        setattr(config, name, at_home(getattr(config, name)))
    if config.mix:
        files, _ = parse_mix(config.mix)
        # A run's run_config.json has both.
        if config.train_data not in ([], files):
            raise ValueError(f"--train-data {' '.join(config.train_data)}: --mix names the files to train "
                             "on; give one of the two")
        config.train_data = files
    if not config.output_dir:
        name = "quickstart" if embedded else Path(config.model).resolve().name or "model"
        config.output_dir = str(Path("runs") / f"{name}-{config.loss}")
        # The quick start may be repeated as often as one likes; an interrupted one is resumed.
        if embedded and (Path(config.output_dir) / "final").is_dir():
            config.overwrite = given.get("overwrite", True)
    validate(config)
    return config


def parse_mix(words: list[str]) -> tuple[list[str], list[float]]:
    """--mix's files and their shares, which add up to 1. ValueError for what is not FILE=SHARE, and for a
    file that is given twice."""
    files, shares = [], []
    for word in words:
        file, _, share = word.rpartition("=")
        try:
            number = float(share)
        except ValueError:
            number = math.nan
        if not file or not 0 < number < BELOW[float]:
            raise ValueError(f"--mix {word}: must be FILE=SHARE with a share above 0 and below "
                             f"{BELOW[float]:,.0f}, such as a.jsonl=0.7; leave out a file that is not to be "
                             "trained on")
        files.append(file)
        shares.append(number)
    check_once("mix", words, files)
    return files, [share / sum(shares) for share in shares]


def check_once(name: str, words: list[str], files: list[str]) -> None:
    """ValueError if a file is among `files` twice, of which the words after the flag `name` tell."""
    if len({Path(file).resolve() for file in files}) < len(files):
        raise ValueError(f"{flag_name(name)} {' '.join(words)}: a file is given twice; give each once")


def validate(config: Config) -> None:
    """What one flag alone does not tell: ValueError that names the flags and the fix."""
    def need(name: str, fits: bool, limit: str) -> None:
        if not fits:
            raise ValueError(f"{flag_name(name)} {getattr(config, name)}: must be {limit}")

    parse_columns(config.columns)
    if not config.train_data:
        raise ValueError("--train-data is missing: give one or more files of records, or --mix")
    check_once("eval_data", config.eval_data, config.eval_data)
    need("eval_every", not config.eval_every or config.evaluates,
         "0 without --eval-data or --eval-fraction")
    need("eval_generate", not config.eval_generate or bool(config.eval_data),
         "0 without --eval-data; what --eval-fraction holds out is not answered")
    need("eval_generate", not (config.shard and config.eval_generate),
         "0 with --shard, since no rank has the whole model; python -m eval.generate answers with final/")
    if config.track != "none" and importlib.util.find_spec(config.track) is None:
        raise ValueError(f"--track {config.track}: it is not installed: pip install {config.track}")
    # Raises for weights that leave nothing to train.
    _ = config.span_weights


def check_inputs(config: Config) -> None:
    """check_files(), and ValueError for an --output-dir that cannot be written to or would hold the cache."""
    if is_main():
        check_writable("--output-dir", config.output_dir, folder=True)
    out, cache_dir = (Path(folder).expanduser().resolve() for folder in (config.output_dir, config.cache_dir))
    if cache_dir.is_relative_to(out):
        raise ValueError(f"--cache-dir {config.cache_dir}: is in --output-dir, which is for the run's own "
                         "files; give another folder")
    check_files(config)


def local_files(name: str) -> list[str]:
    """The files that a name of records stands for; [] for one on the hub. ValueError as data_files()."""
    return [] if is_on_hub(name) else data_files([name])


def check_files(args: object) -> None:
    """ValueError for a --model that cannot be used, for files and folders that do not exist, as far as that
    is known without the network, and for an --output_path that cannot be written. args: flags; those that a
    command does not have are not checked."""
    models = getattr(args, "model", [])
    for model in [models] if isinstance(models, str) else models:
        check_model(model)
    checks = {local_files: RECORDS,
              check_file: ("questions", "judge_prompts", "reference", "results", "from")}
    for check, names in checks.items():
        for name in names:
            value = getattr(args, name, None) or []
            for each in [value] if isinstance(value, str) else value:
                try:
                    check(each)
                except ValueError as error:
                    raise ValueError(f"{flag_name(name)} {error}") from None
    template = getattr(args, "template", None)
    check_template_flags("auto" if template is None else template, getattr(args, "date", ""))
    # The harness's own name for its folder of results.
    if getattr(args, "output_path", None) and is_main():
        check_writable("--output_path", args.output_path, folder=True)
