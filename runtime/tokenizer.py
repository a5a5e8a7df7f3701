"""The tokenizer of a checkpoint folder: its files in and out, and encoders to which special tokens are text.

A folder has up to five files that say which tokens are special and what they are called. Where they disagree,
transformers decides, so that the tokens trained here are those that it serves.
"""
import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from runtime.files import hash_file, read_json
from runtime.foreign import read_text, shorten

# What transformers calls special tokens.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# How an added token is matched in a text.
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# What a tokenizer class of transformers adds to a folder whose files do not say, by its name without "Fast".
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


@contextlib.contextmanager
def naming_file(place: str | Path) -> Iterator[None]:
    """Makes whatever error a file's contents cause a ValueError that names the file, `place`. The tokenizers
    library raises plain Exceptions and, for what it has not checked, PanicException, a BaseException."""
    try:
        yield
    except OSError:
        raise
    except ValueError as error:
        if str(place).partition(": ")[0] in str(error):
            raise
        raise ValueError(f"{place}: {error}") from None
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            # The library's own Exceptions are sentences, a KeyError is not.
            reason = str(error) if type(error) is Exception else f"does not hold what it should ({error!r})"
            raise ValueError(f"{place}: {shorten(reason, 500)}") from None
        raise


class Tokenizer:
    """tokenizer.json of a checkpoint folder, with its special tokens and chat template.

    Normalizer, splitting, model and post-processor are those of tokenizer.json as it is. For a few classes
    (LlamaTokenizer) transformers builds some of them itself, so it may serve the source folder with other
    ids; the exported folder names a class that takes the file as it is (write_tokenizer).

    named_tokens: {"eos_token": "</s>", ...}; special: {text: id} of all special tokens; adds_bos: whether
    plain text begins with the BOS token; reference: finds special tokens in a text, as serving does;
    at_start and after_special: encode text in which special tokens are only text, the one at the start of an
    example, the other after a special token.

    ValueError if the folder has no tokenizer.json, or if text that only spells a special token could become
    one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        text, spec = read_text(file), read_json(file)
        config = read_json(self.folder / "tokenizer_config.json")
        self.chat_template, self.other_templates = _read_chat_template(self.folder, config)
        with naming_file(file):
            self.reference = tokenizers.Tokenizer.from_str(text)
            if dropout := spec["model"].get("dropout"):
                raise ValueError(f"model.dropout is {dropout}, so the same text would get other ids each "
                                 "time; set it to null")
        with naming_file(f"{self.folder}: tokenizer.json, tokenizer_config.json, special_tokens_map.json or "
                         "added_tokens.json"):
            self.class_defaults = _class_defaults(self.folder, config, '"ByteLevel"' in text)
            self.named_tokens, self.extra_tokens = _add_special_tokens(
                self.reference, self.folder, config, spec, self.class_defaults)
        self.bos_token = self.named_tokens.get("bos_token")
        self.eos_token = self.named_tokens.get("eos_token")
        # The library's ids, not the file's: a token of the vocabulary keeps its id there, whatever
        # added_tokens says.
        self.added_tokens = [
            {"id": index, "content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
            for index, token in sorted(self.reference.get_added_tokens_decoder().items())]
        special = [token for token in self.added_tokens if token["special"]]
        self.special = {token["content"]: token["id"] for token in special}
        self.strips_left = {token["content"] for token in special if token["lstrip"]}
        self.strips_right = {token["content"] for token in special if token["rstrip"]}
        # Saved padding and truncation would hide BOS, and pad or cut what is encoded below. add_bos_token in
        # tokenizer_config.json has no effect next to a tokenizer.json, whose post-processor decides.
        self.reference.no_padding()
        self.reference.no_truncation()
        bos = self.special.get(self.bos_token)
        with naming_file(file):
            self.adds_bos = bos is not None and self.reference.encode("a").ids[:1] == [bos]
        # We put special tokens in ourselves and need offsets into the text as it is: no post-processor.
        self.reference.post_processor = None
        spec.update(added_tokens=self.added_tokens, post_processor=None, truncation=None, padding=None)
        with naming_file(file):
            self._encode_content_with(spec)

    def _encode_content_with(self, spec: dict) -> None:
        """Make at_start and after_special from tokenizer.json's content: to them `</s>` in a text is text.

        It is not enough not to split at special tokens: a vocabulary with the piece `</s>` finds it in text,
        or in what the normalizer makes of `\uff1c/s\uff1e`. So these encoders know the special tokens by
        names that no text contains. All other tokens keep their ids.
        """
        model = spec["model"]
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:     # Unigram
            unknown = model["vocab"][model["unk_id"]][0]
        # Unknown text may become the unknown token, but that must not be the one that ends a turn.
        self._forbidden = {index: text for text, index in self.special.items()
                           if text != unknown or text in (self.bos_token, self.eos_token)}
        names = {text: f"\ue000{secrets.token_hex(16)}" for text in self.special}
        spec["added_tokens"] = [{**token, "content": names.get(token["content"], token["content"])}
                                for token in spec["added_tokens"]]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, list):        # Unigram: [piece, score], the place is the id
            inside = {text: index for text, index in self.special.items()
                      if index < len(vocabulary) and vocabulary[index][0] == text}
            for text, index in inside.items():
                vocabulary[index] = [names[text], vocabulary[index][1]]
        else:
            inside = {text: vocabulary.pop(text) for text in self.special if text in vocabulary}
            vocabulary.update((names[text], index) for text, index in inside.items())
        if model.get("unk_token") in inside:
            model["unk_token"] = names[model["unk_token"]]
        if model.get("merges") and inside:
            # BPE's merges must not name tokens that the vocabulary lacks now.
            pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [[a, b] for a, b in pairs
                               if inside.keys().isdisjoint((a, b, a + b.removeprefix(prefix)))]
        text = json.dumps(spec)
        self.at_start = self.after_special = tokenizers.Tokenizer.from_str(text)
        # SentencePiece puts a space before the first word of a text only ("first"), so text after a special
        # token is encoded by a twin that adds none.
        if '"prepend_scheme": "first"' in text:
            self.after_special = tokenizers.Tokenizer.from_str(text.replace('"prepend_scheme": "first"',
                                                                   '"prepend_scheme": "never"'))
        # Try every special token, also in full-width letters, and a character that no vocabulary has.
        wide = {code: code + 0xfee0 for code in range(ord("!"), ord("~") + 1)}
        for text in (*self.special, *(text.translate(wide) for text in self.special), "\U000e0fff"):
            for encoder in {self.at_start, self.after_special}:
                try:
                    ids = encoder.encode(text, add_special_tokens=False).ids
                except Exception:
                    # Without an unknown token the library refuses such text.
                    continue
                self.check_content(text, ids)

    def check_content(self, text: str, ids: list[int]) -> None:
        """ValueError if a special token is among the ids of a text that only spells one."""
        if not self._forbidden.keys().isdisjoint(ids):
            index = next(index for index in ids if index in self._forbidden)
            raise ValueError(
                f"{self.folder}/tokenizer.json: in a message, {text[:80]!r} becomes the special token "
                f"{self._forbidden[index]!r} (id {index}), which only the template may write; take the piece "
                "out of the tokenizer's vocabulary, or give it an unk_token of its own")

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides ids and where an answer ends: tokenizer.json, and which tokens the
        folder's files call special, by which names."""
        parts = [hash_file(self.folder / "tokenizer.json"), self.named_tokens, self.added_tokens]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        with naming_file(f"{self.folder}/tokenizer.json"):
            return self.reference.decode(list(ids), skip_special_tokens=skip_special_tokens)


def check_rows(ids: Iterable[int], rows: int, where: str, folder: str | Path = "the checkpoint") -> None:
    """ValueError unless every id has one of the embedding's `rows`. where begins the message, folder names
    the checkpoint in it."""
    largest = max(ids, default=0)
    if largest >= rows:
        raise ValueError(f"{where} token {largest}, but the embedding has only {rows} rows; tokenizer and "
                         f"model of {folder} do not belong together, or tokens were added without resizing "
                         "the model")


def _class_defaults(folder: Path, config: dict, byte_level: bool) -> dict[str, str]:
    """What the class that transformers would use for this folder adds to its files."""
    model = read_json(folder / "config.json")
    family = model.get("model_type")
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    # For two families the declared class does not count, and a byte-level "Llama" gets no defaults.
    name = declared if declared and family not in ("qwen2", "mistral") else MODEL_CLASSES.get(family, "")
    name = name.removesuffix("Fast")
    return {} if byte_level and declared and name == "LlamaTokenizer" else CLASS_DEFAULTS.get(name, {})


def _add_special_tokens(tokenizer: tokenizers.Tokenizer, folder: Path, config: dict, spec: dict,
                        defaults: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Make the tokens special that a folder's files call so, and add those that the vocabulary lacks. config,
    spec: tokenizer_config.json and tokenizer.json. Returns ({"bos_token": text, ...}, texts of special tokens
    without a name).

    Where the files disagree, this follows transformers 5: if tokenizer_config.json has added_tokens_decoder,
    the other files do not count. Otherwise special_tokens_map.json, even a null in it, overrides
    tokenizer_config.json, and what tokenizer.json says about a token overrides added_tokens.json.
    """
    # Next to a tokenizer.json these two have no effect, and below they would look like names of tokens.
    fields = {name: value for name, value in config.items() if name not in ("add_bos_token", "add_eos_token")}
    # additional_special_tokens is the old name of the field.
    if "additional_special_tokens" in fields and not fields.get("extra_special_tokens"):
        fields["extra_special_tokens"] = fields.pop("additional_special_tokens")
    own = {name: fields.pop(name) for name in list(fields)
           if name.endswith("_token") and name not in NAMED and isinstance(fields[name], str)}
    # It may be an object with names, too: {"image_token": "<image>"}.
    if isinstance(fields.get("extra_special_tokens"), dict):
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
    # A default that the vocabulary lacks would be a new token, which nobody asked for.
    fields = {**{name: text for name, text in defaults.items() if tokenizer.token_to_id(text) is not None},
              **fields}
    if spec.get("padding"):
        fields.setdefault("pad_token", spec["padding"]["pad_token"])

    def described(name: str, value: str | dict) -> dict:
        """A token is its text, or {"content": text, "lstrip": true, ...}."""
        token = {"content": value} if isinstance(value, str) else value
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ValueError(f"{folder}: {name} in tokenizer_config.json or special_tokens_map.json is "
                             f"{shorten(repr(value), 100)}; a token must be text, or an object with text as "
                             "its 'content'")
        return token

    values = {name: value for name, value in fields.items() if value and (
        name in NAMED or name.endswith("_token") and isinstance(value, (str, dict)))}
    values.update(fields.get("model_specific_special_tokens") or {})
    tokens = {name: described(name, value) for name, value in values.items()}
    extra = [described("extra_special_tokens", value) for value in fields["extra_special_tokens"] or []]
    special = {token["content"]: token for token in (*tokens.values(), *extra)}
    # How a token is matched is decided by the first of these that knows it, in the order of ids.
    known = {token["content"]: token for _, token in sorted(added.items(), key=lambda item: int(item[0]))}
    in_library = {token.content: token.__getstate__()
                  for token in tokenizer.get_added_tokens_decoder().values()}
    for text, token in special.items():
        known.setdefault(text, in_library.get(text, {"special": True, **token}))
    tokens_to_add = []
    for text, token in known.items():
        flags = {name: token[name] for name in FLAGS if name in token}
        flags["special"] = text in special or flags.get("special", False)
        tokens_to_add.append(tokenizers.AddedToken(text, **{"normalized": not flags["special"], **flags}))
    # All at once, because each call rebuilds the tokenizer's search tree.
    tokenizer.add_tokens(tokens_to_add)
    return ({name: token["content"] for name, token in tokens.items()},
            list(dict.fromkeys(token["content"] for token in extra)))


def _read_chat_template(folder: Path, config: dict) -> tuple[str | None, list[str]]:
    """The template, and the names of the other ones that the checkpoint has, such as tool_use."""
    others = sorted(file.stem for file in (folder / "additional_chat_templates").glob("*.jinja"))
    if os.path.lexists(folder / "chat_template.jinja"):
        return read_text(folder / "chat_template.jinja"), others
    # chat_template.json is a processor's: transformers' tokenizers do not read it.
    template = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    # There may be several with names.
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)
                 and isinstance(entry.get("name"), str)}
        template = named.pop("default", None)
        others += sorted(named)
    if not isinstance(template, str | None):
        raise ValueError(f"{folder}: chat_template in chat_template.json or tokenizer_config.json must be "
                         "text or a list of {\"name\", \"template\"} objects")
    return template, others


# Fields of tokenizer_config.json that are copied, since they change no ids. The others belong to the class
# that the source named (legacy, add_prefix_space), have no effect next to tokenizer.json (add_bos_token), or
# ask for code that is not in the folder.
KEPT = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces",
        "model_input_names")


def stop_ids(content: dict) -> list:
    """What a generation_config.json or config.json says ends an answer: a list, one id or null."""
    stops = content.get("eos_token_id")
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def write_tokenizer(folder: Path, tokenizer: Tokenizer, chat_template: str, end_of_turn: str,
                    model_config: dict) -> None:
    """Write all files of a checkpoint folder except the weights: tokenizer, chat template, and in
    generation_config.json the special token that ends an answer, end_of_turn. model_config: config.json's
    content.

    Training takes tokenizer.json as it is, so the folder names the class that does the same in transformers 4
    and 5: a class such as LlamaTokenizer would build its own splitting, with other ids. What that class added
    to the source's files, and what they said about special tokens, is written out.
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
        # transformers 4 puts this value into tokenizer.json's splitter.
        config["add_prefix_space"] = splitter["add_prefix_space"]
    if own:
        # "image_token" and the like: transformers 4 reads them only here.
        config["extra_special_tokens"] = own
    if spec.get("padding"):
        # Otherwise the saved padding would name the padding token.
        config["pad_token"] = None
    write("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config, **named,
                                    "chat_template": chat_template})
    # Serving stops at eos_token_id: it must name the token that was trained to end a turn.
    generation = read_json(source / "generation_config.json")
    stops = stop_ids(generation if generation.get("eos_token_id") is not None else model_config)
    end = tokenizer.special[end_of_turn]
    stops = stops if end in stops else [end, *stops]
    generation["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    ids = {name: tokenizer.special.get(token) for name, token in tokenizer.named_tokens.items()}
    if ids.get("bos_token") is not None:
        generation["bos_token_id"] = ids["bos_token"]
    # A padding token without a row in the embedding could not be looked up.
    if generation.get("pad_token_id") is None and (pad := ids.get("pad_token")) is not None:
        generation |= {"pad_token_id": pad} if pad < model_config["vocab_size"] else {}
    write("generation_config.json", generation)

