"""The decoder against transformers on random weights, attention against its definition,
checkpoint folders."""
import dataclasses
import fnmatch
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from kernels import attention as attention_kernels
from kernels import layers
import model as model_module
from runtime import weights as shard_module
from kernels.attention import attention, attention_reference
from model import Llama, ModelConfig, load_model, read_config, stored_weights
from runtime.weights import EMBEDDING, HEAD, resolve_model, save_model

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=256, rms_norm_eps=1e-5)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
# name: (transformers' config class, what differs)
FAMILIES = {
    "llama1-mha": ("LlamaConfig", dict(num_key_value_heads=4)),
    "llama2-gqa-tied": ("LlamaConfig", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-mqa": ("LlamaConfig", dict(num_key_value_heads=1)),
    "llama-biases": ("LlamaConfig", dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "llama-head-dim": ("LlamaConfig", dict(num_key_value_heads=2, head_dim=16)),
    "llama-linear": ("LlamaConfig",
                     dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    "llama3.1": ("LlamaConfig", dict(num_key_value_heads=2, rope_parameters=dict(LLAMA3, rope_theta=5e5))),
    "llama3.2-tied": ("LlamaConfig", dict(num_key_value_heads=2, tie_word_embeddings=True,
                                          rope_parameters=dict(LLAMA3, rope_theta=5e5))),
    "mistral": ("MistralConfig", dict(num_key_value_heads=2, sliding_window=None)),
    "mistral-linear": ("MistralConfig",
                       dict(num_key_value_heads=2, sliding_window=None,
                            rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e6))),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=2)),
    "qwen2-tied": ("Qwen2Config", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(num_key_value_heads=2, head_dim=16)),
    "qwen3-tied-bias-llama3": ("Qwen3Config", dict(num_key_value_heads=2, head_dim=16,
                                                   tie_word_embeddings=True, attention_bias=True,
                                                   rope_parameters=dict(LLAMA3, rope_theta=1e6))),
}


def make_reference(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """transformers' model with weights that make every part matter
    (its own start leaves biases 0 and norms 1)."""
    config_class, more = FAMILIES[name]
    config = getattr(transformers, config_class)(**{**SIZES, **more}, attn_implementation="eager")
    torch.manual_seed(seed)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.3)
    reference.tie_weights()
    return reference


def packed(documents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions = torch.cat([torch.arange(len(d)) for d in documents])
    cu_seqlens = torch.tensor([0, *(len(d) for d in documents)]).cumsum(0).int()
    return torch.cat(documents), positions, cu_seqlens


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_logits_equal_transformers_one_by_one(name, tmp_path):
    reference = make_reference(name)
    reference.save_pretrained(tmp_path)
    mine = load_model(tmp_path)
    documents = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n))
                 for n in (50, 3, 1, 17, 20)]
    hidden = mine(*packed(documents))
    logits = (hidden @ mine.head_weight.T).split([len(d) for d in documents])
    with torch.no_grad():
        for document, own in zip(documents, logits):
            expected = reference(document[None]).logits[0]
            assert expected.std() > 0.1
            torch.testing.assert_close(own.detach(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameters_gradient_equals_transformers(name, tmp_path):
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


def check_attention(lengths: list[int], heads: tuple[int, int]) -> None:
    """attention() against its definition, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    n, cu_seqlens = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (torch.randn(n, h, 8, generator=generator, requires_grad=True)
               for h in (heads[0], heads[1], heads[1]))
    grad = torch.randn(n, heads[0], 8, generator=generator)
    expected, got = attention_reference(q, k, v, cu_seqlens), attention(q, k, v, cu_seqlens)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), grad),
                    torch.autograd.grad(expected, (q, k, v), grad)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[1], [40], [7, 1, 30, 8, 9], [600, 5, 520, 40, 41, 513], [64] * 4])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_attention_equals_its_definition_and_gradients(lengths, heads):
    check_attention(lengths, heads)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_a_group_of_documents_that_is_too_large_is_cut_and_none_of_it_is_lost(heads, monkeypatch):
    """Five documents of like length, two at a time: the last of them is alone."""
    lengths, most = [40, 38, 39, 40, 37], 2
    monkeypatch.setattr(model_module, "TILE_SCORES", most * heads[0] * 40 * 40)
    attention_kernels._groups.cache_clear()      # it may have cut these lengths otherwise
    try:
        groups = attention_kernels._groups(tuple(lengths), *heads, torch.device("cpu"))
        assert [documents for documents, *_ in groups] == [2, 2, 1]
        # so that what is never written is NaN, not by chance what stood there before
        torch.use_deterministic_algorithms(True)
        check_attention(lengths, heads)
    finally:
        torch.use_deterministic_algorithms(False)
        attention_kernels._groups.cache_clear()


def test_bf16_gradients_of_keys_are_summed_over_tiles_in_fp32():
    """A document of 16 tiles, with a gradient whose mean is not 0: sums in bf16 would stop growing. Rounding
    what each tile gives costs 0.2 % here, rounding their sums too 0.5 %."""
    n, generator = 16 * attention_kernels.TILE, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 16, generator=generator).bfloat16().requires_grad_() for h in (2, 1, 1))
    grad = (1 + torch.randn(n, 2, 16, generator=generator)).bfloat16()
    cu_seqlens = torch.tensor([0, n])
    got = torch.autograd.grad(attention(q, k, v, cu_seqlens), (q, k, v), grad)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(attention_reference(*exact, cu_seqlens), exact, grad.float())
    assert all(a.dtype == torch.bfloat16 for a in got)
    off_q, off_k, off_v = (((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, expected))
    assert off_q < 0.01 and 0 < off_k < 0.003 and 0 < off_v < 0.003


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
    monkeypatch.setattr(model_module, "varlen_attention", stand_in)
    reason = attention_kernels.varlen_fault(mine.config, torch.device("cpu"))
    assert (reason == "") == (fault == "")
    if fault == "raises":
        assert reason == "it raised RuntimeError: no kernel"
    else:
        mine.varlen = True
        assert torch.allclose(mine(*row), expected, atol=1e-5) == (fault == "")
    assert mine.choose_attention(torch.bfloat16) == ""      # never on the CPU


def test_attention_definition_is_a_loop_over_documents():
    """Guards the reference itself: plain softmax, document by document, token by token."""
    torch.manual_seed(0)
    lengths = [3, 5]
    q, k, v = torch.randn(8, 2, 4), torch.randn(8, 1, 4), torch.randn(8, 1, 4)
    got = attention_reference(q, k, v, torch.tensor([0, 3, 8]))
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            for head in range(2):
                weight = torch.softmax(k[start:t + 1, 0] @ q[t, head] / 2.0, 0)
                torch.testing.assert_close(got[t, head], weight @ v[start:t + 1, 0])
        start += length


def test_empty_row_has_a_graph_to_every_parameter(tmp_path):
    make_reference("qwen3-tied-bias-llama3").save_pretrained(tmp_path)
    mine = load_model(tmp_path)
    empty = torch.zeros(0, dtype=torch.int64)
    mine(empty, empty, torch.zeros(1, dtype=torch.int32)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in mine.parameters())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["llama2-gqa-tied", "qwen3"])
def test_activation_bytes_are_those_that_autograd_keeps(name, recompute, tmp_path):
    make_reference(name).save_pretrained(tmp_path)
    mine = load_model(tmp_path)
    mine.recompute = recompute
    own = {p.untyped_storage().data_ptr() for p in mine.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    documents = [torch.arange(n) for n in (50, 60)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        mine(*packed(documents))
    expected = sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in own)
    computed = model_module.activation_bytes(mine.config, 110, torch.float32, recompute)
    assert computed == pytest.approx(expected, rel=0.03)    # ids, and what a recomputed layer stores beside


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
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
     "sliding_window"),
    (dict(layer_types=["sliding_attention"] * 3), "sliding_attention"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(num_key_value_heads=3), "num_key_value_heads"),
    (dict(vocab_size=None, hidden_size=None), "hidden_size"),
])
def test_what_is_not_implemented_is_refused_by_name(change, name, tmp_path):
    raw = {"model_type": "llama", **SIZES, **change}
    raw = {key: value for key, value in raw.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=name):
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


@pytest.mark.parametrize("content, says", [("[1]", "holds a JSON list, not an object"), ("{", "Expecting")])
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


def test_of_two_rope_objects_the_one_that_transformers_takes_counts(tmp_path):
    make_reference("llama1-mha").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.update(rope_scaling={"rope_type": "linear", "factor": 4.0},
               rope_parameters=dict(LLAMA3, rope_theta=5e5))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    same_as_transformers(tmp_path)


def test_inactive_sliding_windows_are_accepted():
    for more in (dict(model_type="mistral", sliding_window=None),
                 dict(model_type="mistral", sliding_window=4096),
                 dict(model_type="qwen2", use_sliding_window=False, sliding_window=64)):
        ModelConfig.from_dict({**SIZES, "num_key_value_heads": 2, **more})


# ---------------------------------------------------------------- checkpoint folders


@pytest.mark.parametrize("name", ["llama2-gqa-tied", "llama1-mha", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_round_trip_is_exact_and_loads_in_transformers(name, dtype, shard_bytes, tmp_path):
    source, saved = tmp_path / "source", tmp_path / "saved"
    saved.mkdir()
    make_reference(name).to(dtype).save_pretrained(source, max_shard_size=shard_bytes)
    mine = load_model(source)
    assert mine.source_dtype == dtype and all(p.dtype == torch.float32 for p in mine.parameters())
    save_model(mine, saved, shard_bytes=shard_bytes)
    files = sorted(saved.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 20_000)
    assert all(f.stat().st_size <= shard_bytes + 4000 or len(load_file(f)) == 1 for f in files)
    old = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    new = {k: v for f in files for k, v in load_file(f).items()}
    assert old.keys() == new.keys() and ("lm_head.weight" in new) == (name != "llama2-gqa-tied")
    assert all(v.dtype == dtype and torch.equal(v, old[k]) for k, v in new.items())
    again = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    ids = torch.arange(20)
    logits = mine(ids, ids, torch.tensor([0, 20])) @ mine.head_weight.T
    torch.testing.assert_close(logits, again(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


def same_as_transformers(folder: Path) -> Llama:
    """Loads a folder, compares its logits with those of transformers from the same folder."""
    mine, ids = load_model(folder), torch.arange(30)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = mine(ids, ids, torch.tensor([0, 30])) @ mine.head_weight.T
        expected = theirs(ids[None]).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    return mine


def with_head(folder: Path, kind: str, shards: bool = False) -> None:
    """A tied checkpoint whose file has a head too: equal, different in its last row, or alone."""
    make_reference("llama2-gqa-tied").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    if kind == "different":
        tensors[HEAD][-1] += 3
    if kind == "alone":
        del tensors[EMBEDDING]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if shards:
        reversed_files(folder, tensors)


def reversed_files(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The same in two shards with an index."""
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: x for name, x in tensors.items() if names[name] == file}, folder / file,
                  {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize("kind", ["equal", "different", "alone"])
@pytest.mark.parametrize("shards", [False, True])
def test_a_head_that_differs_from_a_tied_embedding_is_kept_as_transformers_keeps_it(
        kind, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shard_module, "PIECE", 1000)    # several pieces
    source, saved = tmp_path / "source", tmp_path / "saved"
    saved.mkdir()
    with_head(source, kind, shards)
    mine = same_as_transformers(source)
    untied = kind == "different"
    assert (mine.lm_head is not None) == (not mine.config.tie_word_embeddings) == untied
    assert (f"{source}: config.json says tie_word_embeddings, but" in capsys.readouterr().err) == untied
    assert (HEAD in stored_weights(source, read_config(source))) == untied
    save_model(mine, saved)
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] == (not untied)
    assert (HEAD in load_file(saved / "model.safetensors")) == untied
    again = same_as_transformers(saved)
    assert torch.equal(again.head_weight, mine.head_weight)
    assert torch.equal(again.model.embed_tokens.weight, mine.model.embed_tokens.weight)


def test_heads_are_compared_a_piece_at_a_time(tmp_path, monkeypatch):
    with_head(tmp_path, "equal")
    monkeypatch.setattr(shard_module, "PIECE", 1000)
    sizes, read = [], shard_module._read
    monkeypatch.setattr(shard_module, "_read", lambda stored, a, b: sizes.append(b - a) or read(stored, a, b))
    assert read_config(tmp_path).tie_word_embeddings
    assert sum(sizes) == 2 * 97 and max(sizes) * 32 * 4 <= 1000


def test_an_untied_model_without_a_head_is_refused_with_the_fix(tmp_path):
    make_reference("llama2-gqa-tied").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="missing lm_head.weight .if the head is the embedding, config.json "
                                         "must say tie_word_embeddings: true"):
        load_model(tmp_path)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_config_json_names_the_dtype_of_the_file_for_every_reader_and_keeps_the_rest(source, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    make_reference("qwen2").to(source).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["torch_dtype"] = raw.pop("dtype")       # as transformers 4 wrote it
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for dtype in (None, torch.float32, torch.bfloat16):
        save_model(load_model(tmp_path), saved, dtype)
        written = json.loads((saved / "config.json").read_text())
        (stored,) = {x.dtype for x in load_file(saved / "model.safetensors").values()}
        assert stored == (dtype or source)
        assert written.pop("dtype") == written["torch_dtype"] == str(stored).removeprefix("torch.")
        assert {**written, "torch_dtype": raw["torch_dtype"]} == raw and written["architectures"]


def test_weights_that_fp16_cannot_hold_are_saved_as_fp32(tmp_path, capsys):
    saved = tmp_path / "saved"
    saved.mkdir()
    make_reference("qwen2").half().save_pretrained(tmp_path)
    mine = load_model(tmp_path)
    with torch.no_grad():
        mine.model.norm.weight[3] = -70_000.0
    save_model(mine, saved)
    tensors = load_file(saved / "model.safetensors")
    assert tensors["model.norm.weight"][3] == -70_000
    assert {x.dtype for x in tensors.values()} == {torch.float32}
    assert json.loads((saved / "config.json").read_text())["dtype"] == "float32"
    assert "model.norm.weight holds values beyond float16's range" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_tensor_that_is_not_finite_is_named(name, value, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_module, "PIECE", 1000)
    make_reference("qwen2").to(dtype).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"model.safetensors: tensor {name} holds NaN or Inf; the "
                                         "checkpoint is damaged or was saved by a run that diverged"):
        load_model(tmp_path)


# ---------------------------------------------------------------- indexes


def in_shards(folder: Path) -> tuple[Path, dict, list[Path]]:
    """An index, its content, and the files that it names."""
    make_reference("qwen2").save_pretrained(folder, max_shard_size=20_000)
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text()), sorted(folder.glob("model-*"))


@pytest.mark.parametrize("last", [True, False])
def test_of_two_files_with_one_tensor_the_index_chooses(last, tmp_path):
    index, content, files = in_shards(tmp_path)
    name = "model.norm.weight"
    right, other = (files[-1], files[0]) if last else (files[0], files[-1])
    tensors = {file: load_file(file) for file in files}
    value = next(x.pop(name) for x in tensors.values() if name in x)
    tensors[right][name], tensors[other][name] = value, value + 1
    for file, content_of_file in tensors.items():
        save_file(content_of_file, file, {"format": "pt"})
    content["weight_map"][name] = right.name
    index.write_text(json.dumps(content))
    assert torch.equal(load_model(tmp_path).model.norm.weight, value)
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{files[-1].name}: holds {name}, and so does {files[0].name}"):
        load_model(tmp_path)


def test_a_tensor_that_only_the_index_does_not_name_is_loaded_as_by_transformers(tmp_path):
    index, content, _ = in_shards(tmp_path)
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    same_as_transformers(tmp_path)


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path):
    index, content, files = in_shards(tmp_path)
    content["weight_map"]["model.norm.weight"] = files[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"not in their file: model.norm.weight in {files[0].name}"):
        load_model(tmp_path)


@pytest.mark.parametrize("content, says", [
    ("{", "Expecting property name"), ("[]", "holds a JSON list, not an object"),
    ("{}", "weight_map must be"),
    ('{"weight_map": null}', "weight_map must be"), ('{"weight_map": {}}', "weight_map must be"),
    ('{"weight_map": {"a": 1}}', "a is in 1; that must be a file in this folder"),
    ('{"weight_map": {"a": ["x"]}}', "a is in .'x'.; that must be"),
    ('{"weight_map": {"a": "../x.safetensors"}}', "a is in '../x.safetensors'; that must be"),
    ('{"weight_map": {"a": "/x.safetensors"}}', "a is in '/x.safetensors'; that must be"),
    ('{"weight_map": {"a": "b/../../x"}}', "that must be a file in this folder"),
    ('{"weight_map": {"a": ""}}', "that must be a file in this folder")])
def test_a_broken_index_is_named(content, says, tmp_path):
    index, _, _ = in_shards(tmp_path)
    index.write_text(content)
    with pytest.raises(ValueError, match=f"model.safetensors.index.json: {says}|index.json: .*{says}"):
        load_model(tmp_path)


def test_model_safetensors_comes_before_an_index_as_in_transformers(tmp_path, capsys):
    in_shards(tmp_path)
    other = make_reference("qwen2", seed=1)
    save_file(dict(other.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    mine = same_as_transformers(tmp_path)
    assert torch.equal(mine.model.norm.weight, other.model.norm.weight)
    assert "model.safetensors is read, as transformers does" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_all_listed(tmp_path):
    make_reference("llama1-mha").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.extra"] = torch.ones(1)
    # Old checkpoints carry it: no fault.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    for part in ("model.norm.weight is [7], should be [32]", "missing lm_head.weight",
                 "surplus model.layers.9.extra", "missing model.layers.1.mlp.up_proj.weight"):
        assert part in str(error.value)
    assert "inv_freq" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        load_model(tmp_path)
    make_reference("qwen2").save_pretrained(tmp_path, max_shard_size=20_000)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match="model-00002"):
        load_model(tmp_path)
    next(tmp_path.glob("*.index.json")).unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        load_model(tmp_path)


def test_an_unreadable_file_is_named(tmp_path):
    make_reference("qwen2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="model.safetensors: not a readable"):
        load_model(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub, with one repository; got: files that were downloaded."""
    class Hub:
        repository, got, revisions = tmp_path / "repository", set(), []

        def snapshot_download(self, repository: str, revision: str | None, allow_patterns: list[str]) -> str:
            assert repository == "owner/name"
            snapshot = tmp_path / "snapshots" / "c0ffee"
            snapshot.mkdir(parents=True, exist_ok=True)
            self.revisions.append(revision)
            for file in self.repository.rglob("*"):
                name = file.relative_to(self.repository).as_posix()
                if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    self.got.add(name)
                    (snapshot / name).write_bytes(file.read_bytes())
            return str(snapshot)

    hub = Hub()
    hub.repository.mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
          "chat_template.jinja"}


@pytest.mark.parametrize("shards", [False, True])
def test_of_a_hub_repository_only_what_is_read_is_downloaded(shards, hub):
    make_reference("qwen2").save_pretrained(hub.repository, max_shard_size=20_000 if shards else "1GB")
    weights = {file.name for file in hub.repository.glob("*.safetensors*")}
    for name in (*NEEDED, "consolidated.safetensors", "model.fp16.safetensors",
                 "model-00009-of-00009.safetensors", "adapter_model.safetensors", "pytorch_model.bin",
                 "model.gguf", "onnx/model.onnx",
                 "onnx/config.json", "trainer_state.json", "README.md"):
        (hub.repository / name).parent.mkdir(exist_ok=True)
        if not (hub.repository / name).exists():
            (hub.repository / name).write_text("{}")
    folder = resolve_model("owner/name@v1.0")
    assert hub.got == NEEDED | weights
    assert hub.revisions == (["v1.0", "c0ffee"] if shards else ["v1.0"])
    load_model(folder)
    assert resolve_model(folder) == folder


def test_a_hub_id_without_revision_and_a_failed_download(hub, tmp_path, monkeypatch):
    make_reference("qwen2").save_pretrained(hub.repository)
    resolve_model("owner/name")
    assert hub.revisions == [None]
    with pytest.raises(ValueError, match="no such folder"):
        resolve_model(tmp_path / "nowhere" / "at" / "all")

    def fail(*a: object, **k: object) -> None:
        raise OSError("404")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match="--model owner/name: no such folder, and the download failed: 404"):
        resolve_model("owner/name")


@pytest.mark.parametrize("files, says", [
    (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter; merge it into its base model"),
    (["config.json", "adapter_config.json", "adapter_model.safetensors"], "holds an adapter; merge it"),
    (["config.json", "pytorch_model.bin"], "neither .* like pytorch_model.bin, can be converted"),
    (["config.json", "pytorch_model.bin.index.json"], "neither .* like pytorch_model.bin, can be converted")])
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_adapters_and_other_formats_are_refused_with_what_to_do(where, files, says, hub):
    for name in files:
        (hub.repository / name).write_text(json.dumps({"model_type": "llama", **SIZES}))
    with pytest.raises(ValueError, match=says):
        load_model(resolve_model("owner/name" if where == "hub" else hub.repository))


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


@pytest.mark.parametrize("shape", [(7, 12), (5, 3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elementwise_steps_equal_their_definitions_and_gradients(shape, dtype):
    """Each against the formula left to autograd in fp32."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype).requires_grad_()

    x, y = random(*shape), random(*shape)
    weight = torch.randn(shape[-1], generator=generator).requires_grad_()
    angles = torch.randn(shape[0], *[1] * (len(shape) - 2), shape[-1] // 2, generator=generator)
    cos, sin = angles.cos(), angles.sin()

    def norm(x, weight):
        return x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight

    def turn(x):  # as a product of complex numbers
        half = x.shape[-1] // 2
        turned = torch.complex(x.float()[..., :half], x.float()[..., half:]) * torch.complex(cos, sin)
        return torch.cat([turned.real, turned.imag], -1)

    cases = [((x, weight), layers._RMSNorm.apply(x, weight, 1e-2), norm(x, weight)),
             ((x,), layers.rotate(x, cos, sin), turn(x))]
    if len(shape) == 2:
        down, bias = random(6, shape[-1]), random(6)
        cases.append(((x, y, down, bias), model_module._SwiGLUDown.apply(x, y, down, bias),
                      F.linear(x.float() * torch.sigmoid(x.float()) * y.float(), down.float(), bias.float())))
    for inputs, got, expected in cases:
        grad = torch.randn(got.shape, generator=generator).to(dtype)
        near = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=6e-2, rtol=2e-2)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected.float(), **near)
        for a, b in zip(torch.autograd.grad(got, inputs, grad.to(got.dtype)),
                        torch.autograd.grad(expected, inputs, grad.to(expected.dtype))):
            torch.testing.assert_close(a.float(), b.float(), **near)
