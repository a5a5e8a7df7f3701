"""README's table "To change": each row is done in a copy of the core, and three steps are trained with it."""
import json
import shutil
from pathlib import Path

import pytest
import torch

import forks
from tiny import ROOT, arguments, difference, metrics, run_here, setup, weights

# Runs in the copy's own process, and here for the core as it is.
FUNCTIONS = """
import json, sys, torch, train
from eval.engine import Engine
from model import load_model

def answer(folder):
    '''What generation makes, checked token by token with the model's forward pass.'''
    model, ids = load_model(folder), [7, 3, 11, 5]
    [(_, made, _)] = Engine(model).answers([ids], set(), 12)
    for token in made:
        count = len(ids)
        hidden = model(torch.tensor(ids), torch.arange(count), torch.tensor([0, count], dtype=torch.int32))
        assert token == int((hidden[-1] @ model.head_weight.T).argmax()), "generation runs another model"
        ids.append(token)
    return made
"""
PROGRAM = FUNCTIONS + """
for argument in json.loads(sys.argv[1]):
    if isinstance(argument, str):
        print(json.dumps(answer(argument)), file=sys.stderr)
    else:
        train.main(argument)
"""


def answer(folder: Path) -> list[int]:
    names: dict = {}
    exec(FUNCTIONS, names)
    return names["answer"](folder)


class Copy:
    """A copy of the core that may be edited."""

    def __init__(self, folder: Path):
        self.root, self.data = folder / "copy", folder
        for name in ("kernels", "runtime", "eval", "templates"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ROOT.glob("*.py"):
            shutil.copy(file, self.root)

    def edit(self, file: str, old: str, new: str) -> None:
        text = (self.root / file).read_text()
        assert text.count(old) == 1, f"{file} holds this {text.count(old)} times: {old}"
        (self.root / file).write_text(text.replace(old, new))

    def run(self, *steps: dict | str) -> list[list[int]]:
        """Train three steps with these flags, or answer with the model in this folder, one after the other in
        one process. Returns the answers."""
        given = [str(self.data / step) if isinstance(step, str) else
                 arguments(self.data, step["out"], max_steps=3, log_every=1,
                           **{name: value for name, value in step.items() if name != "out"})
                 for step in steps]
        done = forks.run(["-c", PROGRAM, json.dumps(given)], cwd=self.root)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]

    def metrics(self, out: str) -> list[dict]:
        return metrics(self.data / out)

    def weights(self, out: str) -> dict[str, torch.Tensor]:
        return weights(self.data / out / "final")


@pytest.fixture
def copy(tmp_path) -> Copy:
    setup(tmp_path)
    return Copy(tmp_path)


def test_a_record_layout(copy):
    row = '    ("prompt", "completion"),\n'
    copy.edit("records.py", row, row + '    ("ask", "tell"),\n')
    pairs = [("name a colour", "blue"), ("a fruit", "plum"), ("the sea", "is blue"), ("hello", "station")]
    files = {"new": ("ask", "tell"), "known": ("prompt", "completion")}
    for name, (question, answer) in files.items():
        (copy.data / f"{name}.jsonl").write_text(
            "".join(json.dumps({question: a, answer: b}) + "\n" for a, b in pairs))
    copy.run(*(dict(out=name, train_data=f"{copy.data}/{name}.jsonl") for name in files))
    assert difference(copy.weights("new"), copy.weights("known")) == 0


def test_a_chat_template(copy):
    source = (copy.root / "templates" / "llama3.jinja").read_text()
    (copy.root / "templates" / "mine.jinja").write_text(source.replace("'<|start_header_id|>'", "'Now: '"))
    copy.run(dict(out="mine", template="mine"), dict(out="llama3"))
    assert copy.metrics("mine")[0]["tokens"] != copy.metrics("llama3")[0]["tokens"]
    exported = json.loads((copy.data / "mine" / "final" / "tokenizer_config.json").read_text())
    assert "Now: " in exported["chat_template"]


def test_packing(copy):
    assert run_here(arguments(copy.data, "packed", max_steps=3, micro_batch_tokens=200)) == 0
    copy.edit("data.py", "    per_rank = max(1, -(-int(sizes.sum()) // (capacity * world_size)))\n",
              "    if len(examples) % world_size == 0:\n"
              "        return [[examples[i:i + 1] for i in range(rank, len(examples), world_size)]\n"
              "                for rank in range(world_size)]\n"
              "    per_rank = max(1, -(-int(sizes.sum()) // (capacity * world_size)))\n")
    copy.run(dict(out="apart", micro_batch_tokens=200))
    assert [step["tokens"] for step in copy.metrics("apart")] == [
        step["tokens"] for step in copy.metrics("packed")]
    assert 0 < difference(copy.weights("apart"), copy.weights("packed")) < 1e-4


def test_layer_norm_for_rms_norm(copy):
    # Without a bias, so that the same checkpoint fits.
    copy.edit("model.py", "        return rms_norm(x, self.weight, self.eps)\n",
              "        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, eps=self.eps)\n")
    changed, _ = copy.run("model", dict(out="trained"), "trained/final")
    assert changed != answer(copy.data / "model")
    assert len(copy.metrics("trained")) == 3


def test_gelu(copy):
    copy.edit("model.py", "        return linears(swiglu(gate, up), self.down_proj)[0]\n",
              "        return self.down_proj(nn.functional.gelu(gate) * up)\n")
    changed, _ = copy.run("model", dict(out="trained"), "trained/final")
    assert changed != answer(copy.data / "model")
    assert len(copy.metrics("trained")) == 3


def test_a_regularizer(copy):
    copy.edit("loss.py", "def kl_divergence(",
              "def z_loss(hidden: Tensor, head_weight: Tensor, coefficients: Tensor) -> Tensor:\n"
              "    return (coefficients * (hidden @ head_weight.T).float().logsumexp(-1) ** 2).sum()\n\n\n"
              "def kl_divergence(")
    copy.edit("config.py", "    # optimization; the paper's values\n",
              "    z_weight: float = flag(0.0, \"adds this times the squared log-normalizer\", least=0)\n"
              "    # optimization; the paper's values\n")
    copy.edit("train.py", "step_record, sums_by_kind\n", "step_record, sums_by_kind, z_loss\n")
    copy.edit("train.py", "    if log_untrained:",
              "    if config.z_weight:\n"
              "        statistics[\"z\"] = z_loss(hidden[trained], head, batch.coefficients[trained])\n"
              "        loss = loss + config.z_weight * statistics[\"z\"]\n"
              "    if log_untrained:")
    copy.run(dict(out="without"), dict(out="with", z_weight=0.1))
    without, with_it = copy.metrics("without"), copy.metrics("with")
    assert "z" not in without[0] and with_it[0]["z"] > 0
    assert with_it[0]["loss"] == without[0]["loss"] and with_it[-1]["z"] < with_it[0]["z"]
    assert difference(copy.weights("with"), copy.weights("without")) > 0


def test_the_optimizer(copy):
    text = (copy.root / "train.py").read_text()
    start = text.index("    return torch.optim.AdamW(")
    end = text.index("\n\n\n", start)
    copy.edit("train.py", text[start:end], "    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)")
    saved = copy.data / "whole" / "checkpoints" / "step-00000002"
    copy.run(dict(out="whole", save_every=1, keep_checkpoints=9), dict(out="resumed", resume=str(saved)))
    assert [step["step"] for step in copy.metrics("resumed")] == [3]
    assert difference(copy.weights("resumed"), copy.weights("whole")) == 0


def test_the_schedule_and_which_spans_count(copy):
    copy.edit("train.py", '"constant": 1.0}', '"constant": 1.0, "half": 0.5}')
    copy.edit("config.py", 'choices=("linear", "cosine", "constant")',
              'choices=("linear", "cosine", "constant", "half")')
    copy.edit("config.py", '    "lm": {TEMPLATE', '    "questions": {INSTRUCTION: 1.0},\n    "lm": {TEMPLATE')
    copy.run(dict(out="new", schedule="half", warmup_ratio=0, loss="questions", lr=0.01))
    for step in copy.metrics("new"):
        assert step["lr"] == 0.005
        assert step["loss"] == pytest.approx(step["nll_instruction"], rel=1e-5)
    assert step["trained_tokens"] < step["tokens"]


def test_a_weight_by_message(copy):
    copy.edit("chat.py", '"completion", "context")', '"completion", "context", "light")')
    copy.edit("chat.py", "COMPLETION, CONTEXT = range", "COMPLETION, CONTEXT, LIGHT = range")
    copy.edit("records.py", "        if value not in (0, 1):\n", "        if value not in (0, 1, 0.5):\n")
    copy.edit("records.py", "    weights = {int(value == TRAINS[field]) for",
              "    weights = {0.5 if value == 0.5 else int(value == TRAINS[field]) for")
    copy.edit("records.py", '**({"weight": 0} if weights == {0} else {})}',
              '**({"weight": weights.pop()} if weights and weights != {1} else {})}')
    copy.edit("chat.py", '        kind = CONTEXT if message.get("weight") == 0 else',
              '        kind = {0: CONTEXT, 0.5: LIGHT}.get(message.get("weight")) or')
    copy.edit("config.py", "    weights = np.zeros(len(KINDS))\n",
              "    weights = np.zeros(len(KINDS))\n    weights[LIGHT] = 0.5\n")
    copy.edit("config.py", "from chat import COMPLETION,", "from chat import LIGHT, COMPLETION,")
    for name in ("full", "half"):
        with open(copy.data / f"{name}.jsonl", "w") as out:
            for line in (copy.data / "train.jsonl").read_text().splitlines():
                record = json.loads(line)
                for message in record["messages"]:
                    message.pop("weight", None)
                    if name == "half" and message["role"] == "assistant":
                        message["weight"] = 0.5
                out.write(json.dumps(record) + "\n")
    copy.run(*(dict(out=name, train_data=f"{copy.data}/{name}.jsonl", loss="it", no_require_completion=True)
               for name in ("full", "half")))
    full, half = copy.metrics("full"), copy.metrics("half")
    # The first step's loss, before any update: half of each answer's NLL.
    assert half[0]["tokens"] == full[0]["tokens"]
    assert half[0]["loss"] == pytest.approx(full[0]["loss"] / 2, rel=1e-5)


def test_readme_names_every_change_that_is_tested_here():
    table = (ROOT / "README.md").read_text().split("| to change |")[1].split("\n\n")[0]
    for place in ("records.LAYOUTS", "templates/", "data.pack", "model.py", "loss.py", "micro_batch_loss",
                  "make_optimizer", "chat.render"):
        assert place in table, f"README's table does not name {place}"
