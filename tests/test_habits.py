"""Flags of other trainers, on the command line and in a config file: each is answered by what does it."""
import dataclasses
import json
import re

import pytest
import transformers

import train
from eval.flags import Parser
from runtime.flags import flag_name, is_boolean
from runtime.habits import HABITS
from tiny import flags

FIELDS = dataclasses.fields(train.Config)
OWN = {flag_name(field.name) for field in FIELDS} | {
    flag_name(f"no-{field.name}") for field in FIELDS if is_boolean(field)}


def refusal(argv: list[str]) -> str:
    with pytest.raises(ValueError) as caught:
        train.parse_args(argv)
    return str(caught.value)


@pytest.mark.parametrize("argv, says", [
    ("--learning-rate 2e-5", "here it is --lr 2e-5"), ("--learning_rate=2e-5", "here it is --lr 2e-5"),
    ("--per-device-train-batch-size 4", "here --batch-size is the examples of a whole step"),
    ("--gradient-accumulation-steps 8", "not needed; a step has --batch-size examples"),
    ("--num-train-epochs 3", "here it is --epochs 3"),
    ("--max-seq-length 512", "here it is --max-length 512"),
    ("--cutoff_len 512", "here it is --max-length 512"), ("--packing", "always so"),
    ("--sample_packing true", "always so"), ("--use-peft", "not done; all weights are trained"),
    ("--lora-r 16", "not done; all weights are trained"), ("--lora_target all", "not done"),
    ("--load-in-4bit", "not done; all weights are trained"),
    ("--report-to wandb", "here it is --track wandb"),
    ("--dataset-name owner/set", "here it is --train-data owner/set"),
    ("--deepspeed z3.json", "here it is --shard, under torchrun"),
    ("--model_name_or_path m", "here it is --model m"), ("--bf16", "here it is --dtype bf16"),
    ("--bf16 False", "here it is --dtype fp32"), ("--completion-only-loss True", "here it is --loss it"),
    ("--assistant-only-loss", "here it is --loss it"), ("--train_on_inputs false", "here it is --loss it"),
    ("--train_on_inputs true", "here it is --loss lm, or im for all but the template's own tokens"),
    ("--deepspeed false", "here it is --no-shard, the default"),
    ("--overwrite_output_dir false", "here it is --no-overwrite, the default"),
    ("--finetuning_type full", "always so: all weights are trained"),
    ("--optim adamw_torch", "not needed for AdamW"), ("--mixed_precision bf16", "here it is --dtype bf16"),
    ("--lr_scheduler_type constant_with_warmup",
     "here it is --schedule, which must be one of linear, cosine, constant, with --warmup-ratio"),
    ("--neftune-noise-alpha 5", "here it is --neftune-alpha 5"),
    ("--warmup-steps 10", "here it is --warmup-ratio"), ("--adam_beta2 0.99", "here it is --beta2 0.99"),
    ("--batch_size 4", "here it is --batch-size 4"), ("--no_compile", "here it is --no-compile"),
    ("--stage sft", "not needed; train.py does"), ("--dataset_split train", "here it is --train-data owner"),
    ("--bach-size 4", "unrecognized; is --batch-size meant?"), ("--frobnicate", "unrecognized\n"),
    ("--ep 4", "unrecognized; is --epochs meant?"), ("--e 4", "unrecognized\n"),
    ("--h 4", "unrecognized\n")])
def test_a_flag_of_another_trainer_is_answered_with_the_one_that_does_it_here(argv, says):
    message = refusal(argv.split())
    assert message.startswith(f"{argv.replace('=', ' ')}: {says}"), message
    assert message.endswith("\n(train.py --help lists the flags)")


def test_all_wrong_flags_are_answered_at_once_before_a_missing_one():
    message = refusal(flags(learning_rate=1, use_peft=True, frobnicate=2))
    assert [line.split(":")[0].strip() for line in message.splitlines()[:3]] == [
        "--learning-rate 1", "--use-peft", "--frobnicate 2"]
    parser = Parser("spans", "")
    parser.add_model_flags()    # --model is required
    with pytest.raises(ValueError, match="--model_name_or_path m: here it is --model m"):
        parser.parse_args(["--model_name_or_path", "m"])
    # It has no --lr.
    with pytest.raises(ValueError, match="--learning-rate 1: unrecognized\n"):
        parser.parse_args(["--model", "m", "--learning-rate", "1"])


@pytest.mark.parametrize("argv", [["--train-data", "a.jsonl", "--train-data", "b.jsonl"],
                                  ["--train-data=a.jsonl", "--lr", "1", "--train-data", "b.jsonl"]])
def test_a_flag_of_several_values_is_given_once(argv):
    assert refusal(argv) == ("--train-data is given more than once; write all its values behind one "
                             "--train-data")
    # Of other flags the last one counts, so that a script may add its caller's.
    assert train.parse_args(["--lr", "1", "--lr", "2"]).lr == 2


def test_a_file_of_flags_without_its_flag_is_answered_with_it():
    assert refusal(["run.yaml", "--lr", "1"]) == "run.yaml: a file of flags is given as --config FILE"
    assert refusal(["run.txt"]) == "unrecognized arguments: run.txt (train.py --help lists the flags)"


@pytest.mark.parametrize("ending, write", [
    (".json", json.dumps),
    (".toml", lambda pairs: "\n".join(f"{k} = {json.dumps(v)}" for k, v in pairs.items())),
    (".yaml", lambda pairs: "\n".join(f"{k}: {json.dumps(v)}" for k, v in pairs.items()))])
def test_the_same_names_in_a_config_file_are_answered_alike(tmp_path, ending, write):
    pairs = {"learning_rate": 2e-5, "train_on_inputs": False, "adapter": "lora"}
    (tmp_path / f"c{ending}").write_text(write(pairs))
    message = refusal(["--config", str(tmp_path / f"c{ending}")])
    for line in ("learning_rate 2e-05: here it is --lr 2e-05", "train_on_inputs False: here it is --loss it",
                 "adapter lora: not done; all weights are trained"):
        assert f"\n  {line}" in message


VALUES = None, "true", "False", "0.1", "500", "-1", "all", "none"


@pytest.mark.parametrize("name", [*HABITS, *sorted(
    name[2:].replace("-", "_") for name in OWN if "-" in name[2:])])
def test_whatever_an_answer_offers_the_next_call_accepts(name, monkeypatch):
    """Also to a flag of this program that is written with underscores."""
    monkeypatch.setattr("importlib.util.find_spec", lambda package: True)
    given = name.replace("*", "x")
    assert f"--{given}" not in OWN, "an own flag needs no answer"
    for value in VALUES:
        first, *others = refusal([f"--{given}", *([] if value is None else [value])]).split("\n")
        text = first.removeprefix(f"--{given}" + ("" if value is None else f" {value}") + ": ")
        assert others == ["(train.py --help lists the flags)"]
        assert "unrecognized" not in text and "{" not in text
        assert {*re.findall(r"--[a-z][a-z0-9-]*", text)} <= OWN
        offer = re.match(r"here it is (--[a-z0-9-]+)(?: ([^ ,(]+)|$)", text)
        if offer and (offer[2] or f"--no-{offer[1][2:]}" in OWN or offer[1].startswith("--no-")):
            base = dict(model="m", train_data="t.jsonl", eval_data="e.jsonl")
            base.pop(offer[1][2:].replace("-", "_"), None)
            train.parse_args([*flags(**base), *filter(None, offer.groups())])


@pytest.mark.parametrize("argv, says", [
    ("--eval_steps 0.1", "here it is --eval-every, which must be a whole number, 0 or more"),
    ("--lr_scheduler_type cosine_with_restarts", "here it is --schedule, which must be one of linear"),
    ("--report_to all", "here it is --track, which must be one of none, tensorboard, wandb"),
    ("--val-size 500", "here it is --eval-fraction, which must be a finite number, 0 or more and below 1"),
    ("--require_completion False", "here it is --no-require-completion"),
    ("--no_compile yes", "here it is --no-compile, which must be given without a value"),
    ("--recompute True", "must be given without a value: --recompute or --no-recompute"),
    ("--warmup_steps 10", "here it is --warmup-ratio, which must be"), ("--warmup_steps 0.1", "here it is "
     "--warmup-ratio 0.1"), ("--tf32 True", "not done"), ("--eos_token x", "not needed; the template ends")])
def test_a_value_that_the_flag_here_may_not_have_is_not_offered(argv, says):
    assert refusal(argv.split()).startswith(f"{argv}: {says}")


def test_every_flag_of_transformers_trainer_is_known():
    names = [field.name for field in dataclasses.fields(transformers.TrainingArguments)]
    assert len(names) > 50
    for name in names:
        if flag_name(name) not in OWN:
            assert "unrecognized" not in refusal([f"--{name}"]), name
