"""From what a user names as a model to a folder that can be read, or to the way there.

    check_model("owner/name")       # ValueError for what cannot be used; looks at this disk only
    resolve_model("owner/name")     # the folder, downloaded if need be

A model folder has config.json, tokenizer.json and model.safetensors, or several such files with an index.
"""
import re
from pathlib import Path

from runtime.files import read_json
from runtime.foreign import about_pointer, shorten

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What is downloaded from a hub repository in addition to the weights. Its other files (weights for other
# programs, lower precision, pictures) can be many times larger.
HUB_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
             "chat_template.json", "adapter_config.json"]
_ELSEWHERE = "download it where there is a network ({}), and give the folder"
# The hub's errors, by the names of their classes: what is wrong, and what to do.
_DOWNLOAD_ERRORS = {
    "GatedRepoError": ("its owner grants access on request",
                       "accept the terms on its page, then log in with hf auth login"),
    "RepositoryNotFoundError": ("it does not exist, or is private",
                                "check the name, or log in with hf auth login"),
    "RevisionNotFoundError": ("the repository has no such revision", "check what stands behind the @"),
    "LocalEntryNotFoundError": ("the hub cannot be reached, or HF_HUB_OFFLINE is set", _ELSEWHERE),
    "OfflineModeIsEnabled": ("HF_HUB_OFFLINE is set", _ELSEWHERE),
}


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
    repository, _, revision = str(model).partition("@")
    folder = download(f"--model {model}", repository, revision or None, [*HUB_FILES, SINGLE, INDEX])
    if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        # The folder is named after the commit; the branch may have moved since.
        download(f"--model {model}", repository, folder.name, sorted(set(weight_map(folder).values())))
    if problem := _what_is_wrong(folder, repository):
        raise ValueError(f"--model {model}: {problem}")
    return folder


def download(name: str, repository: str, revision: str | None, patterns: list[str], **more: str) -> Path:
    """The folder to which the files of a hub repository were downloaded that match the patterns. name: what
    the user gave, for messages; more: as for snapshot_download(). ValueError if that is not possible."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{name}: no such file or folder; to download it from the Hugging Face Hub: "
                         "pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, **more))
    except Exception as error:
        # The hub's many errors all mean that the download failed. Most have several lines.
        kinds = {kind.__name__ for kind in type(error).__mro__}
        reason, fix = next((answer for kind, answer in _DOWNLOAD_ERRORS.items() if kind in kinds),
                           (shorten(" ".join(str(error).split()), 200) or type(error).__name__, _ELSEWHERE))
        options = more | ({"revision": revision} if revision else {})
        option = "".join(f" --{key.replace('_', '-')} {value}" for key, value in options.items())
        fix = fix.format(f"hf download {repository}{option} --local-dir {repository.rpartition('/')[2]}")
        raise ValueError(f"{name}: no such file or folder, and the download of {repository}"
                         + f" at revision {revision}" * bool(revision)
                         + f" from the hub failed: {reason}; {fix}") from None


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
    # What to call a converted folder: of a hub repository, a folder here.
    own_name = name.rstrip("/") if Path(name).is_dir() else name.rpartition("/")[2]
    if weights and has("config.json") and has("tokenizer.json"):
        files = [folder / "config.json", folder / "tokenizer.json", *sorted(folder.glob("*.safetensors"))]
        return next(filter(None, (about_pointer(file) for file in files if file.is_file())), "")
    if has("adapter_config.json") and not weights:
        return _about_adapter(folder, name, f"{own_name}-merged")
    if has("optimizer.safetensors") and has("state.json"):
        return ("is a checkpoint of a run: --resume takes it, --model does not. To use its weights, copy "
                "the tokenizer of the model that the run started from:\n"
                f"cp MODEL/*token* MODEL/*.jinja {name}")
    if not has("config.json"):
        inside = [file.parent for pattern in ("final", "*", "snapshots/*")
                  for file in sorted(folder.glob(f"{pattern}/config.json"))]
        if inside:
            return f"the model is in a folder inside: --model {inside[0]}"
        if has("identity.json"):
            return ("is a run that has not finished. The command that started it resumes it, "
                    f"and writes its model to {folder / 'final'}")
    packed = sorted(folder.glob("*.gguf"))
    if packed and not weights:
        return f"has no *.safetensors. {_about_file(packed[0])}"
    # A hub repository's other files were not downloaded.
    other_weights = has("pytorch_model.bin", "pytorch_model.bin.index.json") or not Path(name).is_dir()
    if has("config.json") and not weights and other_weights:
        return (f"has no *.safetensors. Convert its weights, and give --model {own_name}:\n"
                + _convert(name, own_name))
    if weights and has("config.json") and has("tokenizer.model", "vocab.json", "tokenizer_config.json"):
        return ("has no tokenizer.json. Make it of the tokenizer's other files:\n"
                + _python("from transformers import AutoTokenizer", f"folder = {name!r}",
                          "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"))
    if not weights and has("config.json") and any(folder.glob("*-of-*.safetensors")):
        return f"lacks {INDEX}, which names the file of each tensor; copy it from where the weights came from"
    missing = [what for what, present in (("config.json", has("config.json")), ("*.safetensors", weights),
                                          ("tokenizer.json", has("tokenizer.json"))) if not present]
    return (f"lacks {', '.join(missing)}. A model folder needs config.json, tokenizer.json and "
            "*.safetensors, as hf download OWNER/NAME --local-dir DIR gets them")


def _about_file(file: Path) -> str:
    if file.suffix != ".gguf":
        return f"is a file; give its folder: --model {file.parent}"
    return (f"{file.name} is for serving. Train the model that it was made from, or unpack it "
            "(pip install gguf):\n"
            + _convert(str(file.parent), str(file.with_suffix("")), f", gguf_file={file.name!r}"))


def _about_adapter(folder: Path, name: str, new: str) -> str:
    tokenizer = name
    if not (folder / "tokenizer_config.json").is_file():
        tokenizer = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path", "BASE"))
    return ("holds an adapter. Merge it into its base model (pip install peft):\n"
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
