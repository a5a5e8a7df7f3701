"""Generation against transformers on random weights, sampling against a plain implementation of it, and the
program on a tiny checkpoint folder."""
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import eval.engine as engine
import eval.generate as module
import tokenizers_for_tests as cast
from chat import load_template
from runtime.foreign import printable
from runtime.tokenizer import Tokenizer
from eval.common import Loaded
from eval.engine import Cache, Document, Engine, Sampling
from eval.generate import Text, generate
from model import load_model
from references import FAMILIES, make_reference
from tiny import WORDS, copies_of_meta_tensors, flags, make_model, make_records, run_module

LENGTHS = (5, 30, 1, 12, 21, 12, 3, 40, 2)
NEVER = {-1}


def make_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(i)).tolist()
            for i, n in enumerate(lengths)]


@pytest.fixture
def mine(tmp_path):
    make_reference("llama2-gqa-tied").save_pretrained(tmp_path / "reference")
    return load_model(tmp_path / "reference").requires_grad_(False)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_transformers_in_slots_that_are_refilled_and_alone(name, tmp_path):
    reference = make_reference(name)
    reference.save_pretrained(tmp_path)
    model, prompts = load_model(tmp_path), make_prompts()
    expected = []
    for prompt in prompts:
        made = reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=7,
                                  pad_token_id=7, attention_mask=torch.ones(1, len(prompt)))
        made = made[0, len(prompt):].tolist()
        expected.append(made[:made.index(7)] if 7 in made else made)
    assert len(set(map(tuple, expected))) > 5 and len(set(sum(expected, []))) > 5
    for batch_size in (1, 4):
        assert generate(Engine(model), prompts, {7}, 12, batch_size) == expected


@pytest.mark.parametrize("name", ["llama-biases", "qwen3-tied-bias-llama3", "mistral"])
@pytest.mark.parametrize("way", ["fp32", "bf16", "autocast"])
def test_a_step_computes_what_the_model_does(name, way, tmp_path):
    make_reference(name).save_pretrained(tmp_path)
    model, (prompt, other) = load_model(tmp_path).requires_grad_(False), make_prompts((70, 9))
    row = torch.tensor(prompt), torch.arange(70), torch.tensor([0, 70], dtype=torch.int32)
    exact = model(*row)[60:]
    exact = exact, F.linear(exact, model.head_weight)
    if way == "bf16":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"), torch.no_grad():
        ready = Engine(model)
        cache = Cache(model.config, 3, ready.dtype, ready.device)
        begun = ready.step(cache, {}, {2: prompt[:60]})
        got, done = [], 60
        for count in (1, 3, 1, 4, 1):       # slot 1 is free, and slot 0 begins anew and has one token or two
            going = {2: (done, prompt[done:done + count])}
            if count == 3:
                hidden = ready.step(cache, going, {0: other})
                assert len(hidden) == 4
                got.append(hidden[:3])
            else:
                got.append(ready.step(cache, {0: (9, [5] * (count % 2 + 1))} | going, {})[-count:])
            done += count
        got = torch.cat(got)
        alone = model(torch.tensor(other), torch.arange(9), torch.tensor([0, 9], dtype=torch.int32))[-1:]
        for step, whole in ((hidden[3:], alone), (begun, model(*row)[59:60])):
            assert (step - whole).norm() / whole.norm() < (1e-5 if way == "fp32" else 0.05)
        expected = model(*row)[60:]
        logits = ready.head(got), F.linear(expected, model.head_weight)
    assert done == 70 and cache.layers[0].dtype == got.dtype == expected.dtype
    for step, whole, truth in zip(*zip((got, expected), logits), exact):
        error, own = ((x.float() - truth).norm() / truth.norm() for x in (step, whole))
        assert error < (1e-5 if way == "fp32" else 2 * own) and own < 0.05


def test_refilling_and_batch_size_change_no_answer(mine, monkeypatch):
    prompts = make_prompts()
    stop = {generate(Engine(mine), [prompts[0]], NEVER, 8, 1)[0][4], *range(0, 97, 9)}  # some end early
    alone = [generate(Engine(mine), [prompt], stop, 30, 1)[0] for prompt in prompts]
    assert len({len(ids) for ids in alone}) > 3
    for batch_size, row in ((2, 8192), (3, 8192), (9, 8192), (9, 25)):
        monkeypatch.setattr(engine, "ROW", row)
        assert generate(Engine(mine), prompts, stop, 30, batch_size) == alone


def test_the_cache_grows_and_shrinks_and_keeps_what_is_in_it(mine):
    cache, (long, short) = Cache(mine.config, 2, torch.float32, "cpu"), make_prompts((150, 10))

    def short_one(places):
        return torch.stack(cache.layers)[:, :, 1, :, :places]

    ready = Engine(mine)
    with torch.no_grad():
        ready.step(cache, {}, {0: long, 1: short})
        first, held = cache.layers[0].shape[3], short_one(10)
        cache.fit(20)
        assert (first, cache.layers[0].shape[3]) == (160, 32) and torch.equal(short_one(10), held)
        ready.step(cache, {1: (10, [4])}, {})   # slot 0 is free: its document no longer fits
        assert torch.equal(short_one(10), held) and short_one(11)[..., 10, :].any()
        cache.fit(150)
        assert cache.layers[0].shape[3] == 160 and torch.equal(short_one(10), held)
        assert not torch.stack(cache.layers)[..., 32:, :].any()
        cache.fit(130)
        assert cache.layers[0].shape[3] == 160      # to shrink costs a copy


def test_a_free_slot_is_refilled_while_others_go_on(mine, monkeypatch):
    steps, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, cache, going, new: steps.append(
        (len(going), len(new), cache.layers[0].shape[1])) or step(self, cache, going, new))
    stop = {generate(Engine(mine), [make_prompts()[4]], NEVER, 8, 1)[0][3]}
    steps.clear()
    generate(Engine(mine), make_prompts(), stop, 30, 4)
    assert steps[0] == (0, 4, 4) and sum(new for _, new, _ in steps) == len(LENGTHS)
    assert sum(new > 0 for _, new, _ in steps) > 2
    assert any(going and new for going, new, _ in steps)        # in one and the same step
    assert steps[-1][2] == steps[-1][0] < 4                     # free slots are let go of at the end


@pytest.mark.parametrize("vocabulary", [97, 96, 3000, 49152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_highest_is_the_first_of_the_highest(vocabulary, dtype):
    logits = torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[::2] = logits[::2].round()       # many alike
    expected = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    assert torch.equal(engine.highest(logits), expected)


@pytest.mark.parametrize("prompts", [[[]], [[5, 6], []]])
def test_a_prompt_without_tokens_is_refused(mine, prompts):
    """Nothing would predict the first token of its answer."""
    with pytest.raises(ValueError, match=f"prompt {len(prompts)} of {len(prompts)} has no token"):
        next(Engine(mine).answers(prompts, set(), 4))


def test_prompts_longer_than_the_models_positions_are_warned_of(mine, capsys):
    positions = mine.config.max_position_embeddings
    warning = (f"warning: 1 of 2 prompt(s) longer than the model's max_position_embeddings, {positions}, the "
               f"longest {positions + 1} tokens; ")
    for more, says in ((0, ""), (1, warning)):
        generate(Engine(mine), [[5], [5] * (positions + more)], NEVER, 1)
        err = capsys.readouterr().err
        assert err.startswith(says) and err.count("\n") == bool(says)


def test_stop_and_max_new_tokens_end_an_answer(mine):
    prompt = make_prompts()[1]
    free = generate(Engine(mine), [prompt], NEVER, 12)[0]
    assert len(free) == 12 and len(set(free)) > 2
    stop = free[6]
    at = free.index(stop)
    assert list(Engine(mine).answers([prompt], {stop}, 12)) == [(0, free[:at], True)]
    assert list(Engine(mine).answers([prompt], {stop}, at)) == [(0, free[:at], False)]
    assert list(Engine(mine).answers([], {stop}, 5)) == []


def plain_probabilities(logits, temperature, top_k, top_p):
    """(V,) -> the distribution that transformers samples from, by its own processors."""
    processors = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(transformers.TopPLogitsWarper(top_p))
    return processors(None, logits[None].float())[0].softmax(-1)


@pytest.mark.parametrize("vocabulary", [40, 3000])      # 3000: flatter than what is sorted at first
@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.3, 7, 1.0),
                                                       (0.8, 0, 0.7), (3.0, 0, 0.9), (1.5, 12, 0.6)])
def test_sampling_has_the_distribution_of_transformers(vocabulary, temperature, top_k, top_p):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    expected = plain_probabilities(logits, temperature, top_k, top_p)
    draws = (torch.arange(20000) + 0.5) / 20000     # an even grid: frequencies are probabilities
    sampling = Sampling(temperature, top_p, top_k)
    chosen = torch.cat([sampling.choose(logits.expand(len(part), -1), part) for part in draws.split(500)])
    got = torch.bincount(chosen, minlength=vocabulary) / len(draws)
    assert not got[expected == 0].any()
    assert (got - expected).abs().max() <= 1.01 / len(draws) + 1e-5
    ends = sampling.choose(logits.expand(2, -1), torch.tensor([0.0, 1 - 2**-24]))
    assert (expected[ends] > 0).all()


def test_samples_are_the_prompts_own_whatever_runs_beside_them(mine):
    prompts, sampling = make_prompts(), Sampling(1.0, 0.9, 20, seed=3)
    alone = [next(Engine(mine).answers([prompt], NEVER, 15, 1, sampling, [(i, 0)]))[1]
             for i, prompt in enumerate(prompts)]
    for batch_size in (2, 9):
        names = [(i, 0) for i in range(len(prompts))]
        got = {i: ids for i, ids, _ in Engine(mine).answers(prompts, NEVER, 15, batch_size, sampling, names)}
        assert [got[i] for i in range(len(prompts))] == alone
    same = [prompts[0]] * 3
    different = {i: ids for i, ids, _ in Engine(mine).answers(same, NEVER, 15, 3, sampling,
                                                              [(0, 0), (0, 1), (1, 0)])}
    assert different[0] == alone[0] and len(set(map(tuple, different.values()))) == 3
    reseeded = next(Engine(mine).answers(same[:1], NEVER, 15, 1, Sampling(1.0, 0.9, 20, seed=4), [(0, 0)]))
    assert reseeded[1] != alone[0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, 0.9), Sampling(0.7, 0.9, 20)],
                         ids=["greedy", "all", "top-p", "top-k"])
def test_the_host_waits_once_a_step_for_the_ids_that_were_chosen(mine, monkeypatch, sampling):
    steps, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda *a: steps.append(1) or step(*a))
    copies = copies_of_meta_tensors(monkeypatch)
    monkeypatch.setattr(torch, "autocast", lambda *a, **more: nullcontext())
    found = list(Engine(mine.to("meta")).answers(make_prompts(), NEVER, 15, 4, sampling))
    assert sorted(i for i, _, _ in found) == list(range(len(LENGTHS)))
    assert copies == ["tolist"] * len(steps) and len(steps) > 15


class NoSumsOfFloats(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten.cumsum.default or not args[0].is_floating_point()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampling_cumulates_integers_which_cuda_does_in_deterministic_mode_too(top_p):
    """There cumsum raises for floating-point numbers."""
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    with NoSumsOfFloats():
        Sampling(1.0, top_p).choose(logits, torch.rand(4))
    mass = engine.in_units(logits.softmax(-1))
    assert (mass.sum(-1) / engine.UNITS - 1).abs().max() < 1e-6


# ---------------------------------------------------------------- guessed tokens


def test_what_follows_two_tokens_is_guessed_by_hand():
    document = Document(0, [1, 2, 3, 1, 2], 9, torch.zeros(9))
    assert document.guess(9) == [3, 1]                      # at first no more than two
    document.take([3, 1, 2], [3, 1], {7})                   # both were right, and 2 came behind them
    assert document.ids == [1, 2, 3, 1, 2, 3, 1, 2] and document.made == 3
    assert document.guess(9) == [3, 1, 2] and document.guess(2) == [3, 1] and document.guess(0) == []
    document.take([3, 9, 2, 5], [3, 1, 2], {7})             # behind 3 came another: the rest does not count
    assert document.ids[8:] == [3, 9] and document.guess(9) == []
    document.take([9], [], {7})
    document.take([9], [], {7})
    assert document.ids[8:] == [3, 9, 9, 9] and document.guess(9) == [9]    # a loop; room for two more
    document.take([9, 7], [9], {7})
    assert document.stopped and document.made == 8
    full = Document(0, [4, 4, 4], 3, torch.zeros(3))
    full.take([4, 4, 4], [4, 4], {7})
    assert full.ended and not full.stopped and full.made == 3


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.2, seed=1)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("guesses", ["own", "wrong", "right"])
def test_guesses_change_the_number_of_steps_and_no_answer(mine, monkeypatch, sampling, guesses):
    prompts = [prompt * 3 for prompt in make_prompts()]
    steps, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda *args: steps.append(1) or step(*args))

    def answers(lookup: int) -> tuple[list, int]:
        steps.clear()
        return sorted(Engine(mine).answers(prompts, {5}, 40, 4, sampling, lookup=lookup)), len(steps)

    expected, plain = answers(0)
    outputs = [ids for _, ids, _ in expected]
    made_up = {"wrong": lambda self: [96] * 3, "right": lambda self: outputs[self.number][self.made:]}
    if guesses != "own":
        monkeypatch.setattr(Document, "guess", lambda self, most: made_up[guesses](self)[
            :min(most, self.room - self.made - 1)])
    got, fewer = answers(3)
    assert got == expected and len(set(map(tuple, outputs))) == len(prompts)
    assert {"own": fewer < plain, "wrong": fewer == plain, "right": fewer < 0.4 * plain}[guesses]


# ---------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    make_model(folder / "model")
    make_records(folder / "test.jsonl", 11)
    return folder


def arguments(folder, **more):
    return flags(**{**dict(model=folder / "model", template="llama3", dtype="fp32", device="cpu",
                           max_new_tokens=12, batch_size=4), **more})


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_file_in_file_out_and_resumed_after_a_cut(folder, monkeypatch):
    out = folder / "out.jsonl"
    argv = arguments(folder, data=folder / "test.jsonl", output=out, json=folder / "result.json",
                     temperature=1, seed=5, samples=2)
    monkeypatch.setattr(Loaded, "stop_ids", set(range(60)))     # so that some end
    module.main(argv)
    whole = lines(out)
    records = lines(folder / "test.jsonl")
    assert [(a["index"], a["sample"]) for a in whole] == [(i, s) for i in range(11) for s in (0, 1)]
    assert all(a["expected"] == records[a["index"]]["messages"][-1]["content"]
               and a["prompt"] == records[a["index"]]["messages"][-2]["content"] for a in whole)
    assert all(a["finished"] == (a["tokens"] < 12) for a in whole)
    result, ended = json.loads((folder / "result.json").read_text()), sum(a["tokens"] < 12 for a in whole)
    assert result["new_answers"] == 22 and result["finished"] == ended and 0 < ended < 22
    assert result["new_tokens"] == sum(a["tokens"] for a in whole) + ended

    text = out.read_bytes()
    kept = text.splitlines(keepends=True)[3:9]
    out.write_bytes(b"".join(kept) + kept[0][:25])      # six whole lines and the start of another
    made = []
    answers = Engine.answers
    monkeypatch.setattr(Engine, "answers",
                        lambda self, prompts, *a, **b: made.append(len(prompts)) or answers(
                            self, prompts, *a, **b))
    module.main(argv)
    assert made == [16] and out.read_bytes() == text
    module.main(argv)
    assert made == [16, 0] and out.read_bytes() == text
    with pytest.raises(ValueError, match="seed was 5, is 6"):
        module.main([*argv, "--seed", "6"])
    (folder / "out.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match="other settings"):
        module.main(argv)
    out.write_bytes(text.replace(b'"index"', b'"number"'))
    with pytest.raises(ValueError, match="are not answers"):
        module.main(argv)


def test_answers_of_a_run_count_as_right_if_they_are_equal_but_for_space_around_them(folder, monkeypatch):
    """What --eval-generate of a run counts, of answers given here. A record without an answer, or with one
    of weight 0, is passed over, and the one behind the limit is not asked."""
    tokenizer = Tokenizer(folder / "model")
    said = {"one": "red", "two": " red\n", "three": "red plum", "four": "re", "five": ""}
    records = [[{"role": "user", "content": name}, {"role": "assistant", "content": "red "}] for name in said]
    file = folder / "counted.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n"
                            for messages in (records[0][:1], [records[0][0], {**records[0][1], "weight": 0}],
                                             *records, records[0])))

    def given(engine, prompts, stop, longest, **more):
        assert stop == {tokenizer.special["<|eot_id|>"]} and len(prompts) == 5
        for name, prompt in zip(said, prompts):
            assert tokenizer.decode(prompt).endswith(f"{name}assistant\n\n")
        return [tokenizer.reference.encode(text, add_special_tokens=False).ids for text in said.values()]
    monkeypatch.setattr(module, "generate", given)
    template = load_template("llama3", tokenizer)
    answers = module.answer_records(load_model(folder / "model"), tokenizer, template, [file], 5)
    assert [answer["prompt"] for answer in answers] == list(said)
    assert [answer["output"] for answer in answers] == ["red", "red", "red plum", "re", ""]
    assert [answer["correct"] for answer in answers] == [True, True, False, False, False]


def test_lines_are_there_as_answers_end(folder, monkeypatch):
    out, seen = folder / "live.jsonl", []
    answers = Engine.answers

    def watched(*given, **named):
        for answer in answers(*given, **named):
            yield answer
            seen.append(len(lines(out)))

    monkeypatch.setattr(Engine, "answers", watched)
    module.main(arguments(folder, data=folder / "test.jsonl", output=out, limit=5))
    assert seen == [1, 2, 3, 4, 5] and [answer["index"] for answer in lines(out)] == [0, 1, 2, 3, 4]


def test_two_ranks_write_what_one_does(folder):
    for name, ranks in (("one", 1), ("two", 2)):
        run_module("eval.generate", arguments(folder, data=folder / "test.jsonl",
                                              output=folder / f"{name}.jsonl"), ranks)
    assert (folder / "two.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()
    assert not list(folder.glob("two.jsonl.rank*"))


@pytest.mark.parametrize("more, says", [
    (dict(temperature=-1), "--temperature -1"), (dict(temperature=1, top_p=0), "--top-p 0"),
    (dict(batch_size=0), "--batch-size 0"), (dict(samples=3), "give --temperature 1"),
    (dict(prompt="a"), "not allowed with"), (dict(system="a"), "--system"),
    (dict(data="nowhere.jsonl"), "no such file")])
def test_wrong_flags_are_named(folder, more, says):
    with pytest.raises(ValueError, match=says):
        module.main(arguments(folder, **{"data": folder / "test.jsonl", **more}))


def test_a_conversation_sends_what_was_said_until_it_is_reset(folder, monkeypatch, capsys):
    asked, reply = [], module.reply
    monkeypatch.setattr("builtins.input", Mock(side_effect=["red", "", "blue", "/reset", "plum", EOFError]))
    monkeypatch.setattr(module, "reply", lambda loaded, messages, *a: asked.append(
        [m["content"] for m in messages]) or reply(loaded, messages, *a))
    module.main(flags(model=folder / "model", template="llama3", dtype="fp32", device="cpu", max_new_tokens=5,
                      chat=True, system="Be brief"))
    first = asked[1][2]
    assert asked == [["Be brief", "red"], ["Be brief", "red", first, "blue"], ["Be brief", "plum"]]
    assert capsys.readouterr().out.startswith(printable(first))


def test_ctrl_c_ends_an_answer_but_not_the_conversation(folder, monkeypatch):
    answers, reply, seen, said = Engine.answers, module.reply, [], []

    def interrupted(self, prompts, stop, most, size, sampling, keys, on_token, **named):
        def watched(i, token):
            on_token(i, token)
            seen.append(token)
            if len(seen) == 2:
                raise KeyboardInterrupt
        return answers(self, prompts, NEVER, most, size, sampling, keys, watched, **named)

    monkeypatch.setattr(Engine, "answers", interrupted)
    monkeypatch.setattr(module, "reply", lambda *a: said.append(reply(*a)) or said[-1])
    # At the prompt it does.
    monkeypatch.setattr("builtins.input", Mock(side_effect=["red", "blue", KeyboardInterrupt]))
    module.main(flags(model=folder / "model", template="llama3", dtype="fp32", device="cpu", max_new_tokens=5,
                      chat=True))
    tokenizer = Tokenizer(folder / "model")
    assert said == [tokenizer.decode(seen[:2]), tokenizer.decode(seen[2:])] and len(seen) == 7


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma", "llama3", "qwen"])
def test_streamed_characters_are_whole_and_spell_the_answer(name, tmp_path):
    import tokenizers_for_tests
    tokenizer = Tokenizer(tokenizers_for_tests.write(name, tmp_path))
    said = " ".join(WORDS[:4]) + " Où est la gare? 日本語 🙂👍🏽 naïve\n\n  end"
    ids = tokenizer.at_start.encode(said, add_special_tokens=False).ids
    stream = Text(tokenizer)
    parts = [stream.add(token) for token in ids]
    assert "".join(parts) + stream.add(None) == tokenizer.decode(ids)
    assert "日本語 🙂" in "".join(parts) and "\ufffd" not in "".join(parts)
    assert parts.count("") > 5 and len([part for part in parts if part]) > 10
    cut = Text(tokenizer)       # an answer that ends within a character
    bad = ids[:ids.index(next(i for i, part in zip(ids, parts) if part == "")) + 1]
    assert "".join(cut.add(token) for token in bad) + cut.add(None) == tokenizer.decode(bad)


def test_prompt_prints_the_answer(folder, capsys):
    argv = flags(model=folder / "model", template="llama3", dtype="fp32", device="cpu", max_new_tokens=9,
                 prompt="red plum")
    module.main(argv)
    printed = capsys.readouterr().out
    record = folder / "single.jsonl"
    record.write_text(json.dumps({"messages": [{"role": "user", "content": "red plum"}]}) + "\n")
    module.main(arguments(folder, data=record, max_new_tokens=9, output=folder / "single_out.jsonl"))
    answer = lines(folder / "single_out.jsonl")[0]
    assert printed == answer["output"] + "\n" and answer["expected"] is None
    wrong = {"role": "assistant", "content": "no", "weight": 0}
    record.write_text(json.dumps({"messages": [{"role": "user", "content": "red plum"}, wrong]}) + "\n")
    module.main(arguments(folder, data=record, max_new_tokens=9, output=folder / "weightless.jsonl"))
    assert lines(folder / "weightless.jsonl") == [answer]


@pytest.mark.parametrize("answer", ["<think>\n\n</think>\n\nRed.", "Red.", "Blue."])
def test_what_a_template_puts_in_front_of_an_answer_is_no_part_of_it(answer, tmp_path, monkeypatch):
    """A model that was trained with an empty think block writes one; as a message the next prompt is made of,
    or beside the record's, it is the content alone."""
    tokenizer = Tokenizer(cast.write("qwen", tmp_path / "qwen"))
    template = load_template(str(Path(__file__).parent / "templates" / "qwen3.jinja"), tokenizer)
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "Name a colour.", "completion": "Red."}))
    made = tokenizer.reference.encode(answer).ids
    monkeypatch.setattr(module, "Engine", lambda model: None)
    longest = []
    monkeypatch.setattr(module, "generate", lambda *args, **more: longest.append(args[3]) or [made])
    row, = module.answer_records(None, tokenizer, template, [str(tmp_path / "x.jsonl")], 1)
    assert (row["output"], row["correct"]) == (answer[-5:].strip(), "Red." in answer)
    # The answer that was trained, with what the template puts in front of it.
    assert longest == [len(tokenizer.reference.encode("<think>\n\n</think>\n\nRed.<|im_end|>\n").ids)]

    class Scripted:
        prompts: list = []

        def answers(self, prompts, stop, tokens, size, sampling, keys, show, lookup):
            self.prompts += prompts
            for token in made:
                show(0, token)
            return iter(())

    loaded = Loaded("scripted", None, tokenizer, template, None, None)
    loaded.engine = Scripted()
    args = SimpleNamespace(max_new_tokens=9, temperature=0, top_p=1, top_k=0, seed=0, chat=True,
                           prompt_lookup_num_tokens=0)
    monkeypatch.setattr("builtins.input", Mock(side_effect=["Name a colour.", "And another?", "/quit"]))
    module.chat(loaded, [], args)
    assert len(loaded.engine.prompts) == 2
    assert tokenizer.decode(loaded.engine.prompts[1], skip_special_tokens=False) == (
        "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n" + answer[-5:].strip()
        + "<|im_end|>\n<|im_start|>user\nAnd another?<|im_end|>\n<|im_start|>assistant\n")
