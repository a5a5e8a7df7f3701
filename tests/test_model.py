"""The decoder against transformers on random weights, and what config.json may say."""
import dataclasses
import json
import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers

import model as model_module
from eval.engine import Engine
from kernels import attention as attention_kernels
from kernels.attention import attention_reference
from model import Llama, load_model
from references import FAMILIES, LLAMA3, SIZES, make_reference, packed, pad_rows, same_as_transformers
from runtime.distributed import data_parallel
from runtime.model_config import ModelConfig, read_config


def count_graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Let torch.compile run what it traces as it is. Returns the list that its graphs are added to."""
    graphs, original = [], torch.compile
    torch.compiler.reset()

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", partial(original, backend=backend))
    return graphs


@pytest.fixture(params=["as it is", "padded"])
def row_size(request, monkeypatch):
    """Rows padded to a multiple of 64 tokens, as long ones are on a CPU, or not."""
    if request.param == "padded":
        pad_rows(monkeypatch, 64)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_logits_equal_transformers_one_by_one(name, row_size, tmp_path):
    reference = make_reference(name)
    reference.save_pretrained(tmp_path)
    mine = load_model(tmp_path)
    documents = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n))
                 for n in (300, 3, 1, 17, 20)]    # bf16 has no 257
    hidden = mine(*packed(documents))
    logits = (hidden @ mine.head_weight.T).split([len(d) for d in documents])
    with torch.no_grad():
        for document, own in zip(documents, logits):
            expected = reference(document[None]).logits[0]
            assert expected.std() > 0.1
            torch.testing.assert_close(own.detach(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameters_gradient_equals_transformers(name, row_size, tmp_path):
    """Weights, biases, norms and tied heads, from the sum of NLL over packed documents."""
    reference = make_reference(name)
    reference.save_pretrained(tmp_path)
    mine = load_model(tmp_path)
    documents = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (50, 3, 20)]
    hidden = mine(*packed(documents))
    logits = (hidden @ mine.head_weight.T).split([len(d) for d in documents])
    for each in (logits, [reference(document[None]).logits[0] for document in documents]):
        sum(F.cross_entropy(own[:-1], document[1:], reduction="sum")
            for own, document in zip(each, documents)).backward()
    got, expected = ({key: parameter.grad for key, parameter in model.named_parameters()}
                     for model in (mine, reference))
    assert got.keys() == expected.keys()
    assert any(key.endswith("k_proj.bias") for key in got) == ("bias" in name or "qwen2" in name)
    for key, grad in expected.items():
        assert grad.norm() > 0 and (got[key] - grad).norm() < 1e-4 * grad.norm(), key


@pytest.mark.parametrize("scaling", [None, dict(type="linear", factor=4.0), LLAMA3])
def test_old_rope_fields_mean_the_same_as_new_ones(scaling):
    base = {**SIZES, "model_type": "llama"}
    old = ModelConfig.from_dict({**base, "rope_theta": 5e5, "rope_scaling": scaling})
    new = {"rope_type": "default", **(scaling or {})}
    new["rope_type"] = new.pop("type", new["rope_type"])
    new = ModelConfig.from_dict({**base, "rope_parameters": {**new, "rope_theta": 5e5}})
    assert torch.equal(model_module.rope_frequencies(old), model_module.rope_frequencies(new))
    assert old.rope["rope_theta"] == 5e5


@pytest.mark.parametrize("fault", ["", "not causal", "raises"])
def test_varlen_is_used_only_if_it_agrees_with_the_definition(fault, tmp_path, monkeypatch):
    """On the CPU a stand-in for the kernel; the check and the switch are the same."""
    def stand_in(q, k, v, cu_seqlens, longest):
        if fault == "raises":
            raise RuntimeError("no kernel\nfor this device")
        assert longest == cu_seqlens.diff().max()
        if fault == "not causal":
            return attention_reference(q, k, v, cu_seqlens).flip(0)
        return attention_reference(q, k, v, cu_seqlens)

    make_reference("qwen2").save_pretrained(tmp_path)
    mine = load_model(tmp_path)
    row = packed([torch.arange(9), torch.arange(30)])
    expected = mine(*row)
    for module in (model_module, attention_kernels):
        monkeypatch.setattr(module, "varlen_attention", stand_in)
    reason = attention_kernels.varlen_fault(4, 2, 8, torch.device("cpu"))
    assert (reason == "") == (fault == "")
    if fault == "raises":
        assert reason == "varlen_attn raised RuntimeError: no kernel"
    else:
        mine.varlen = True
        assert torch.allclose(mine(*row), expected, atol=1e-5) == (fault == "")
    mine.choose_attention(torch.bfloat16)   # never on the CPU
    assert not mine.varlen and mine.attention == "tiled products: varlen_attn needs CUDA and bf16"


@pytest.mark.parametrize("varlen", [False, True])
def test_layers_are_compiled_as_one_graph_whatever_the_rows(varlen, monkeypatch):
    """For all layers and for rows of any lengths and number of documents, with noise or recomputation: one
    graph with gradients, one without. In the first row all sizes are equal, the width of the model, too."""
    graphs = count_graphs(monkeypatch)

    def stand_in(q, k, v, cu_seqlens, longest):
        return attention_kernels.attention(q, k, v, cu_seqlens) + q.new_zeros(longest).sum()

    monkeypatch.setattr(model_module, "varlen_attention", stand_in)
    config = ModelConfig.from_dict({**SIZES, "model_type": "llama", "num_hidden_layers": 10})
    compiled, plain = Llama(config), Llama(config)
    for model in (compiled, plain):
        model_module.init_weights(model, 0)
        model.varlen = varlen
    compiled.compile_layers()
    n = config.hidden_size
    for number, lengths in enumerate([[n], [20, 12], [7, 9, 11], [1] * 40, [60, 1, 1], [16], [2], [1], []]):
        row = packed([torch.arange(length) for length in lengths] or [torch.arange(0)])
        row = row if lengths else (*row[:2], torch.zeros(1, dtype=torch.int32))
        noise = torch.randn(sum(lengths), n) if number % 2 else None
        for recompute in (False, True):
            compiled.recompute = plain.recompute = recompute
            outs = [model(*row, noise) for model in (compiled, plain)]
            grad = torch.randn_like(outs[0])
            for model, out in zip((compiled, plain), outs):
                model.zero_grad()
                out.backward(grad)
            torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
            for a, b in zip(compiled.parameters(), plain.parameters()):
                torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3)
    assert len(graphs) == 1
    for lengths in ([30, 10], [50], [17, 18, 19]):
        with torch.no_grad():
            compiled(*packed([torch.arange(length) for length in lengths]))
    assert len(graphs) == 2
    # Generation runs the layers of its copy, with its own attention.
    answers = [next(Engine(model).answers([[5, 6, 7] * 8], set(), 4)) for model in (compiled, plain)]
    assert answers[0] == answers[1] and len(graphs) == 2


def test_a_large_layer_is_one_graph_under_ddp_too(tmp_path, monkeypatch):
    """By itself torch.compile cuts what DDP wraps where a megabyte of parameters is reached: here each of the
    MLP's matrices."""
    config = ModelConfig.from_dict({**SIZES, "model_type": "llama", "intermediate_size": 10_000})
    assert config.intermediate_size * config.hidden_size * 4 > 2**20
    model = Llama(config)
    model_module.init_weights(model, 0)
    graphs = count_graphs(monkeypatch)
    model.compile_layers()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = data_parallel(model, torch.device("cpu"))
        wrapped(*packed([torch.arange(30), torch.arange(20)])).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert wrapped is not model and len(graphs) == 1


def test_recomputation_leaves_the_random_state_alone(monkeypatch):
    """Nothing in a layer is random. On CUDA storing and setting the state takes time in each layer."""
    model = Llama(ModelConfig.from_dict({**SIZES, "model_type": "llama"}))
    model_module.init_weights(model, 0)
    model.recompute = True
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("the state was stored"))
    model(*packed([torch.arange(9)])).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lm_head" not in name)


def test_empty_row_has_a_graph_to_every_parameter(tmp_path):
    make_reference("qwen3-tied-bias-llama3").save_pretrained(tmp_path)
    mine = load_model(tmp_path)
    empty = torch.zeros(0, dtype=torch.int64)
    mine(empty, empty, torch.zeros(1, dtype=torch.int32)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in mine.parameters())


def test_a_row_reaches_the_layers_padded_and_so_does_its_noise(monkeypatch):
    model, rows = Llama(ModelConfig.from_dict({**SIZES, "model_type": "llama"})), []
    model_module.init_weights(model, 0)
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    row, noise = packed([torch.arange(9), torch.arange(30)]), torch.randn(39, SIZES["hidden_size"])
    expected = model(*row, noise)
    pad_rows(monkeypatch, 64)
    torch.testing.assert_close(model(*row, noise), expected)
    assert not torch.allclose(model(*row), expected, atol=0.01) and rows == [39, 64, 64]


def kept_bytes(model: Llama, row: tuple[torch.Tensor, ...]) -> int:
    """What autograd keeps for a backward pass through model(*row), without parameters."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(*row)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for place, size in storages.items() if place not in own)


def test_recompute_keeps_little_more_than_each_layers_input(tmp_path):
    make_reference("qwen3").save_pretrained(tmp_path)
    model, row = load_model(tmp_path), packed([torch.arange(50), torch.arange(60)])
    whole = kept_bytes(model, row)
    model.recompute = True
    layers, activation = 3, 110 * 32 * 4    # of SIZES, in fp32
    assert layers * activation < kept_bytes(model, row) < (layers + 3) * activation < whole / 5


def test_recompute_changes_no_gradient(tmp_path):
    make_reference("qwen2").save_pretrained(tmp_path)
    grads = []
    for recompute in (False, True):
        mine = load_model(tmp_path)
        mine.recompute = recompute
        row = packed([torch.arange(9), torch.arange(30)])
        mine(*row).square().sum().backward()
        grads.append([p.grad for p in mine.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("change, name", [
    (dict(model_type="gpt2"), "gpt2"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(attention_dropout=0.1), "attention_dropout"),
    (dict(rope_scaling={"type": "yarn", "factor": 4}), "yarn"),
    (dict(rope_scaling={"type": "dynamic"}), "dynamic"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8}), "low_freq_factor"),
    (dict(model_type="mistral", sliding_window=64), "sliding_window"),
    (dict(model_type="mistral", max_position_embeddings=8192), "sliding_window = 4096"),
    (dict(attention_dropout=False), "attention_dropout"),
    (dict(transformers_weights="other.safetensors"), "transformers_weights"),
    (dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "rope_parameters.full_attention"),
    (dict(rope_parameters=dict(LLAMA3, high_freq_factor=1.0)), "low_freq_factor is 1.0; it must be less"),
    (dict(model_type="mistral", sliding_window=64, use_sliding_window=False), "sliding_window = 64"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
     "sliding_window"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=64,
          layer_types=["full_attention", "sliding_attention"]),
     "sliding_window = 64, layer_types full_attention, sliding_attention: .* to null and remove layer_types"),
    (dict(layer_types=["sliding_attention"] * 3), "sliding_attention"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(num_key_value_heads=3), "num_key_value_heads"),
    (dict(vocab_size=None, hidden_size=None), "vocab_size, hidden_size missing; copy config.json from where"),
    *((dict(eos_token_id=stop), "config.json: eos_token_id is .* must be below vocab_size")
      for stop in (10**9, SIZES["vocab_size"], -1, "</s>", [1, 10**9], True)),
])
def test_what_is_not_implemented_is_refused_by_name(change, name, tmp_path):
    raw = {"model_type": "llama", **SIZES, **change}
    raw = {key: value for key, value in raw.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=name):
        read_config(tmp_path)


def test_generation_config_json_may_not_stop_at_a_token_that_does_not_exist(tmp_path):
    raw = {"model_type": "llama", **SIZES, "eos_token_id": [1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path).vocab_size == SIZES["vocab_size"]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 10**9}))
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is 1000000000"):
        read_config(tmp_path)


WHOLES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"]
NUMBERS = ["rms_norm_eps", "rope_theta", "initializer_range"]
SWITCHES = ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"]
WRONG = ["1", [1], {"a": 1}]


@pytest.mark.parametrize("name, value, must_be", [
    *((name, value, "a whole number above 0") for name in WHOLES for value in (*WRONG, -1, 0, 1.5, True)),
    *((name, value, "a finite number above 0") for name in NUMBERS
      for value in (*WRONG, -1, 0, math.nan, math.inf, True)),
    *((name, value, "true or false") for name in SWITCHES for value in (*WRONG, 1, 0)),
    *((name, value, "an object") for name in ("rope_scaling", "rope_parameters") for value in ("1", [1], 1)),
    ("layer_types", "full_attention", "a list of text"), ("layer_types", [1], "a list of text"),
    ("model_type", ["llama"], "text"), ("max_window_layers", -1, "a whole number, 0 or more"),
    *((f"rope_scaling.{name}", value, must_be) for name, must_be in
      (("factor", "a finite number above 0"), ("low_freq_factor", "a finite number above 0"),
       ("rope_theta", "a finite number above 0"), ("original_max_position_embeddings", "a whole number"))
      for value in (*WRONG[:2], -1, 0, math.nan, True)),
    ("rope_scaling.rope_type", 3, "text"),
])
def test_a_wrong_value_in_config_json_is_named_with_what_it_must_be(name, value, must_be, tmp_path):
    raw = {"model_type": "qwen2", **SIZES, "num_key_value_heads": 2, "use_sliding_window": True}
    if name.startswith("rope_scaling."):
        raw["rope_scaling"] = {**LLAMA3, name.removeprefix("rope_scaling."): value}
    else:
        raw[name] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    says = f"config.json: {name} is {value!r}; it must be {must_be}"
    with pytest.raises(ValueError, match=re.escape(says)):
        read_config(tmp_path)


@pytest.mark.parametrize("content, says", [("[1]", "holds a JSON list, not an object"), ("{", "is not JSON")])
def test_a_config_json_that_is_no_object_is_named(content, says, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json: {says}"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", [
    "rms_norm_eps", "head_dim", "rope_scaling", "rope_theta", "rope_parameters", "tie_word_embeddings",
    "hidden_act", "initializer_range", "max_position_embeddings", "attention_bias", "mlp_bias",
    "attention_dropout", "quantization_config", "layer_types", "use_sliding_window", "max_window_layers"])
def test_null_in_config_json_means_absent(name):
    raw = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "rope_theta": 5e5}
    raw.pop(name, None)
    absent, null = ModelConfig.from_dict(raw), ModelConfig.from_dict({**raw, name: None})
    assert dataclasses.replace(absent, raw={}) == dataclasses.replace(null, raw={})
    with pytest.raises(ValueError, match="hidden_size missing"):
        ModelConfig.from_dict({**raw, "hidden_size": None})


@pytest.mark.parametrize("name", ["factor", "rope_theta", "rope_type"])
def test_null_in_a_rope_object_means_absent(name):
    scaling = {key: value for key, value in dict(LLAMA3, rope_theta=5e5).items() if key != name}
    raw = {"model_type": "llama", **SIZES, "rope_theta": 3e4}
    if name == "factor":
        with pytest.raises(ValueError, match="rope_scaling.factor missing"):
            ModelConfig.from_dict({**raw, "rope_scaling": {**scaling, name: None}})
    else:
        absent, null = (ModelConfig.from_dict({**raw, "rope_scaling": each}).rope
                        for each in (scaling, {**scaling, name: None}))
        assert absent == null and absent["rope_theta"] == (3e4 if name == "rope_theta" else 5e5)


@pytest.mark.parametrize("family, given", [
    ("mistral", {}), ("mistral", {"sliding_window": None}), ("qwen2", {}), ("qwen3", {}),
    ("qwen2", {"num_key_value_heads": None}), ("qwen3", {"num_key_value_heads": None}),
    ("llama", {"num_key_value_heads": None})])
def test_what_a_family_leaves_out_is_what_transformers_takes(family, given):
    raw = {"model_type": family, **SIZES, "num_attention_heads": 32, "hidden_size": 256, **given}
    theirs = transformers.AutoConfig.for_model(**raw)
    mine = ModelConfig.from_dict(raw)
    for name in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "initializer_range"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert mine.head_dim == (getattr(theirs, "head_dim", None) or 256 // 32)
    assert mine.rope["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert mine.max_position_embeddings == 256


@pytest.mark.parametrize("fields", [
    dict(rope_scaling={"rope_type": "linear", "factor": 4.0}, rope_parameters=dict(LLAMA3, rope_theta=5e5)),
    dict(rope_scaling=LLAMA3, original_max_position_embeddings=128)])
def test_of_two_rope_fields_the_one_that_transformers_takes_counts(fields, tmp_path):
    make_reference("llama1-mha").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.update(fields)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    same_as_transformers(tmp_path)


def test_inactive_sliding_windows_are_accepted():
    used = dict(use_sliding_window=True, sliding_window=64, max_window_layers=1)
    for more in (dict(model_type="mistral", sliding_window=None),
                 dict(model_type="mistral", sliding_window=4096),
                 dict(model_type="llama", **used),
                 dict(model_type="qwen2", use_sliding_window=False, sliding_window=64),
                 dict(model_type="qwen2", **{**used, "max_window_layers": 3}),
                 dict(model_type="qwen3", **used, layer_types=["full_attention"] * 3),
                 dict(model_type="qwen2", **{**used, "sliding_window": 4096},
                      layer_types=["full_attention"] + ["sliding_attention"] * 2)):
        ModelConfig.from_dict({**SIZES, "num_key_value_heads": 2, **more})


def test_loading_holds_one_copy(tmp_path):
    """Parameters are not first made and then filled: building happens without memory."""
    make_reference("llama1-mha").save_pretrained(tmp_path)
    made = []
    original = torch.nn.init.kaiming_uniform_
    torch.nn.init.kaiming_uniform_ = lambda tensor, *a, **k: (
        made.append(tensor.device.type) or original(tensor, *a, **k))
    try:
        load_model(tmp_path)
    finally:
        torch.nn.init.kaiming_uniform_ = original
    assert made and set(made) == {"meta"}
    assert isinstance(load_model(tmp_path), Llama)
