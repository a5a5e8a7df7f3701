"""A checkpoint folder's weights in and out: against transformers, in shards, damaged."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model import load_model, stored_weights
from references import make_reference, same_as_transformers
from runtime import weights as weight_files
from runtime.model_config import read_config
from runtime.weights import EMBEDDING, HEAD, model_fingerprint, save_model
from tiny import flip_a_bit, make_model, run_script

@pytest.mark.parametrize("name", ["llama2-gqa-tied", "llama1-mha", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_file_bytes", [10**9, 20_000])
def test_round_trip_is_exact_and_loads_in_transformers(name, dtype, max_file_bytes, tmp_path):
    source, saved = tmp_path / "source", tmp_path / "saved"
    saved.mkdir()
    make_reference(name).to(dtype).save_pretrained(source, max_shard_size=max_file_bytes)
    mine = load_model(source)
    assert mine.source_dtype == dtype and all(p.dtype == torch.float32 for p in mine.parameters())
    save_model(mine, saved, max_file_bytes=max_file_bytes)
    files = sorted(saved.glob("*.safetensors"))
    assert (len(files) > 1) == (max_file_bytes == 20_000)
    assert all(f.stat().st_size <= max_file_bytes + 4000 or len(load_file(f)) == 1 for f in files)
    old = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    new = {k: v for f in files for k, v in load_file(f).items()}
    assert old.keys() == new.keys() and ("lm_head.weight" in new) == (name != "llama2-gqa-tied")
    assert all(v.dtype == dtype and torch.equal(v, old[k]) for k, v in new.items())
    again = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    ids = torch.arange(20)
    logits = mine(ids, ids, torch.tensor([0, 20])) @ mine.head_weight.T
    torch.testing.assert_close(logits, again(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


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
    monkeypatch.setattr(weight_files, "PIECE", 1000)    # several pieces
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
    monkeypatch.setattr(weight_files, "PIECE", 1000)
    sizes, read = [], weight_files._read
    monkeypatch.setattr(weight_files, "_read", lambda stored, a, b: sizes.append(b - a) or read(stored, a, b))
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
    monkeypatch.setattr(weight_files, "PIECE", 1000)
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
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].double()
    del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.extra"] = torch.ones(1)
    # Old checkpoints carry it: no fault.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    for part in ("model.norm.weight is [7], should be [32]", "missing lm_head.weight",
                 "model.embed_tokens.weight is F64, should be F32, BF16 or F16",
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


# ---------------------------------------------------------------- ranks, fingerprints


def test_ranks_load_a_head_of_its_own_and_the_one_that_reads_a_nan_names_it(tmp_path):
    """See sharded_loading.py."""
    for name in ("untied", "broken"):
        make_model(tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        if name == "untied":
            embedding = tensors["model.embed_tokens.weight"]
            tensors["lm_head.weight"] = head = embedding + 1
        else:
            tensors["model.embed_tokens.weight"][-1, -1] = float("nan")
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    found = json.loads(run_script("sharded_loading.py", tmp_path, 2))
    assert torch.equal(torch.tensor(found["head"]), head)
    assert torch.equal(torch.tensor(found["embedding"]), embedding)
    assert found["faults"][0] == "" and "tensor model.embed_tokens.weight holds NaN" in found["faults"][1]


def test_a_models_fingerprint_follows_its_config_and_its_weights(tmp_path):
    prints, model = set(), make_model(tmp_path / "model")
    for name in ("same", "config", "weights"):
        copy = shutil.copytree(model, tmp_path / name)
        if name == "config":
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
        if name == "weights":
            flip_a_bit(copy / "model.safetensors")
        prints.add(model_fingerprint(copy))
    assert len(prints) == 3 and model_fingerprint(model) in prints
