"""Flags of TRL, axolotl, LLaMA-Factory, torchtune and transformers' Trainer, and what does the same here.

    answer("--learning_rate", "1e-4", {"--lr"}, limit)     -> "--learning_rate 1e-4: here it is --lr 1e-4"
"""
import difflib
from collections.abc import Callable, Collection

from runtime.foreign import shorten

# (names with dashes; a sentence), in which {} is the value that was given. Two sentences: if the value is
# true, and if it is false. A name that ends in * stands for all that begin so; the first that fits counts.
_ANSWERS: tuple[tuple[str, str | tuple[str, str]], ...] = (
    # model and data
    ("model-name-or-path base-model checkpointer.checkpoint-dir", "here it is --model {}"),
    ("model-revision", "here it is part of --model, as in owner/name@REVISION"),
    ("tokenizer-* tokenizer.* use-fast-tokenizer", "not needed; the tokenizer is the one in the folder of "
                                                   "--model"),
    ("trust-remote-code", "not done; no code from a model's folder is run"),
    ("model-init-kwargs model-type rope-scaling rope-theta",
     "not needed; config.json in the folder of --model decides"),
    ("attn-implementation flash-att* sdp-attention xformers-attention use-liger* enable-liger* liger-* "
     "use-unsloth", "not needed; --compile and the kernels here do that"),
    ("use-cache", "not needed; training keeps no keys and values"),
    ("dataset-name dataset datasets train-file data-path dataset-path",
     "here it is --train-data {}, files of records in any usual layout"),
    ("dataset-text-field label-names remove-unused-columns",
     "here records have prompts and completions; --columns reads other names"),
    ("dataset-dir", "here it is --train-data {}, which takes a folder, too"),
    ("split dataset-split dataset-train-split", "here it is --train-data owner/name:SPLIT"),
    ("dataset-config", "here it is --train-data owner/name:FOLDER/SPLIT"),
    ("dataset-test-split", "here it is --eval-data owner/name:SPLIT"),
    ("validation-file eval-dataset test-datasets", "here it is --eval-data {}"),
    ("val-size val-set-size test-size", "here it is --eval-fraction {}"),
    ("interleave-probs mix-strategy", "here it is --mix, with files and their shares"),
    ("max-samples max-train-samples", "here it is --max-examples {}"),
    ("max-seq-length max-seq-len sequence-len cutoff-len model-max-length block-size tokenizer.max-seq-len",
     "here it is --max-length {}"),
    ("truncation-mode", "here --overlong truncate keeps an example's start; drop leaves it out"),
    ("chat-template*", "here it is --template {}"),
    ("messages-field", "here it is --columns messages=NAME"),
    ("default-system", "not done; write a system message into the records"),
    ("enable-thinking", "not done; the template decides"),
    ("resize-vocab new-special-tokens added-tokens*",
     "not done; the vocabulary is that of the folder of --model"),
    ("eos-token pad-token special-tokens", "not needed; the template ends an answer with a special token; "
                                           "--template FILE.jinja writes another"),
    ("packing-strategy group-by-length length-column-name",
     "not needed; the examples of a step are packed so that micro-batches take equally long"),
    ("packing* sample-packing* eval-packing neat-packing padding-free pad-to-* dataset.packed",
     ("always so: a step's examples are packed, and attend only to themselves",
      "not done: a step's examples are always packed, but attend only to themselves")),
    ("shuffle* train-sampling-strategy",
     "always so: every epoch has its own order, which --seed decides"),
    ("dataset-prepared-path tokenized-path", "here it is --cache-dir {}"),
    ("preprocessing-num-workers dataset-num-proc dataset-processes overwrite-cache dataset-kwargs "
     "dataset-streaming streaming buffer-size",
     "not needed; records are tokenized once and kept in --cache-dir"),
    ("dataloader-*", "not needed; tokenized records are read from --cache-dir"),
    # loss
    ("completion-only-loss assistant-only-loss train-on-responses-only",
     ("here it is --loss it", "here it is --loss lm, or im for all but the template's own tokens")),
    ("train-on-inputs train-on-input train-on-prompt dataset.train-on-input",
     ("here it is --loss lm, or im for all but the template's own tokens", "here it is --loss it")),
    ("train-on-eos", "always so: the token that ends an answer is trained"),
    ("ignore-pad-token-for-loss", "not needed; examples are packed, and no target is padding"),
    ("mask-history", "here a message of a record is left out with \"weight\": 0"),
    ("roles-to-train", "here --loss it trains on assistant messages, --loss im on all messages"),
    ("neftune-noise-alpha", "here it is --neftune-alpha {}"),
    ("label-smoothing* router-aux-loss-coef", "not done; the loss is the plain cross-entropy"),
    ("loss-type", "not needed for nll: the loss is the plain cross-entropy, of the spans that --loss names; "
                  "others are not done"),
    ("average-tokens-across-devices", "always so: --normalize says what a step's loss is a mean over, on all "
                                      "ranks"),
    # optimization
    ("num-train-epochs num-epochs", "here it is --epochs {}"),
    ("per-device-train-batch-size per-gpu-train-batch-size micro-batch-size",
     "here --batch-size is the examples of a whole step, over all ranks, and --micro-batch-tokens is what "
     "one pass takes"),
    ("gradient-accumulation-steps",
     "not needed; a step has --batch-size examples, over all ranks, in as many micro-batches as fit"),
    ("auto-find-batch-size torch-empty-cache-steps",
     "not needed; --micro-batch-tokens is by default as large as memory allows"),
    ("per-device-eval-batch-size", "not needed; --micro-batch-tokens holds for evaluations, too"),
    ("learning-rate optimizer.lr", "here it is --lr {}"),
    ("lr-scheduler-kwargs", "not needed; --schedule has no options"),
    ("lr-scheduler*", "here it is --schedule {}, with --warmup-ratio"),
    ("warmup-steps num-warmup-steps", "here it is --warmup-ratio {} (a fraction of the steps)"),
    ("max-grad-norm", "here it is --clip-grad-norm {}"),
    ("adam-beta1", "here it is --beta1 {}"),
    ("adam-beta2", "here it is --beta2 {}"),
    ("adam-epsilon", "here it is --adam-eps {}"),
    ("optim*", "not needed for AdamW, which is the optimizer; make_optimizer() in train.py makes another"),
    ("data-seed", "here it is --seed {}"),
    # machine
    ("bf16", ("here it is --dtype bf16", "here it is --dtype fp32")),
    ("fp16", ("not done; --dtype is bf16 or fp32", "not needed; it is never fp16")),
    ("tf32", ("not done; matrix products are in --dtype, bf16 or fp32", "always so")),
    ("mixed-precision", "here it is --dtype {}"),
    ("torch-dtype", "here it is --dtype, auto, bf16 or fp32"),
    ("bf16-full-eval fp16-full-eval", "not needed; evaluations run in --dtype, too"),
    ("gradient-checkpointing-kwargs activation-checkpointing-kwargs",
     "not needed; --recompute has no options"),
    ("gradient-checkpointing activation-checkpointing enable-activation-checkpointing",
     ("here it is --recompute", "here it is --no-recompute, the default")),
    ("activation-offloading enable-activation-offloading",
     "not done; --recompute saves the memory of activations"),
    ("deepspeed fsdp*", ("here it is --shard, under torchrun", "here it is --no-shard, the default")),
    ("num-processes nproc-per-node", "not needed; torchrun starts the ranks"),
    ("ddp-* accelerator-config parallelism-config ignore-bias-buffers",
     "not needed; under torchrun the ranks share each step"),
    ("local-rank", "not needed; torchrun tells each rank its number"),
    ("torch-compile-*", "not needed; --compile chooses them"),
    ("torch-compile", ("here it is --compile", "here it is --no-compile")),
    ("use-cpu no-cuda", "here it is --device cpu"),
    ("full-determinism", "here it is --deterministic"),
    ("use-peft peft-* lora-* use-lora use-rslora use-dora loraplus-* adapter finetuning-type freeze-* "
     "unfrozen-parameters load-in-* quantization-* bnb-* use-bnb-*",
     ("not done; all weights are trained (full fine-tuning)",
      "always so: all weights are trained (full fine-tuning)")),
    # output
    ("report-to", "here it is --track {}"),
    ("wandb-* project", "here it is --track wandb, which reads WANDB_PROJECT and its other variables"),
    ("trackio-* use-swanlab swanlab-* mlflow-* comet-*", "not done; --track is tensorboard or wandb"),
    ("run-name", "here it is the name of the folder in --output-dir"),
    ("logging-dir", "here it is --output-dir, with --track tensorboard"),
    ("logging-steps", "here it is --log-every {}"),
    ("logging-* log-* plot-loss include-num-input-tokens-seen include-tokens-per-second skip-memory-metrics "
     "disable-tqdm debug", "not needed; metrics.jsonl in --output-dir has every step"),
    ("save-steps", "here it is --save-every {}"),
    ("save-strategy saves-per-epoch", "here it is --save-every, a number of steps"),
    ("save-total-limit", "here it is --keep-checkpoints {}"),
    ("save-only-model save-safetensors save-on-each-node",
     "not needed; final/ in --output-dir holds the model alone, as safetensors"),
    ("enable-jit-checkpoint", "always so: SIGTERM saves a checkpoint, and the same command resumes"),
    ("eval-steps", "here it is --eval-every {}"),
    ("eval-strategy evaluation-strategy evals-per-epoch", "here it is --eval-every, a number of steps"),
    ("predict-with-generate", "here it is --eval-generate, a number of prompts"),
    ("eval-on-start eval-delay", "always so: --eval-data is evaluated before and after, and at --eval-every"),
    ("eval-* prediction-loss-only include-for-metrics batch-eval-metrics compute-accuracy",
     "not needed; --eval-data is evaluated as training runs"),
    ("load-best-model-at-end metric-for-best-model greater-is-better early-stopping*",
     "not done; python -m eval.study chooses learning rate and epoch by held-out records"),
    ("resume-from-checkpoint auto-resume-from-checkpoints",
     "not needed: the same command resumes; --resume DIR names another checkpoint"),
    ("ignore-data-skip restore-callback-states-from-checkpoint",
     "not needed; a resumed run continues with the next example"),
    ("overwrite-output-dir", ("here it is --overwrite", "here it is --no-overwrite, the default")),
    ("token hf-hub-token", "not needed; HF_TOKEN in the environment is"),
    ("push-to-hub hub-*", ("not done; hf upload OWNER/NAME OUTPUT/final does it",
                           "always so: nothing is uploaded")),
    ("stage rl beta", "not needed; train.py does instruction tuning (sft) alone"),
    ("do-train do-eval do-predict", "not needed; train.py trains, and evaluates with --eval-data"),
)
HABITS = {name: sentence for names, sentence in _ANSWERS for name in names.split()}


def answer(name: str, value: str | None, flags: Collection[str], limit: Callable[[str, str], str]) -> str:
    """What to tell somebody who gave a flag that a program does not have. name: as it was given, with or
    without dashes in front; value: what followed it, if anything; flags: the program's; limit(flag, value):
    what this flag must be if it cannot have the value, "" if it can (Parser.limit)."""
    plain = name.lstrip("-").lower().replace("_", "-")
    sentence = _sentence(plain, value, flags, limit)
    if not sentence:
        long = [flag for flag in flags if flag.startswith("--")]
        begun = [flag for flag in long if len(plain) > 1 and flag.startswith(f"--{plain}")]
        near = begun or difflib.get_close_matches(f"--{plain}", long, 1, 0.75)
        sentence = f"unrecognized; is {near[0]} meant?" if near else "unrecognized"
    return f"{name if value is None else f'{name} {shorten(value, 100)}'}: {sentence}"


def _sentence(plain: str, value: str | None, flags: Collection[str], limit: Callable[[str, str], str]) -> str:
    """What the flag is here; "" if nothing is known, or if that flag is another program's. plain: its name,
    with dashes and in small letters."""
    if f"--no-{plain}" in flags:
        sentence: str | tuple[str, str] = f"here it is --{plain}", f"here it is --no-{plain}"
    elif f"--{plain}" in flags:
        sentence = f"here it is --{plain} {{}}"
    else:
        found = [key for key in HABITS if plain == key or key[-1] == "*" and plain.startswith(key[:-1])]
        sentence = HABITS[found[0]] if found else ""
    if isinstance(sentence, tuple):
        sentence = sentence[(value or "").lower() in ("false", "no", "0", "none", "full")]
    named = [word.strip(",;:.") for word in sentence.split() if word.startswith("--")]
    if named and named[0] not in flags:
        return ""
    if value is not None and " {}" in sentence and (must := limit(named[0], value)):
        # The value would be refused there, too.
        return sentence.replace(" {}", f", which must be {must}")
    return sentence.replace(" {}", "" if value is None else f" {shorten(value, 100)}")
