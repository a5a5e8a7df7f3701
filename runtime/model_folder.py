"""From what a user names as a model to a folder that can be read, or to the way there.

    check_model("owner/name")       # ValueError for what cannot be used; looks at this disk only
    resolve_model("owner/name")     # the folder, downloaded if need be

A model folder has config.json, tokenizer.json and model.safetensors, or several such files with an index.
"""
import re
from pathlib import Path

from runtime.files import read_json
from runtime.foreign import shorten

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What is downloaded from a hub repository in addition to the weights. Its other files (weights for other
# programs, lower precision, pictures) can be many times larger.
HUB_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
             "chat_template.json", "adapter_config.json"]
_POINTER = b"version https://git-lfs.github.com/spec/"


def check_model(model: str | Path) -> Path | None:
    """The model folder of that name; None for a hub id, of which nothing can be said without the network.
    ValueError if it is neither, with what to do."""
    try:
        folder = Path(model).expanduser()
    except RuntimeError:    # there is no such user
        folder = Path(model)
    if folder.is_dir():
        if problem := _what_is_wrong(folder, str(model)):
            raise ValueError(f"--model {model}: {problem}")
        return folder
    if folder.exists():
        raise ValueError(f"--model {model}: {_about_file(folder)}")
    # The hub's names do not begin with a dot: ./model and ../model are folders.
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", str(model)):
        name = folder.name
        hint = "" if "/" in str(model) else (
            f"\nhf download OWNER/{name} --local-dir {name}")
        raise ValueError(f"--model {model}: no such folder, nor a hub id (owner/name){hint}")
    return None


def resolve_model(model: str | Path) -> Path:
    """The path of a model folder. A hub id, `owner/name` or `owner/name@revision`, is downloaded first,
    unless it was before: tokenizer, config, template and weights. ValueError for what cannot be used."""
    if folder := check_model(model):
        return folder
    from huggingface_hub import snapshot_download
    repository, _, revision = str(model).partition("@")

    def download(patterns: list[str], revision: str | None) -> Path:
        try:
            return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
        except Exception as error:  # the hub's many errors all mean that the download failed
            name = repository.rpartition("/")[2]
            raise ValueError(
                f"--model {model}: no such folder, and the download failed: {error}\n"
                "Download it where there is a network, and give its folder:\n"
                f"hf download {repository} --local-dir {name}") from None

    folder = download([*HUB_FILES, SINGLE, INDEX], revision or None)
    if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        # The folder is named after the commit; the branch may have moved since.
        download(sorted(set(weight_map(folder).values())), folder.name)
    if problem := _what_is_wrong(folder, repository):
        raise ValueError(f"--model {model}: {problem}")
    return folder


def weight_map(folder: Path) -> dict[str, str]:
    """The index of a model folder: tensor name -> name of a file in the folder. ValueError if it is
    broken."""
    index = folder / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: weight_map must be an object of tensor names and their files")
    for tensor, name in names.items():
        # A leading slash splits off an empty name.
        if not isinstance(name, str) or {"..", ""} & {*name.split("/")}:
            raise ValueError(f"{index}: {shorten(tensor, 100)} is in {shorten(repr(name), 100)}; that must "
                             "be a file in this folder")
    return names


# ---------------------------------------------------------------- what people have instead


def _what_is_wrong(folder: Path, name: str) -> str:
    """Why a folder is not a model folder and how to make it one; "" if it is. name: of the folder, or of the
    hub repository that it was downloaded from."""
    def has(*files: str) -> bool:
        return any((folder / file).is_file() for file in files)

    weights = has(SINGLE, INDEX)
    if weights and has("config.json") and has("tokenizer.json"):
        return _about_pointers(folder)
    if has("adapter_config.json") and not weights:
        return _about_adapter(folder, name)
    if has("optimizer.safetensors") and has("state.json"):
        return ("is a checkpoint of a run:\n--resume takes it, --model does not. To use its weights, copy "
                "the tokenizer of\nthe model that the run started from:\n"
                f"cp MODEL/*token* MODEL/*.jinja {name}")
    if not has("config.json"):
        inside = [file.parent for pattern in ("final", "*", "snapshots/*")
                  for file in sorted(folder.glob(f"{pattern}/config.json"))]
        if inside:
            return f"the model is in a folder inside:\n--model {inside[0]}"
        if has("identity.json"):
            return ("is a run that has not finished.\nThe command that started it resumes it, "
                    f"and writes its model to\n{folder / 'final'}")
    packed = sorted(folder.glob("*.gguf"))
    if packed and not weights:
        return f"has no *.safetensors. {_about_file(packed[0])}"
    # A hub repository's other files were not downloaded.
    other_weights = has("pytorch_model.bin", "pytorch_model.bin.index.json") or not Path(name).is_dir()
    if has("config.json") and not weights and other_weights:
        new = name if Path(name).is_dir() else name.rpartition("/")[2]
        return ("has no *.safetensors. Convert its weights,\n"
                f"and give --model {new}:\n" + _convert(name, new))
    if weights and has("config.json") and has("tokenizer.model", "vocab.json", "tokenizer_config.json"):
        return ("has no tokenizer.json.\nMake it of the tokenizer's other files:\n"
                + _python("from transformers import AutoTokenizer", f"folder = {name!r}",
                          "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"))
    missing = [what for what, present in (("config.json", has("config.json")), ("*.safetensors", weights),
                                          ("tokenizer.json", has("tokenizer.json"))) if not present]
    return (f"lacks {', '.join(missing)}.\nA model folder needs config.json, "
            "tokenizer.json and *.safetensors, as\nhf download OWNER/NAME --local-dir DIR gets them")


def _about_pointers(folder: Path) -> str:
    """What to do about files that `git clone` without Git LFS left as pointers to what they should hold."""
    for file in [folder / "tokenizer.json", *sorted(folder.glob("*.safetensors"))]:
        if file.is_file():
            with open(file, "rb") as opened:
                if opened.read(len(_POINTER)) == _POINTER:
                    return (f"holds a Git LFS pointer,\nnot the file itself, in {file.name}. To get it:\n"
                            f"git -C {folder} lfs pull")
    return ""


def _about_file(file: Path) -> str:
    if file.suffix != ".gguf":
        return f"is a file; give its folder: --model {file.parent}"
    return (f"{file.name} is for serving.\nTrain the model that it was made from, or unpack it "
            "(pip install gguf):\n"
            + _convert(str(file.parent), str(file.with_suffix("")), f", gguf_file={file.name!r}"))


def _about_adapter(folder: Path, name: str) -> str:
    new = f"{name.rstrip('/').rpartition('/')[2]}-merged" if not Path(name).is_dir() else (
        f"{name.rstrip('/')}-merged")
    tokenizer = name
    if not (folder / "tokenizer_config.json").is_file():
        tokenizer = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path", "BASE"))
    return ("holds an adapter. Merge it into its base model\n(pip install peft):\n"
            + _python("import peft, transformers", f"old, new = {name!r}, {new!r}",
                      "model = peft.AutoPeftModelForCausalLM.from_pretrained(old)",
                      "model.merge_and_unload().save_pretrained(new)",
                      f"tokenizer = transformers.AutoTokenizer.from_pretrained({tokenizer!r})",
                      "tokenizer.save_pretrained(new)")
            + f"\nand give --model {new}")


def _convert(old: str, new: str, more: str = "") -> str:
    return _python("import transformers as t", f"old, new = {old!r}, {new!r}",
                   "for kind in t.AutoModelForCausalLM, t.AutoTokenizer:",
                   f"    kind.from_pretrained(old{more}).save_pretrained(new)")


def _python(*lines: str) -> str:
    """A command to copy: a line break inside the quotes is one to the shell, too."""
    return 'python -c "' + "\n".join(lines) + '"'
