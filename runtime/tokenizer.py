"""What the tokenizer files of a checkpoint folder say, beyond tokenizer.json's model, and such files written.

A folder says in up to five files which tokens are special and what they are called. transformers decides
which of them counts, so what is read here is what transformers would serve with.
"""
import json
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from runtime.files import read_json

if TYPE_CHECKING:
    from chat import Tokenizer

# The special tokens of every name that transformers knows.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")    # how an added token is matched
# What a class of transformers adds to a folder whose files do not say, by tokenizer_class without "Fast".
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "left"}
_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
CLASS_DEFAULTS = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": {**_LLAMA, "prefix_token": "▁<PRE>", "middle_token": "▁<MID>",
                           "suffix_token": "▁<SUF>", "eot_token": "▁<EOT>", "fill_token": "<FILL_ME>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
                       "mask_token": "<mask>", "padding_side": "left"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": _GPT2,
    "GPTNeoXTokenizer": {**_GPT2, "pad_token": "<|padding|>"},
}
MODEL_CLASSES = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}


def class_defaults(folder: Path, config: dict, byte_level: bool) -> dict[str, str]:
    """What the class that transformers would take for this folder adds to its files."""
    model = read_json(folder / "config.json")
    family = model.get("model_type")
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    # For two families it does not ask what is declared; and a "Llama" that is byte-level gets none.
    name = declared if declared and family not in ("qwen2", "mistral") else MODEL_CLASSES.get(family, "")
    name = name.removesuffix("Fast")
    return {} if byte_level and declared and name == "LlamaTokenizer" else CLASS_DEFAULTS.get(name, {})


def add_special_tokens(tokenizer: tokenizers.Tokenizer, folder: Path, config: dict, spec: dict,
                        defaults: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Make the tokens special that the files of a folder call so; the vocabulary grows by those it lacks.
    config, spec: its tokenizer_config.json and tokenizer.json. Returns ({"bos_token": text, ...}, texts of
    special tokens without a name).

    Where the files disagree, transformers 5 decides: if tokenizer_config.json has added_tokens_decoder, the
    other files say nothing. Else special_tokens_map.json goes before tokenizer_config.json, a null in it
    too, and what tokenizer.json says of a token goes before added_tokens.json.
    """
    # With a tokenizer.json, these two are not read; they would look like names below if they were text.
    fields = {name: value for name, value in config.items() if name not in ("add_bos_token", "add_eos_token")}
    if "additional_special_tokens" in fields and not fields.get("extra_special_tokens"):    # the old name
        fields["extra_special_tokens"] = fields.pop("additional_special_tokens")
    own = {name: fields.pop(name) for name in list(fields)
           if name.endswith("_token") and name not in NAMED and isinstance(fields[name], str)}
    if isinstance(fields.get("extra_special_tokens"), dict):    # {"image_token": "<image>"}
        own.update(fields.pop("extra_special_tokens"))
    if own:
        fields["model_specific_special_tokens"] = own
    added = fields.get("added_tokens_decoder")
    if added is None:
        for name, value in read_json(folder / "special_tokens_map.json").items():
            if name == "extra_special_tokens" and isinstance(value, list):
                value = [*(fields.get(name) or []), *value]
            fields[name] = value
        if isinstance(fields.get("extra_special_tokens"), dict):
            fields["model_specific_special_tokens"] = {**(fields.get("model_specific_special_tokens") or {}),
                                                       **fields.pop("extra_special_tokens")}
        added = {index: {"content": text} for text, index in read_json(folder / "added_tokens.json").items()}
        added.update((token["id"], token) for token in spec.get("added_tokens") or [])
    if "extra_special_tokens" not in fields:
        fields["extra_special_tokens"] = fields.get("additional_special_tokens")
    # A default that the vocabulary lacks would be a new token that nobody asked for.
    fields = {**{name: text for name, text in defaults.items() if tokenizer.token_to_id(text) is not None},
              **fields}
    if spec.get("padding"):
        fields.setdefault("pad_token", spec["padding"]["pad_token"])

    def described(name: str, value: str | dict) -> dict:
        """A token is its text, or {"content": text, "lstrip": true, ...}."""
        token = {"content": value} if isinstance(value, str) else value
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ValueError(f"{folder}: {name} in tokenizer_config.json or special_tokens_map.json is "
                             f"{value!r}; a token must be text, or an object with text as its 'content'")
        return token

    values = {name: value for name, value in fields.items() if value and (
        name in NAMED or name.endswith("_token") and isinstance(value, (str, dict)))}
    values.update(fields.get("model_specific_special_tokens") or {})
    tokens = {name: described(name, value) for name, value in values.items()}
    extra = [described("extra_special_tokens", value) for value in fields["extra_special_tokens"] or []]
    special = {token["content"]: token for token in (*tokens.values(), *extra)}
    # How a token is matched is said by the first of these that knows it, in the order of ids.
    known = {token["content"]: token for _, token in sorted(added.items(), key=lambda item: int(item[0]))}
    there = {token.content: token.__getstate__() for token in tokenizer.get_added_tokens_decoder().values()}
    for text, token in special.items():
        known.setdefault(text, there.get(text, {"special": True, **token}))
    tokens_to_add = []
    for text, token in known.items():
        flags = {name: token[name] for name in FLAGS if name in token}
        flags["special"] = text in special or flags.get("special", False)
        tokens_to_add.append(tokenizers.AddedToken(text, **{"normalized": not flags["special"], **flags}))
    tokenizer.add_tokens(tokens_to_add)     # at once: each call makes the tokenizer's search tree anew
    return ({name: token["content"] for name, token in tokens.items()},
            list(dict.fromkeys(token["content"] for token in extra)))


def read_chat_template(folder: Path, config: dict) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
# Fields of tokenizer_config.json that are kept, since they change no ids. The others belong to the class
# that the source named (legacy, add_prefix_space), are said by tokenizer.json (add_bos_token), or ask for
# code that is not here.
KEPT = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces",
        "model_input_names")


def write_tokenizer(folder: Path, tokenizer: "Tokenizer", chat_template: str, end_of_turn: str,
                    model_config: dict) -> None:
    """All the files of a checkpoint folder but the weights: tokenizer, template, and where an answer ends.
    tokenizer: chat.Tokenizer; end_of_turn: the special token that does; model_config: config.json's content.

    Training takes tokenizer.json as it stands. So the folder names the class that does so, too, in
    transformers 4 and 5: a class such as LlamaTokenizer would build its own splitting, with other ids. What
    that class added to the source's files, and what they said of special tokens, is written out.
    """
    def write(name: str, content: dict, indent: int | None = 2) -> None:
        text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")

    source = tokenizer.folder
    spec = read_json(source / "tokenizer.json")
    write("tokenizer.json", {**spec, "added_tokens": tokenizer.added_tokens}, indent=None)
    write("added_tokens.json", {token["content"]: token["id"] for token in tokenizer.added_tokens})
    own = {name: text for name, text in tokenizer.named_tokens.items() if name not in NAMED}
    named = {name: text for name, text in tokenizer.named_tokens.items() if name in NAMED}
    if tokenizer.extra_tokens:
        named["additional_special_tokens"] = tokenizer.extra_tokens
    write("special_tokens_map.json", named)
    found = {**tokenizer.class_defaults, **read_json(source / "tokenizer_config.json")}
    config = {name: found[name] for name in KEPT if found.get(name) is not None}
    if "add_prefix_space" in (splitter := spec.get("pre_tokenizer") or {}):
        config["add_prefix_space"] = splitter["add_prefix_space"]   # transformers 4 sets it to this one's
    if own:     # "image_token" and its like; transformers 4 takes them here only
        config["extra_special_tokens"] = own
    if spec.get("padding"):     # which would else name it
        config["pad_token"] = None
    write("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config, **named,
                                    "chat_template": chat_template})
    # Serving stops at eos_token_id: it must name the token that was trained to end a turn.
    generation = read_json(source / "generation_config.json")
    stops = generation.get("eos_token_id")
    stops = model_config.get("eos_token_id") if stops is None else stops
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    end = tokenizer.special[end_of_turn]
    stops = stops if end in stops else [end, *stops]
    generation["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    ids = {name: tokenizer.special.get(token) for name, token in tokenizer.named_tokens.items()}
    if ids.get("bos_token") is not None:
        generation["bos_token_id"] = ids["bos_token"]
    # A padding token that was added without a row in the embedding could not be looked up.
    if generation.get("pad_token_id") is None and (pad := ids.get("pad_token")) is not None:
        generation |= {"pad_token_id": pad} if pad < model_config["vocab_size"] else {}
    write("generation_config.json", generation)

