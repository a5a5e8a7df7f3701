"""The harness on the trainer's model against its own `hf` model on the same random checkpoint, shared
prefixes against each request alone, and the paper's means against hand-written ones."""
import json
import random
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import datasets
import lm_eval
import lm_eval.tasks
import pytest
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

import forks
import tokenizers_for_tests
from chat import load_template
from runtime.tokenizer import Tokenizer
from eval import harness, likelihood, paper_suite
from eval.common import Loaded
from eval.engine import Engine
from eval.harness_model import HarnessModel
from eval.likelihood import log_likelihoods
from harness_tasks import TASKS, make_documents, make_tasks, write_lines
from model import Llama, load_model
from tiny import ROOT, WORDS, copies_of_meta_tensors, flags, make_model

# Reading the harness's own tasks takes ten seconds.
NO_DEFAULTS = partial(TaskManager, include_defaults=False)


@pytest.fixture(scope="module", autouse=True)
def hermetic(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(lm_eval.tasks, "TaskManager", NO_DEFAULTS)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    make_model(folder / "model")
    make_model(folder / "other", seed=1)
    make_tasks(folder / "tasks")
    return folder


# ---------------------------------------------------------------- log-likelihoods


def make_requests(model: Llama) -> list[tuple[list[int], list[int]]]:
    """Questions behind headers that several share, continued in several ways, some of them the likeliest."""
    rng, vocabulary = random.Random(0), model.config.vocab_size

    def some(n: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(n)]

    headers, requests = [some(n) for n in (40, 7, 150)], []
    for _ in range(20):
        context = rng.choice(headers) + some(rng.randint(0, 30))
        for _ in range(rng.randint(1, 4)):
            answer = some(rng.randint(1, 6))
            requests.append(((context + answer)[:-1], answer))
    for inputs, _ in requests[:6]:      # and the likeliest token behind the same inputs
        n = len(inputs)
        hidden = model(torch.tensor(inputs), torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
        requests.append((inputs, [int((hidden[-1] @ model.head_weight.T).argmax())]))
    return [*requests, requests[0], ([1] * 200, [2] * 200), ([4], [5])]


@torch.no_grad()
def log_likelihood_alone(model: Llama, inputs: list[int], targets: list[int]) -> tuple[float, bool]:
    """One request by itself, from all its logits."""
    n = len(inputs)
    hidden = model(torch.tensor(inputs), torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
    log_p = (hidden @ model.head_weight.T).float().log_softmax(-1)[n - len(targets):]
    wanted = torch.tensor(targets)
    return log_p.gather(1, wanted[:, None]).double().sum().item(), bool((log_p.argmax(-1) == wanted).all())


@pytest.mark.parametrize("capacity, tile", [(1, 128), (7, 3), (64, 16), (300, 128), (9999, 128), (300, 8)])
def test_shared_prefixes_change_no_log_likelihood(folder, capacity, tile, monkeypatch):
    monkeypatch.setattr(likelihood, "TILE", tile)
    monkeypatch.setattr(likelihood, "CHUNK_LOGITS", 5000)
    model = load_model(folder / "model").requires_grad_(False)
    requests = make_requests(model)
    got = {i: found for i, *found in log_likelihoods(model, requests, capacity)}
    expected = [log_likelihood_alone(model, *request) for request in requests]
    assert sorted(got) == list(range(len(requests))) and {greedy for _, greedy in expected} == {True, False}
    for i, (total, greedy) in enumerate(expected):
        assert got[i][0] == pytest.approx(total, abs=1e-4) and got[i][1] == greedy


def test_no_token_of_a_shared_prefix_is_computed_twice(folder, monkeypatch):
    model = load_model(folder / "model").requires_grad_(False)
    requests, rows, forward = make_requests(model), [], Llama.forward
    monkeypatch.setattr(Llama, "forward", lambda self, ids, *more, **named: rows.append(len(ids)) or forward(
        self, ids, *more, **named))
    assert len(list(log_likelihoods(model, requests, 100))) == len(requests)
    prefixes = {tuple(inputs[:n + 1]) for inputs, _ in requests for n in range(len(inputs))}
    assert sum(rows) == len(prefixes) < sum(len(inputs) for inputs, _ in requests) / 3
    assert max(rows) == 100
    assert list(log_likelihoods(model, [], 100)) == []


def test_the_host_waits_once_for_each_row_in_which_requests_end(folder, monkeypatch):
    model = load_model(folder / "model").requires_grad_(False)
    requests = make_requests(model)
    ended = sum(any(last == len(requests[i][0]) for i, _, last in row)
                for row in likelihood.make_rows(requests, 100))
    copies = copies_of_meta_tensors(monkeypatch)
    assert len(list(log_likelihoods(model.to("meta"), requests, 100))) == len(requests)
    assert copies == ["cpu"] * ended and ended > 2


def test_bf16_is_as_far_from_exact_as_each_request_alone(folder):
    model = load_model(folder / "model").requires_grad_(False)
    requests = make_requests(model)
    exact = torch.tensor([log_likelihood_alone(model, *request)[0] for request in requests])
    model.to(torch.bfloat16)
    alone = torch.tensor([log_likelihood_alone(model, *request)[0] for request in requests])
    got = torch.tensor([total for _, total, _ in sorted(log_likelihoods(model, requests, 64))])
    assert 0 < (got - exact).norm() < 2 * (alone - exact).norm() < 0.2 * exact.norm()


# ---------------------------------------------------------------- tokens and templates


@pytest.mark.parametrize("name", tokenizers_for_tests.CAST)
def test_text_is_encoded_as_transformers_does(name, tmp_path):
    tokenizers_for_tests.write(name, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    words = Tokenizer(tmp_path)
    model = HarnessModel.__new__(HarnessModel)
    model.words = words
    hf = HFLM.__new__(HFLM)
    hf.tokenizer, hf.add_bos_token, hf.backend, hf.custom_prefix_token_id = theirs, None, "causal", None
    theirs.pad_token = theirs.eos_token
    assert (model.prefix_token_id, model.eot_token_id) == (hf.prefix_token_id, hf.eot_token_id)
    start = words.bos_token or words.eos_token
    for text in ("Name a colour.", " Où est la gare? 日本語\n\n", "", f"{start}Red is a colour",
                 f"a{start} b", f"Say hello{words.eos_token}\nworld", "   "):
        for special in (None, True, False):
            assert model.tok_encode(text, special) == hf.tok_encode(text, special)
        assert (model.tok_encode(text) == hf.tok_batch_encode([text])[0][0].tolist()) or not text
    for pair in (("Red is a ", "plum"), ("Red is a", " plum"), ("Where is the \n", "café")):
        assert model._encode_pair(*pair) == hf._encode_pair(*pair)


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Red?"},
                {"role": "assistant", "content": " A plum. "}]


@pytest.mark.parametrize("template", ["llama3", "tulu", "llama2"])
def test_conversations_are_rendered_as_transformers_does(template, tmp_path):
    words = Tokenizer(tokenizers_for_tests.write("llama3", tmp_path))
    model = HarnessModel.__new__(HarnessModel)
    model.words = words
    model.loaded = Loaded("", None, words, load_template(template, words), None, None)
    tokenizers_for_tests.write("llama3", tmp_path, model.loaded.template.source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages, ask in ((CONVERSATION[:2], True), (CONVERSATION, False), (CONVERSATION[1:], False)):
        assert model.apply_chat_template(messages, ask) == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask, continue_final_message=not ask)


def test_a_template_that_refuses_system_messages_goes_without(tmp_path):
    source = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
              "{% endif %}{{ m.content }}<|eot_id|>{% endfor %}")
    (tmp_path / "strict.jinja").write_text(source)
    words = Tokenizer(tokenizers_for_tests.write("llama3", tmp_path))
    model = HarnessModel.__new__(HarnessModel)
    model.loaded = Loaded("", None, words, load_template(str(tmp_path / "strict.jinja"), words), None, None)
    assert model.apply_chat_template(CONVERSATION[:2]) == "Red?<|eot_id|>"


# ---------------------------------------------------------------- against the harness's own model


def run_tasks(model: object, folder: Path, **more: object) -> dict:
    return simple_evaluate(model=model, tasks=list(TASKS), bootstrap_iters=10, log_samples=True,
                           task_manager=NO_DEFAULTS(include_path=str(folder / "tasks")), **more)


def numbers(row: dict) -> dict[str, float]:
    found = {name: value for name, value in row.items() if not isinstance(value, str)}
    assert len(found) > 2
    return found


def responses(results: dict) -> dict[tuple, object]:
    """{(task, document, request): what the model said}"""
    return {(task, sample["doc_id"], i): said for task, samples in results["samples"].items()
            for sample in samples for i, ((said,),) in enumerate(zip(sample["resps"]))}


@pytest.mark.parametrize("tokenizer, length, more", [
    ("llama3", None, {}), ("llama2", 64, {}), ("qwen", 50, {"gen_kwargs": "max_gen_toks=9"}),
    ("llama3", None, {"apply_chat_template": True, "fewshot_as_multiturn": True,
                      "system_instruction": "Be brief"})])
def test_results_equal_the_hf_models(tokenizer, length, more, tmp_path):
    make_model(tmp_path / "model", tokenizer, seed=3)
    make_tasks(tmp_path / "tasks")
    if more.get("apply_chat_template"):
        words = Tokenizer(tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").write_text(load_template("llama3", words).source)
    ours = HarnessModel(str(tmp_path / "model"), template="auto" if "apply_chat_template" in more else None,
                        dtype="fp32", device="cpu", batch_size=4, max_length=length, micro_batch_tokens=100)
    theirs = HFLM(str(tmp_path / "model"), dtype="float32", device="cpu", batch_size=1, max_length=length)
    got, expected = (run_tasks(model, tmp_path, **more) for model in (ours, theirs))
    for task, row in expected["results"].items():
        assert numbers(got["results"][task]) == pytest.approx(numbers(row), rel=1e-4)
    said, should = responses(got), responses(expected)
    assert said.keys() == should.keys() and len(said) > 40
    for key, answer in should.items():
        if isinstance(answer, tuple):
            assert said[key][0] == pytest.approx(answer[0], abs=1e-3) and said[key][1] == answer[1]
        else:
            assert said[key] == (answer if isinstance(answer, str) else pytest.approx(answer, abs=2e-3))
    texts = [answer for key, answer in should.items() if key[0] == "tiny_generate"]
    assert len(set(texts)) > 5 and not any("e" in text for text in texts)


def ask(context: str, **settings: object) -> Instance:
    return Instance("generate_until", {}, (context, settings), 0)


@pytest.fixture(scope="module")
def model(folder) -> HarnessModel:
    return HarnessModel(str(folder / "model"), dtype="fp32", device="cpu", batch_size=3)


def test_an_answer_ends_at_its_until_string_even_if_two_tokens_spell_it(model, monkeypatch):
    made, answers = [], Engine.answers

    def watched(self, prompts, *more, **named):
        for i, ids, stopped in answers(self, prompts, *more, **named):
            made.append(ids)
            yield i, ids, stopped

    monkeypatch.setattr(Engine, "answers", watched)
    free = model.generate_until([ask("red plum", until=[], max_gen_toks=40)])[0]
    texts = [model.words.decode([token]) for token in made[0]]
    stop = next(a[-1] + b[0] for a, b in zip(texts[5:], texts[6:]) if a.isascii() and b.isascii())
    assert model.generate_until([ask("red plum", until=[stop], max_gen_toks=40)]) == [free.split(stop)[0]]
    assert 0 < len(made[1]) < 30 < len(made[0])


def test_settings_differ_between_requests_of_one_call(model):
    asked = [ask("red", until=["\n"], max_gen_toks=3), ask("blue", until=["\n"], max_gen_toks=12),
             ask("red", until=["\n"], max_gen_toks=12), ask("blue", until=["\n"], max_gen_toks=3)]
    assert model.generate_until(asked) == [model.generate_until([request])[0] for request in asked]


def test_samples_are_seeded_and_repeats_differ(model, monkeypatch):
    asked = [ask("red", until=[], max_gen_toks=12, do_sample=True, temperature=1.0)] * 3
    torch.manual_seed(1)
    first = model.generate_until(asked)
    assert len(set(first)) == 3 and model.generate_until(asked) == first
    torch.manual_seed(2)
    assert not set(first) & set(model.generate_until(asked))
    torch.manual_seed(1)
    monkeypatch.setattr(model, "_rank", 1)
    assert not set(first) & set(model.generate_until(asked))


def test_sampling_settings_are_those_of_hf(model, monkeypatch):
    assert model.sampling(do_sample=False, temperature=0.7, top_p=0.5, num_beams=1).temperature == 0
    monkeypatch.setattr(model, "generation_config", {})
    got = model.sampling(do_sample=True, temperature=0.7)
    default = transformers.GenerationConfig._get_default_generation_params()
    assert (got.temperature, got.top_k, got.top_p) == (0.7, default["top_k"], default["top_p"])
    monkeypatch.setattr(model, "generation_config", {"top_k": 3, "top_p": 0.8})
    got = model.sampling(do_sample=True, temperature=0.7, top_p=0.9)
    assert (got.top_k, got.top_p) == (3, 0.9)
    for settings, says in ((dict(do_sample=False, num_beams=4), "num_beams.*not supported"),
                           (dict(do_sample=False, min_p=0.1), "min_p.*not supported"),
                           (dict(do_sample=True), "temperature above 0")):
        with pytest.raises(ValueError, match=says):
            model.sampling(**settings)


@pytest.mark.parametrize("named, expected", [(None, 0), (5, 1), ([5, 9], 2)])
def test_generation_ends_at_the_ids_of_generation_config(named, expected, tmp_path):
    make_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    model = HarnessModel(str(tmp_path), dtype="fp32", device="cpu")
    assert model.stop_ids == {model.eot_token_id, *([5, 9][:expected])}


def test_what_cannot_be_scored_or_generated_is_named(model):
    with pytest.raises(ValueError, match="continuation of 0 tokens"):
        model._loglikelihood_tokens([(("a", ""), [1], [])])
    with pytest.raises(ValueError, match="continuation of 300 tokens.*max_length"):
        model._loglikelihood_tokens([(None, [1], [2] * 300)])
    with pytest.raises(ValueError, match="max_gen_toks 256: must be less than the model's length 256"):
        model.generate_until([ask("a", until=[])])


# ---------------------------------------------------------------- the program


def arguments(folder: Path, **more: object) -> list[str]:
    """Ours with dashes, the harness's with underscores."""
    both = {**dict(model=folder / "model", dtype="fp32", device="cpu", include_path=folder / "tasks",
                   tasks=",".join(TASKS)), **more}
    ours = ("model", "dtype", "device", "json", "local", "template", "micro_batch_tokens")
    return [*flags(**{name: value for name, value in both.items() if name in ours}),
            *(word.replace("-", "_").replace("__", "--", 1) if word.startswith("--") else word
              for word in flags(**{name: value for name, value in both.items() if name not in ours}))]


def result(folder: Path, **more: object) -> dict:
    harness.main(arguments(folder, json=folder / "result.json", **more))
    return json.loads((folder / "result.json").read_text())


def test_the_program_passes_the_harness_its_options(folder, capsys):
    got = result(folder, limit=4, num_fewshot=1, output_path=folder / "out", log_samples=True, seed=5,
                 gen_kwargs='{"max_gen_toks": 5, "until": ["a", "b"]}', model_args="max_length=100",
                 tasks=["tiny_ch*", "tiny_generate"])
    assert "tiny_choice" in capsys.readouterr().out
    config = got["config"]
    assert (config["model"], config["limit"], config["model_args"]["max_length"]) == ("spantune", 4, 100)
    assert {config[f"{name}_seed"] for name in ("random", "numpy", "torch", "fewshot")} == {5}
    assert got["n-shot"]["tiny_choice"] == 1 and got["n-samples"]["tiny_choice"]["effective"] == 4
    generation = got["configs"]["tiny_generate"]["generation_kwargs"]
    assert (generation["max_gen_toks"], generation["until"]) == (5, ["a", "b"])
    samples, = (folder / "out").rglob("samples_tiny_choice_*.jsonl")
    assert len(samples.read_text().splitlines()) == 4


def test_a_chat_template_is_applied(folder, monkeypatch):
    seen, generate = [], HarnessModel.generate_until
    monkeypatch.setattr(HarnessModel, "generate_until", lambda self, requests, **named: seen.extend(
        request.args[0] for request in requests) or generate(self, requests, **named))
    harness.main(arguments(folder, tasks="tiny_generate", limit=1, apply_chat_template=True,
                           template="llama3"))
    question = make_documents(9, 0)[0]["question"]
    assert seen == [f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ: {question}\nA:"
                    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"]
    # Examples as turns of their own, by default, or in the question's.
    for multiturn, headers in (("true", 3), ("false", 1)):
        seen.clear()
        harness.main(arguments(folder, tasks="tiny_generate", limit=1, num_fewshot=1, template="llama3",
                               apply_chat_template=True, system_instruction="Be brief.",
                               fewshot_as_multiturn=multiturn))
        [text] = seen
        assert text.count("Be brief.") == 1
        assert text.partition("Be brief.")[2].count("<|start_header_id|>") == headers + 1


def test_kept_answers_are_not_computed_again_and_not_another_checkpoints(folder, monkeypatch):
    made, forward = [], Llama.forward
    monkeypatch.setattr(Llama, "forward", lambda self, *given, **named: made.append(1) or forward(
        self, *given, **named))
    first = result(folder, use_cache=folder / "kept")
    assert made
    made.clear()
    assert result(folder, use_cache=folder / "kept")["results"] == first["results"] and not made
    other = result(folder, use_cache=folder / "kept", model=folder / "other")
    assert made and other["results"] != first["results"]
    for more in (dict(model_args="max_length=30"), dict(dtype="bf16")):
        made.clear()
        result(folder, use_cache=folder / "kept", **more)
        assert made, more


@pytest.mark.parametrize("file, change", [("generation_config.json", {"eos_token_id": [5]}),
                                          ("generation_config.json", {"top_k": 7}),
                                          ("tokenizer_config.json", {"eos_token": "<|begin_of_text|>"})])
def test_answers_are_not_taken_from_before_a_file_that_decides_them_changed(file, change, tmp_path):
    make_model(tmp_path)
    identities = [HarnessModel(tmp_path).identity]
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**content, **change}))
    identities.append(HarnessModel(tmp_path).identity)
    assert identities[0] != identities[1]


def test_answers_are_kept_as_they_come(folder, monkeypatch):
    """An interrupted run has lost only what was not yet answered."""
    asked, found = [], likelihood.log_likelihoods

    def interrupted(model, requests, capacity):
        asked.append(len(requests))
        for n, answer in enumerate(found(model, requests, capacity)):
            if len(asked) == 1 and n == 10:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr("eval.harness_model.log_likelihoods", interrupted)
    argv = arguments(folder, tasks="tiny_choice", use_cache=folder / "cut", micro_batch_tokens=20)
    with pytest.raises(KeyboardInterrupt):
        harness.main(argv)
    harness.main(argv)
    assert asked[0] - asked[1] == 10


def test_documents_from_a_file(folder):
    file = write_lines(folder / "local.jsonl", make_documents(5, seed=7))
    text = file.read_text().replace('"target": "', '"target": "a\u2028')     # no line ends here
    file.write_text(text, encoding="utf-8")
    got = result(folder, local=f"tiny_choice={file}")
    assert {task: row["original"] for task, row in got["n-samples"].items()} == {
        "tiny_choice": 5, "tiny_generate": 9, "tiny_perplexity": 9}
    (folder / "expected").mkdir(exist_ok=True)
    make_tasks(folder / "expected" / "tasks", 5, seed=7)
    expected = run_tasks(HFLM(str(folder / "model"), dtype="float32", device="cpu"), folder / "expected")
    assert got["results"]["tiny_choice"]["acc,none"] == expected["results"]["tiny_choice"]["acc,none"]


@pytest.mark.parametrize("named, others", [("tiny_group", ["tiny_generate"]),
                                           ("tiny_tag", ["tiny_generate", "tiny_perplexity"])])
def test_documents_of_one_task_of_a_group_or_tag_come_from_a_file(folder, named, others):
    file = write_lines(folder / "few.jsonl", make_documents(4, seed=8))
    (folder / "tasks" / "group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_choice, tiny_generate]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")
    got = result(folder, tasks=named, local=f"tiny_choice={file}")
    assert {task: row["original"] for task, row in got["n-samples"].items()} == {
        "tiny_choice": 4, **dict.fromkeys(others, 9)}
    if named == "tiny_group":
        assert got["groups"][named]["acc,none"] == got["results"]["tiny_choice"]["acc,none"]


def test_local_files_name_the_splits_that_a_task_needs():
    config = {"test_split": "test", "training_split": "train", "fewshot_split": "train", "num_fewshot": 5}
    one, both = {"": "a"}, {"": "a", "train": "b"}
    for files, shots, fields, says in (
            (one, None, {}, "examples come from split train; give --local piqa/train=FILE"),
            (one, 10, {"num_fewshot": None}, "split train"),
            # The harness prefers the split to the samples.
            (one, None, {"fewshot_config": {"samples": [{}]}}, "split train"),
            ({"train": "b"}, 0, {}, "split test is evaluated")):
        with pytest.raises(ValueError, match=says):
            harness.local_fields("piqa", files, {**config, **fields}, shots)
    got = harness.local_fields("piqa", one, config, 0)
    assert got["dataset_kwargs"] == {"data_files": {"test": "a"}}
    assert got["fewshot_config"] == {"samples": []}
    assert harness.local_fields("piqa", one, {**config, "num_fewshot": 0}, 5) == got
    got = harness.local_fields("piqa", both, config, None)
    assert got["dataset_kwargs"] == {"data_files": {"test": "a", "train": "b"}} and "fewshot_split" not in got
    samples = {"test_split": "test", "num_fewshot": 5, "fewshot_config": {"samples": [{}]}}
    assert "fewshot_config" not in harness.local_fields("gsm8k_cot", one, samples, None)


def test_a_task_without_examples_needs_no_file_for_their_split(folder):
    file = write_lines(folder / "zero.jsonl", make_documents(3, seed=4))
    text = (folder / "tasks" / "tiny_generate.yaml").read_text().replace(
        "task: tiny_generate\ntag: tiny_tag", "task: split")
    (folder / "tasks" / "split.yaml").write_text(f"{text}training_split: train\nfewshot_split: train\n")
    assert result(folder, tasks="split", local=f"split={file}")["n-samples"]["split"]["original"] == 3


@pytest.mark.parametrize("more, says", [
    (dict(tasks="nothing"), "--tasks nothing: the harness has no such task"),
    (dict(template="tulu"), "needs --apply_chat_template"),
    (dict(tasks="paper", num_fewshot=3), "--num_fewshot 3"),
    (dict(tasks="paper"), "none of its tasks can be loaded; for one, mmlu: KeyError"),
    (dict(model_args="peft=x"), "--model_args peft=x: must be max_length=N"),
    (dict(model_args="pretrained=x"), "everything else has a flag"),
    (dict(model_args="max_length=0"), "--model_args max_length=0"),
    (dict(model_args="max_length=x"), "--model_args max_length=x"),
    (dict(limit=0), "--limit 0: must be a number"), (dict(limit=-3), "--limit -3: must be a number"),
    (dict(include_path="nowhere"), "--include_path nowhere: is not a folder"),
    (dict(num_fewshot=-1), "--num_fewshot -1: must be a whole number"),
    (dict(seed=-1), "--seed -1: must be a whole number"),
    (dict(tasks="tiny_choice", num_fewshot=3), "exceeds the 2 that .* give a smaller --num_fewshot"),
    (dict(tasks="nothing.yaml"), "--tasks nothing.yaml"), (dict(gen_kwargs="{"), "--gen_kwargs {"),
    (dict(local="a"), "write TASK=FILE"), (dict(local="tiny_choice=x.csv"), "a .json or .jsonl file"),
    (dict(local="tiny_choice=nowhere.jsonl"), "nowhere.jsonl: no such"),
    (dict(local="tiny_choice=x.json", json="x.json"), "--local names this file, too"),
    (dict(max_batch_size=3), "--max_batch_size"), (dict(batch_size=0), "--batch_size 0"),
    (dict(max_length=3), "--max_length 3: unrecognized"), (dict(log_samples=True), "--output_path"),
    (dict(micro_batch_tokens=0), "--micro-batch-tokens 0"), (dict(model="nowhere"), "nowhere")])
def test_wrong_flags_are_named(folder, more, says):
    with pytest.raises(ValueError, match=says):
        harness.main(arguments(folder, **more))


def test_without_the_harness_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.utils", None)
    with pytest.raises(ValueError, match="pip install -r requirements-eval.txt"):
        harness.main(arguments(folder))


def test_bad_local_files_are_named_with_their_line(tmp_path, folder):
    for text, says in (('{"a": 1}\n{"a"\n', "bad.jsonl:2"), ("[1, 2]", "not a JSON object"),
                       ("\n", "is empty"),
                       ('{"a": "b"}', "--local tiny_choice=.*/bad.jsonl: a doc.* 'question' is undefined")):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=says):
            harness.main(arguments(folder, local=f"tiny_choice={tmp_path / 'bad.jsonl'}"))
    file = write_lines(tmp_path / "good.jsonl", make_documents(2, 0))
    with pytest.raises(ValueError, match="no task of that name"):
        harness.main(arguments(folder, local=f"another={file}"))


def test_two_ranks_find_what_one_does(folder):
    start = folder / "start.py"     # without the harness's own tasks, whose reading takes ten seconds
    start.write_text(f"""import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
from functools import partial
import datasets, lm_eval.tasks
datasets.config.HF_DATASETS_CACHE = {str(folder / 'cache')!r}
lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
from runtime import distributed
from eval import common, harness, harness_model
found = harness_model.log_likelihoods
def counted(model, requests, capacity):
    with open(f"computed{{distributed.rank()}}", "a") as out:
        print(len(requests), file=out)
    return found(model, requests, capacity)
harness_model.log_likelihoods = counted
common.run(harness.main)
""")
    done = forks.run([str(start), *arguments(folder, json=folder / "two.json")], ranks=2, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = json.loads((folder / "two.json").read_text())["results"], result(folder)["results"]
    for task in TASKS:
        assert numbers(two[task]) == pytest.approx(numbers(one[task]), rel=1e-5)
    assert done.stdout.count("|tiny_choice") == 1
    # Every other document, and what the harness fills the shorter share up with.
    choices = [len(document["choices"]) for document in make_documents(9, 0)]
    shares = [max(sum(choices[::2]), sum(choices[1::2])), 5]
    for rank in (0, 1):
        assert list(map(int, (folder / f"computed{rank}").read_text().split())) == shares


# ---------------------------------------------------------------- the paper's suite


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """Of the installed harness's own tasks, those of the suite."""
    root = Path(lm_eval.tasks.__file__).parent
    return NO_DEFAULTS(include_path=[str(root / name) for name in (
        "mmlu/default", "piqa", "openbookqa", "hellaswag", "lambada", "lambada_multilingual", "translation",
        "wsc273", "winogrande", "arc", "coqa", "gsm8k", "bbh/cot_fewshot", "truthfulqa", "toxigen",
        "hendrycks_ethics")])


def test_the_suites_tasks_and_metrics_are_in_the_installed_harness(manager):
    def read_config(task: str) -> dict:
        return load_yaml(manager.task_index[task].yaml_path, resolve_func=False)

    for _, task, wanted, _ in paper_suite.SUITE:
        if task == "HumanEval":
            continue
        metric, _, name = wanted.partition(",")
        members = sorted(manager.task_index[task].tags) if task in manager.all_tags else [task]
        config = read_config(members[0])
        if task in manager.all_groups:
            assert metric in [row["metric"] for row in config["aggregate_metric_list"]]
            continue
        for member in members:
            config = read_config(member)
            assert metric in [row["metric"] for row in config["metric_list"]], member
            assert name in [row["name"] for row in config.get("filter_list", [{"name": "none"}])], member
    assert len(manager.task_index["gpt3_translation_benchmarks"].tags) == 6


def test_the_suite_runs_what_can_be_loaded_each_task_with_its_own_examples(manager, folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: deepcopy(manager))
    gsm = write_lines(folder / "gsm.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    piqa = write_lines(folder / "piqa.jsonl", [{"goal": f"a {i}", "sol1": "b", "sol2": "c", "label": 1}
                                               for i in range(12)])

    def write_arc(count: int) -> Path:
        return write_lines(folder / f"arc{count}.jsonl", [
            {"question": f"{i} {WORDS[i % 7]}", "answerKey": "BA"[i % 3 > 0],
             "choices": {"text": ["red", "a b"], "label": ["A", "B"]}} for i in range(count)])

    train, easy, challenge = map(write_arc, (26, 9, 4))
    got = result(folder, tasks="paper", gen_kwargs="max_gen_toks=5", local=[
        f"piqa={piqa}", f"piqa/train={piqa}", f"gsm8k_cot={gsm}", f"arc_easy={easy}",
        f"arc_easy/train={train}", f"arc_challenge={challenge}", f"arc_challenge/train={train}"])
    assert {task: got["n-shot"][task] for task in got["n-samples"]} == {
        "piqa": 10, "gsm8k_cot": 8, "arc_easy": 25, "arc_challenge": 25}
    scores, paper = got["results"], got["paper"]
    arc = [scores[task]["acc_norm,none"] for task in ("arc_easy", "arc_challenge")]
    assert paper["tasks"]["ai2_arc"]["value"] == pytest.approx((9 * arc[0] + 4 * arc[1]) / 13)
    assert arc[0] != arc[1] and paper["tasks"]["ai2_arc"]["stderr"] > 0
    assert paper["tasks"]["piqa"]["value"] == scores["piqa"]["acc_norm,none"]
    assert list(paper["tasks"]) == ["piqa", "ai2_arc", "gsm8k_cot"] and len(paper["not_run"]) == 14
    assert "openbookqa" in paper["not_run"]["openbookqa"]


def test_the_papers_means_by_hand():
    results = {
        "piqa": {"acc_norm,none": 0.7, "acc_norm_stderr,none": 0.01},
        "mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.02},
        "lambada_multilingual": {"acc,none": 0.3, "acc_stderr,none": 0.1},
        "gpt3_translation_benchmarks": {"ter,none": 120.0, "ter_stderr,none": 3.0},
        "coqa": {"f1,none": 0.4, "f1_stderr,none": "N/A"},
        "gsm8k_cot": {"exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": 0.03,
                      "exact_match,flexible-extract": 0.9}}
    found = paper_suite.summary(results, {"toxigen": "no such dataset"})
    ter = found["tasks"]["gpt3_translation_benchmarks"]
    assert (ter["value"], ter["stderr"], ter["higher_is_better"]) == (1.2, 0.03, False)
    assert found["tasks"]["coqa"]["stderr"] is None and found["tasks"]["gsm8k_cot"]["value"] == 0.1
    means = {name: (row["mean_as_in_paper"], row["mean_accuracies"])
             for name, row in found["categories"].items()}
    assert means["knowledge"] == pytest.approx((0.6, 0.6))
    assert means["multilingual"] == pytest.approx(((0.3 + 1.2) / 2, 0.3))
    assert means["BBH"] == (None, None)
    assert found["mean_as_in_paper"] == pytest.approx((0.6 + 0.75 + 0.4 + 0.1) / 4)
    assert found["mean_accuracies"] == pytest.approx((0.6 + 0.3 + 0.4 + 0.1) / 4)
    assert found["not_run"]["toxigen"] == "no such dataset" and found["not_run"]["wsc273"] == "not run"
    assert "eval.humaneval" in found["not_run"]["HumanEval"] and "piqa" not in found["not_run"]
    text = paper_suite.table(found)
    assert max(map(len, text.splitlines())) <= 80 and "120.00    3.00 (error)" in text
    assert "46.25" in text and "toxigen: no such dataset" in text


def test_a_suite_in_which_nothing_was_run_has_no_mean():
    found = paper_suite.summary({}, {})
    assert found["mean_as_in_paper"] is None and not found["tasks"]
    assert len(found["not_run"]) == len(paper_suite.SUITE)
    assert "-" in paper_suite.table(found)
