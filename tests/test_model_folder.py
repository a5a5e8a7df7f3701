"""What people name as a model: a folder, a hub id, and all that is neither, with the way out."""
import fnmatch
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import load_file

from model import load_model
from records import data_files
from references import make_reference
from runtime.model_folder import check_model, resolve_model
from runtime.start import fit
from runtime.tokenizer import Tokenizer
from tiny import make_model


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


def test_a_hub_id_without_revision_and_a_folder_that_does_not_exist(hub, tmp_path):
    make_model(hub.repository)
    resolve_model("owner/name")
    assert hub.revisions == [None]
    with pytest.raises(ValueError, match="no such folder"):
        resolve_model(tmp_path / "nowhere" / "at" / "all")


@pytest.mark.parametrize("error, says", [
    (OSError, "failed: Entry A request id. Try B; download it where there is a network (hf download o/n"),
    (errors.GatedRepoError, "failed: its owner grants access on request; accept the terms"),
    (errors.RepositoryNotFoundError, "failed: it does not exist, or is private; check the name"),
    (errors.RevisionNotFoundError, "failed: the repository has no such revision; check what stands behind"),
    (errors.OfflineModeIsEnabled, "failed: HF_HUB_OFFLINE is set; download"),
    (errors.LocalEntryNotFoundError, "failed: the hub cannot be reached, or HF_HUB_OFFLINE is set; down")])
@pytest.mark.parametrize("option", ["", " --repo-type dataset"])
def test_a_failed_download_is_one_line_with_what_to_do(option, error, says, monkeypatch):
    """Errors of the hub's own classes, whose texts have many lines."""
    def fail(*a: object, **k: object) -> None:
        more = {"response": SimpleNamespace(headers={}, request=None)}
        raise error("Entry\n\nA request id.\nTry B",
                    **(more if issubclass(error, errors.HfHubHTTPError) else {}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError) as caught:
        data_files(["o/n:train@v1"]) if option else resolve_model("o/n@v1")
    message = str(caught.value)
    assert message.startswith("o/n:train@v1: no such" if option else "--model o/n@v1: no such")
    assert f"the download of o/n at revision v1 from the hub {says}" in message and "\n" not in message
    assert "; down" not in says or f"hf download o/n{option} --revision v1 --local-dir n" in message


# ---------------------------------------------------------------- what people have instead


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "model")


def says(name: object) -> str:
    """What is wrong with it, checked to fit 80 columns where the folder's path is short."""
    with pytest.raises(ValueError) as caught:
        check_model(name)
    message = str(caught.value)
    assert message.startswith(f"--model {name}: ")
    short = message.replace(str(Path(name).parent), "/models")
    assert max(map(len, fit(f"error: {short}").splitlines())) <= 80, short
    return message


def run_command(message: str) -> None:
    """Run the Python of the command in a message, as the shell would hand it over."""
    (code,) = re.findall(r'^python -c "(.*)"$', message, re.M | re.S)
    exec(code, {})


def files(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return folder


def test_a_folder_with_pytorch_model_bin_is_converted_by_the_command_in_the_error(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "bin")
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = says(folder)
    assert "has no *.safetensors" in message and f"give --model {folder}" in message
    run_command(message)
    assert resolve_model(folder) == folder
    loaded = dict(load_model(folder).named_parameters())
    assert all(torch.equal(loaded[name], x.float()) for name, x in tensors.items())


def test_a_folder_without_tokenizer_json_gets_one_by_the_command_in_the_error(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "old")
    spec = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(spec["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, spec["merges"])))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    message = says(folder)
    assert "has no tokenizer.json" in message
    run_command(message)
    expected = transformers.AutoTokenizer.from_pretrained(folder)("red plum town")["input_ids"]
    assert Tokenizer(check_model(folder)).reference.encode("red plum town").ids == expected


@pytest.mark.parametrize("config, own, base", [
    ({"base_model_name_or_path": "owner/base"}, (), "owner/base"), ({}, (), "BASE"),
    ({"base_model_name_or_path": "owner/base"}, ("tokenizer_config.json",), None)])
def test_an_adapter_is_to_be_merged_with_the_tokenizer_of_its_base(tmp_path, config, own, base):
    folder = files(tmp_path / "lora", "adapter_model.safetensors", *own)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    message = says(folder)
    (code,) = re.findall(r'^python -c "(.*)"$', message, re.M | re.S)
    compile(code, "command", "exec")
    assert "holds an adapter" in message and "merge_and_unload()" in code
    assert f"AutoTokenizer.from_pretrained({base or str(folder)!r})" in code
    assert message.endswith(f"give --model {folder}-merged")


def test_a_run_is_not_its_model_but_names_it(model, tmp_path):
    run = files(tmp_path / "run", "identity.json", "run_config.json")
    assert "is a run that has not finished" in says(run)
    shutil.copytree(model, run / "final")
    assert says(run).endswith(f"the model is in a folder inside: --model {run}/final")
    checkpoint = files(tmp_path / "step-00000002", "config.json", "model.safetensors",
                       "optimizer.safetensors", "state.json")
    message = says(checkpoint)
    assert "--resume takes it" in message
    assert message.endswith(f"cp MODEL/*token* MODEL/*.jinja {checkpoint}")
    # A folder of checkpoints by transformers' Trainer, and one of the hub's cache.
    for inside in ("checkpoint-500", "snapshots/c0ffee"):
        outer = tmp_path / inside.replace("/", "-")
        shutil.copytree(model, outer / inside)
        assert says(outer).endswith(f"--model {outer / inside}")


def test_files_and_other_folders_are_answered_with_what_is_missing(model, tmp_path):
    gguf = files(tmp_path / "packed", "model.gguf") / "model.gguf"
    for named in (gguf, gguf.parent):
        message = says(named)
        assert "model.gguf is for serving" in message and "gguf_file='model.gguf'" in message
    assert says(model / "config.json").endswith(f"is a file; give its folder: --model {model}")
    assert "lacks config.json, *.safetensors, tokenizer.json" in says(files(tmp_path / "empty"))
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    message = says(files(tmp_path / "shards", "config.json", "tokenizer.json", *shards))
    assert "lacks model.safetensors.index.json, which names the file of each tensor; copy it" in message
    bare = shutil.copytree(model, tmp_path / "bare")
    for file in (bare / "tokenizer.json", bare / "tokenizer_config.json"):
        file.unlink()
    assert "lacks tokenizer.json. A model folder needs config.json" in says(bare)
    assert says("/models/nowhere").endswith("no such folder, nor a hub id (owner/name)")
    for path in ("./nowhere", "../nowhere", ".hidden/model"):
        assert says(path).endswith("no such folder, nor a hub id (owner/name)")
    assert says("gpt2").endswith("(owner/name)\nhf download OWNER/gpt2 --local-dir gpt2")
    assert says("~nosuchuser/model/x").endswith("no such folder, nor a hub id (owner/name)")
    assert check_model("owner/name@main") is None


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_answered_with_how_to_get_the_file(name, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "cloned")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert says(folder).endswith(f"{folder / name}: is a Git LFS pointer, not the file itself; to get it, "
                                 f"run git -C {folder} lfs pull")


def test_a_hub_repository_with_other_weights_is_converted_by_its_name(hub):
    files(hub.repository / "x")
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin"):
        (hub.repository / name).write_text("{}")
    with pytest.raises(ValueError, match=r"give --model name:\n(.*\n)+.*= 'owner/name', 'name'"):
        resolve_model("owner/name")
