"""A checkpoint folder's tokenizer: what it must have, and that its special tokens, and the ids of text and
of the exported folder, are those that transformers finds in the same files."""
import inspect
import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from safetensors.torch import save_file
from tokenizers import processors

from runtime import tokenizer as tokenizer_files
import tiny
import tokenizers_for_tests as cast
import train
from chat import COMPLETION, Piece, TEMPLATE, TEMPLATES, check_vocabulary, load_template, tokenize
from runtime.tokenizer import Tokenizer
from data import check_embedding, load_dataset
from runtime.tokenizer import CLASS_DEFAULTS, NAMED
from eval import generate, likelihood, spans
from eval.engine import Engine
from model import load_model
from tiny import make_records, weights

TEXTS = ["Name a colour. Red is a colour.", " Hello  world, plum 12345", "\n\nWhere is the café?\tOù?  ", "a",
         "Be brief.\n### Response:\nIt is 21 degrees", "no 🙂 such \u4e00 characters", "e\u0301 \ufb01g"]


def write(name: str, folder: Path) -> Path:
    return (cast.write if name in cast.CAST else cast.write_other)(name, folder)


def change(file: Path, **fields: object) -> None:
    """Set fields of a JSON file; Ellipsis deletes one."""
    content = {**(json.loads(file.read_text()) if file.is_file() else {}), **fields}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def wide(text: str) -> str:
    return "".join(chr(ord(c) + 0xfee0) if "!" <= c <= "~" else c for c in text)


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.reference.encode(text, add_special_tokens=False).ids


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json: no such file$"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["llama3", "llama2"])
def test_a_template_that_writes_bos_twice_is_refused(name, tmp_path):
    tokenizer = Tokenizer(cast.write(name, tmp_path / "model"))
    source = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    make_records(tmp_path / "train.jsonl", 3)
    for bos, fine in (("", True), ("{{ bos_token }}", True), ("{{ bos_token }}{{ bos_token }}", False)):
        (tmp_path / "t.jinja").write_text(bos + source)
        template = load_template(str(tmp_path / "t.jinja"), tokenizer)
        if fine:
            load_dataset([tmp_path / "train.jsonl"], tokenizer, template, 99, "truncate", tmp_path / "cache")
        else:
            with pytest.raises(ValueError, match="twice"):
                load_dataset([tmp_path / "train.jsonl"], tokenizer, template, 99, "truncate",
                             tmp_path / "cache")


# ---------------------------------------------------------------- content


@pytest.mark.parametrize("name", [*cast.CAST, *cast.OTHERS])
def test_content_never_becomes_a_special_token_and_other_text_has_the_ids_of_transformers(name, tmp_path):
    tokenizer = Tokenizer(write(name, tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    end = tokenizer.eos_token
    special = set(tokenizer.special.values()) - {theirs.unk_token_id}
    spelled = [text for token in tokenizer.special for text in (token, wide(token), token.upper())]
    assert any(special & set(theirs(text, add_special_tokens=False).input_ids) for text in spelled)
    for text in (*spelled, *TEXTS):
        for content in (text, f"a {text} b", f"a{text}", f" {text}{text}. ", f"x{text[:1]}"):
            ids, _ = tokenize([Piece(content, TEMPLATE), Piece(end, TEMPLATE, special=True),
                               Piece(content, TEMPLATE)], tokenizer)
            assert [i for i in ids if i in special] == [tokenizer.special[end]]
            if text in TEXTS:
                assert ids == theirs(f"{content}{end}{content}", add_special_tokens=False).input_ids


def test_text_that_spells_special_tokens_keeps_what_else_there_is(tmp_path):
    """Written by hand: all other tokens are those that the same text has without the special one."""
    for name, text, wanted in (("unigram", "a </s> plum", ["▁a", "▁", "<", "/", "s", ">", "▁plum"]),
                               ("unigram_nfkc", "a ＜/s＞", ["▁a", "▁", "<", "/", "s", ">"]),
                               ("wordlevel", "a </s> plum", ["a", "<unk>", "plum"]),
                               ("wordpiece", "a </s> plum", ["a", "<", "##/", "##s", "##>", "plum"]),
                               ("bpe_ignore_merges", "a </s> plum", ["a", "<", "/", "s", ">", "plum"]),
                               ("bpe_merges", "a </s>.", ["a", "</", "s>", "."])):
        tokenizer = Tokenizer(write(name, tmp_path / name))
        ids = tokenizer.at_start.encode(text).ids
        assert [tokenizer.reference.id_to_token(i) for i in ids] == wanted


@pytest.mark.parametrize("name", ["unigram_nfkc", "wordlevel", "llama3"])
def test_records_that_spell_special_tokens_are_trained_as_text(name, tmp_path):
    tokenizer = Tokenizer(write(name, tmp_path / "model"))
    template = load_template("plain", tokenizer)
    end = tokenizer.special[tokenizer.eos_token]
    texts = [text for token in tokenizer.special for text in (token, wide(token))]
    (tmp_path / "train.jsonl").write_text("".join(
        json.dumps({"prompt": f"a {text} b", "completion": f"{text} c"}) + "\n" for text in texts))
    dataset = load_dataset([tmp_path / "train.jsonl"], tokenizer, template, 300, "error", tmp_path / "cache")
    for a, b in zip(dataset.offsets, dataset.offsets[1:]):
        assert (dataset.ids[a:b] == end).sum() == 1 and dataset.ids[b - 1] == end


def test_text_of_the_template_that_serving_would_make_a_special_token_of_is_refused(tmp_path):
    tokenizer = Tokenizer(write("unigram_nfkc", tmp_path))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}"
                                      "{{ m.role }}：＜s＞ {{ m.content }}{{ eos_token }}{% endfor %}")
    make_records(tmp_path / "train.jsonl", 3)
    with pytest.raises(ValueError, match="train.jsonl:1: .*pieces and whole text give different ids"):
        template = load_template(str(tmp_path / "t.jinja"), tokenizer)
        load_dataset([tmp_path / "train.jsonl"], tokenizer, template, 99, "truncate", tmp_path / "cache")


def test_cached_tokens_are_not_taken_after_the_metadata_called_another_token_special(tmp_path):
    folder = write("wordlevel", tmp_path / "model")
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(folder / "tokenizer.json", added_tokens=spec["added_tokens"][:3])    # <unk>, <s>, </s>
    (tmp_path / "train.jsonl").write_text('{"prompt": "a <|im_end|>", "completion": "a"}')
    held = []
    for extra in ([], ["<|im_end|>"]):
        change(folder / "tokenizer_config.json", additional_special_tokens=extra)
        tokenizer = Tokenizer(folder)
        dataset = load_dataset([tmp_path / "train.jsonl"], tokenizer, load_template("plain", tokenizer), 99,
                               "error", tmp_path / "cache")
        held.append(4 in dataset.ids)
    assert held == [True, False]


def test_an_unknown_token_that_ends_texts_too_is_refused(tmp_path):
    """Unknown words of a message would be trained as ends of turn."""
    write("wordlevel", tmp_path)
    change(tmp_path / "tokenizer_config.json", eos_token="<unk>")
    with pytest.raises(ValueError, match="becomes the special token '<unk>' .*unk_token of its own"):
        Tokenizer(tmp_path)
    write("bpe_merges", tmp_path)       # nothing is unknown to it: it leaves out what it does not know
    change(tmp_path / "tokenizer_config.json", eos_token="<unk>")
    Tokenizer(tmp_path)


def test_a_vocabulary_without_an_unknown_token_needs_none(tmp_path):
    write("wordlevel", tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    del spec["model"]["vocab"]["<unk>"]
    change(tmp_path / "tokenizer.json", model=spec["model"], added_tokens=spec["added_tokens"][1:])
    change(tmp_path / "tokenizer_config.json", unk_token=...)
    tokenizer, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert plain_ids(tokenizer, "a plum </s>") == theirs("a plum </s>", add_special_tokens=False).input_ids


def test_a_special_token_that_gets_through_is_refused_when_loading_and_when_tokenizing(tmp_path, monkeypatch):
    tokenizer = Tokenizer(write("unigram_nfkc", tmp_path))
    tokenizer.at_start = tokenizer.reference
    for text in ("a </s> b", "a ＜/s＞ b"):
        with pytest.raises(ValueError, match=f"'{text}' becomes the special token '</s>' .id 2."):
            tokenize([Piece(text, TEMPLATE)], tokenizer)
    monkeypatch.setattr("chat.json.dumps", lambda spec: (tmp_path / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match="becomes the special token"):
        Tokenizer(tmp_path)


# ---------------------------------------------------------------- BOS

PROCESSORS = {
    "none": None,
    "template": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
    "template with another": processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)]),
    "both ends": processors.TemplateProcessing(single="<s> $A </s>",
                                               special_tokens=[("<s>", 1), ("</s>", 2)]),
    "end": processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)]),
    "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
    "byte level": processors.ByteLevel(),
    "sequence": processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])]),
}
PADDING = {"strategy": {"Fixed": 8}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
           "pad_type_id": 0, "pad_token": "<unk>"}
TRUNCATION = {"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer", ...])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_bos_is_added_where_transformers_adds_it(processor, tokenizer_class, tmp_path):
    found = set()
    values = ..., True, False, None, "false"
    for padding, truncation, add in product((None, PADDING), (None, TRUNCATION), values):
        if (padding or truncation) and add is not None:
            continue
        cast.write("llama2", tmp_path)
        post_processor = PROCESSORS[processor] and json.loads(PROCESSORS[processor].__getstate__())
        change(tmp_path / "tokenizer.json", padding=padding, truncation=truncation,
               post_processor=post_processor)
        change(tmp_path / "tokenizer_config.json", add_bos_token=add, tokenizer_class=tokenizer_class)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        found.add(theirs("a").input_ids[0] == theirs.bos_token_id)
        assert Tokenizer(tmp_path).adds_bos in found and len(found) == 1
    # The post-processor says it alone.
    assert found == {processor in ("template", "both ends", "bert", "roberta", "sequence")}


def test_saved_padding_and_truncation_change_no_ids(tmp_path):
    cast.write("llama2", tmp_path)
    change(tmp_path / "tokenizer.json", padding=PADDING, truncation=TRUNCATION)
    tokenizer, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Name a colour.", "a"):
        wanted = theirs(text, add_special_tokens=False).input_ids
        assert plain_ids(tokenizer, text) == wanted == tokenize([Piece(text, TEMPLATE)], tokenizer)[0]


def test_whether_bos_is_added_is_read_from_the_tokenizer(tmp_path):
    assert Tokenizer(cast.write("llama3", tmp_path / "a")).adds_bos
    assert not Tokenizer(cast.write("qwen", tmp_path / "b")).adds_bos
    assert not Tokenizer(cast.write("phi3", tmp_path / "c")).adds_bos  # has one, adds none


# ---------------------------------------------------------------- what the files call special


def test_named_tokens_are_special_even_where_the_file_forgot_to_say_so(tmp_path):
    folder = cast.write("llama3", tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer(folder)
    end = tokenizer.special["<|eot_id|>"]
    assert end in tokenizer.reference.encode("a<|eot_id|>").ids
    assert end not in tokenizer.at_start.encode("a<|eot_id|>", add_special_tokens=False).ids


def token(text: str, **flags: bool) -> dict:
    return {"content": text, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
            **flags}


def typed(text: str, **flags: bool) -> dict:
    return {"__type": "AddedToken", **token(text, **flags)}


START, END, IMAGE = "<|im_start|>", "<|im_end|>", "<image>"     # the vocabulary has the first two
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
DECODER = {str(i): token(text, special=True) for i, text in enumerate(("<unk>", "<s>", "</s>"))}


def config(**fields: object) -> dict:
    return {"tokenizer_config": {**NAMES, **fields}}


def with_map(content: dict, **fields: object) -> dict:
    return {**config(**fields), "special_tokens_map": content}


FOLDERS = {
    "no metadata": {},
    "files agree": with_map(NAMES),
    "the map goes before the config": with_map({"eos_token": END}),
    "the decoder makes the map count for nothing": with_map({"eos_token": END, "additional_special_tokens":
                                                             [START]}, added_tokens_decoder=DECODER),
    "only the map": {"special_tokens_map": {**NAMES, "unk_token": "<unk>", "pad_token": "<unk>"}},
    "null in the map": with_map({"bos_token": None}),
    "null in the config": with_map({"bos_token": "<s>"}, bos_token=None),
    "nulls everywhere": config(bos_token=None, pad_token=None, extra_special_tokens=None,
                               additional_special_tokens=None),
    "objects in the map": with_map({"eos_token": token(END, rstrip=True),
                                    "bos_token": token("<s>", lstrip=True)}),
    "objects in the config": config(eos_token=typed(END, rstrip=True), bos_token=typed("<s>")),
    "additional": config(additional_special_tokens=[START, END]),
    "additional in the map": with_map({"additional_special_tokens": [START, END]}),
    "additional in both": with_map({"additional_special_tokens": [END]}, additional_special_tokens=[START]),
    "additional null in one": with_map({"additional_special_tokens": [END]}, additional_special_tokens=None),
    "additional and extra": config(additional_special_tokens=[START], extra_special_tokens=[END]),
    "additional and extra by name": config(additional_special_tokens=[START],
                                           extra_special_tokens={"end_token": END}),
    "additional and no extra": config(additional_special_tokens=[START], extra_special_tokens=[]),
    "additional as objects": config(additional_special_tokens=[typed(START, lstrip=True)]),
    "extra": config(extra_special_tokens=[START, END]),
    "extra by name": config(extra_special_tokens={"image_token": IMAGE, "start": START}),
    "extra in the map": with_map({"extra_special_tokens": [START, token(END)]}, extra_special_tokens=[START]),
    "extra by name in the map": with_map({"extra_special_tokens": {"end_token": END}}, image_token=IMAGE),
    "names of its own": config(image_token=IMAGE, add_bos_token="true", some_token=None, use_token=True),
    "names of its own as objects": config(image_token=typed(START)),
    "names of its own in the map": with_map({"image_token": START, "end_token": token(END, rstrip=True)}),
    "model specific": config(model_specific_special_tokens={"image_token": START}),
    "model specific, and a name": config(end_token=END, model_specific_special_tokens={"image_token": START}),
    "the other names": config(sep_token=START, cls_token=END, mask_token="<mask>"),
    "only the decoder": config(added_tokens_decoder={**DECODER, "700": token(START, special=True),
                                                     "701": token(END, special=False)}),
    "the decoder's flags": config(added_tokens_decoder={"2": token("</s>", special=True, rstrip=True),
                                                        "700": token(END, special=True, lstrip=True)}),
    "the decoder beyond the vocabulary": config(added_tokens_decoder={
        **DECODER, "2000": token("<new>", special=True), "1000": token("<newer>", special=True)}),
    "named, not special in the decoder": config(eos_token=END, added_tokens_decoder={
        **DECODER, "700": token(END, special=False)}),
    "added_tokens.json": {**config(additional_special_tokens=["<new>"]),
                          "added_tokens": {"<new>": 5001, "<newer>": 5000, START: 700}},
    "added_tokens.json with a name": {**config(eos_token="<new>"),
                                      "added_tokens": {"<new>": 5001, "</s>": 2}},
    "padding beyond the vocabulary": config(pad_token="[PAD]"),
    "saved padding": {**config(), "tokenizer": {"padding": PADDING}},
    "saved padding, null in the config": {**config(pad_token=None), "tokenizer": {"padding": PADDING}},
    "ids that contradict the vocabulary": {**config(), "tokenizer": {"added_tokens": [
        {"id": 5, **token("</s>", special=True)}, {"id": 900, **token("<new>", special=True)},
        {"id": 950, **token("<newer>", special=False)}]}},
    "named, not special in tokenizer.json": {**config(additional_special_tokens=[START]), "tokenizer": {
        "added_tokens": [{"id": 2, **token("</s>", special=False)},
                         {"id": 700, **token(START, special=False)}]}},
}


def write_files(folder: Path, files: dict) -> Path:
    spec = json.loads(cast.build("llama2").to_str())
    for text in (START, END, "<mask>", "<|endoftext|>", "<bos>", "<pad>"):
        spec["model"]["vocab"][text] = len(spec["model"]["vocab"])
    files = {"tokenizer_config": {}, **files, "tokenizer": {**spec, **files.get("tokenizer", {})}}
    files["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast", **files["tokenizer_config"]}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("files", FOLDERS)
def test_special_tokens_are_those_that_transformers_finds(files, tmp_path):
    ours = Tokenizer(write_files(tmp_path, FOLDERS[files]))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.named_tokens == theirs.special_tokens_map
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert {*ours.named_tokens.values(), *ours.extra_tokens} == set(theirs.all_special_tokens)
    special = {entry.content: i for i, entry in theirs.added_tokens_decoder.items() if entry.special}
    assert ours.special == special | dict(zip(theirs.all_special_tokens, theirs.all_special_ids))
    for text in ("a <|im_start|> b<|im_end|>  c</s> d", "<s>a <image> <new><newer> [PAD]<mask>\n e </s>"):
        assert plain_ids(ours, text) == theirs(text, add_special_tokens=False).input_ids


def test_chatml_fits_a_tokenizer_whose_metadata_alone_calls_its_tokens_special(tmp_path):
    write_files(tmp_path, config())
    with pytest.raises(ValueError, match="no special token"):
        load_template("chatml", Tokenizer(tmp_path))
    write_files(tmp_path, config(additional_special_tokens=[START, END]))
    assert load_template("chatml", Tokenizer(tmp_path)).end_of_turn == END


def test_a_name_that_is_not_text_is_refused(tmp_path):
    for fields, message in (
            (dict(eos_token=["</s>"]), r"eos_token in .* is \['</s>'\]; a token must be text"),
            (dict(eos_token={"lstrip": True}), "eos_token in .* is {'lstrip': True}; a token"),
            (dict(additional_special_tokens=[7]), "extra_special_tokens in .* is 7; a token")):
        write_files(tmp_path, config(**fields))
        with pytest.raises(ValueError, match=message):
            Tokenizer(tmp_path)


@pytest.mark.parametrize("file, content, message", [
    ("tokenizer.json", "{", "tokenizer.json: is not JSON"), ("tokenizer.json", "[]", "not an object"),
    ("tokenizer.json", "{}", "tokenizer.json: "),
    ("special_tokens_map.json", "[1]", "map.json: .* not an object"),
    ("tokenizer_config.json", "\xff", "tokenizer_config.json: 'utf-8'"),
])
def test_a_broken_file_is_named(file, content, message, tmp_path):
    write_files(tmp_path, config())
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path)


def test_a_token_that_takes_whitespace_on_its_left_takes_what_transformers_lets_it_take(tmp_path):
    """Python's str.isspace() counts \\x1c to \\x1f, the tokenizers library does not."""
    write("llama3", tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["lstrip"] = token["content"] == "<|eot_id|>"
    change(tmp_path / "tokenizer.json", added_tokens=spec["added_tokens"])
    tokenizer, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("red \n", "red\x1c", "red \x1f", "red\u3000\u2028", "\x1d", " "):
        pieces = [Piece(text, TEMPLATE), Piece("<|eot_id|>", TEMPLATE, special=True)]
        expected = theirs(text + "<|eot_id|>", add_special_tokens=False).input_ids
        assert tokenize(pieces, tokenizer)[0] == expected


def test_text_that_a_tokenizer_cannot_encode_is_named_with_its_record(tmp_path):
    write("unigram", tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    change(tmp_path / "tokenizer.json", model={**spec["model"], "unk_id": None})
    tokenizer = Tokenizer(tmp_path)
    (tmp_path / "x.jsonl").write_text("".join(
        json.dumps({"prompt": text, "completion": "a"}) + "\n" for text in ("red", "\u4e00")))
    with pytest.raises(ValueError, match="x.jsonl:2: .*tokenizer.json: "):
        load_dataset([tmp_path / "x.jsonl"], tokenizer, load_template("plain", tokenizer), 99, "error",
                     tmp_path / "cache")


def test_a_token_that_a_normalizer_puts_before_the_text_has_the_kind_of_the_first_character(tmp_path):
    folder = write("llama2", tmp_path)
    change(folder / "tokenizer.json",
           normalizer={"type": "Replace", "pattern": {"Regex": "^"}, "content": "12"}, pre_tokenizer=None)
    tokenizer = Tokenizer(folder)
    ids, kinds = tokenize([Piece("a", COMPLETION), Piece("b", TEMPLATE)], tokenizer)
    assert tokenizer.decode(ids) == "12ab" and kinds == [COMPLETION, COMPLETION, COMPLETION, TEMPLATE]


def test_a_tokenizer_that_gives_random_ids_is_refused(tmp_path):
    write("llama3", tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    change(tmp_path / "tokenizer.json", model={**spec["model"], "dropout": 0.1})
    with pytest.raises(ValueError, match="tokenizer.json: model.dropout is 0.1"):
        Tokenizer(tmp_path)


def test_defaults_of_classes_are_those_of_transformers(tmp_path):
    for name, defaults in CLASS_DEFAULTS.items():
        theirs = getattr(transformers, name)
        signature = inspect.signature(theirs.__init__).parameters
        named = {key: value.default for key, value in signature.items()
                 if key.endswith("_token") and isinstance(value.default, str)}
        assert {"padding_side": "right", **defaults} == {**named, "padding_side": theirs.padding_side}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "GPT2Tokenizer", "PreTrainedTokenizerFast",
                                             ...])
def test_names_that_a_class_supplies_are_taken_where_the_vocabulary_has_them(tokenizer_class, model_type,
                                                                             tmp_path):
    write_files(tmp_path, {})
    change(tmp_path / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert Tokenizer(tmp_path).named_tokens == theirs.special_tokens_map


def test_names_that_a_class_supplies_add_nothing_to_the_vocabulary(tmp_path):
    write_files(tmp_path, {"tokenizer_config": {"tokenizer_class": "GPTNeoXTokenizerFast"}})
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_token == "<|endoftext|>" and "pad_token" not in tokenizer.named_tokens
    assert "<|padding|>" not in tokenizer.special


# ---------------------------------------------------------------- the exported folder


def export(source: Path, folder: Path, template: str = "plain", rows: int = 10_000, **raw: object
           ) -> Tokenizer:
    """Write the tokenizer's part of final/; returns the tokenizer that was trained with."""
    tokenizer = Tokenizer(source)
    folder.mkdir()
    loaded = load_template(template, tokenizer)
    tokenizer_files.write_tokenizer(folder, tokenizer, loaded.source, loaded.end_of_turn,
                                    {**raw, "vocab_size": rows})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return tokenizer


CLASSES = ["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer",
           "GemmaTokenizer", ...]


@pytest.mark.parametrize("name", [*cast.CAST, *cast.OTHERS])
def test_the_exported_folder_is_tokenized_as_it_was_trained(name, tmp_path):
    for number, tokenizer_class in enumerate(CLASSES):
        source, folder = write(name, tmp_path / f"source-{number}"), tmp_path / f"final-{number}"
        change(source / "tokenizer_config.json", tokenizer_class=tokenizer_class, legacy=False,
               add_bos_token=True, add_prefix_space=True, sp_model_kwargs={}, split_special_tokens=True)
        (source / "config.json").write_text('{"model_type": "llama"}')
        ours = export(source, folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        special = "".join(f" a{text} b" for text in ours.special)
        for text in (*TEXTS, special, special.replace(" ", "")):
            assert theirs(text, add_special_tokens=False).input_ids == plain_ids(ours, text)
        assert (theirs("a").input_ids[0] == theirs.bos_token_id) == ours.adds_bos
        assert theirs.special_tokens_map == ours.named_tokens
        again = Tokenizer(folder)
        assert (again.special, again.named_tokens, again.adds_bos, again.added_tokens) == (
            ours.special, ours.named_tokens, ours.adds_bos, ours.added_tokens)


@pytest.mark.parametrize("files", FOLDERS)
def test_the_exported_files_agree_on_special_tokens(files, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "final"
    source.mkdir()
    ours = Tokenizer(write_files(source, FOLDERS[files]))
    if not ours.eos_token:
        change(source / "tokenizer_config.json", eos_token="</s>")
        ours = Tokenizer(source)
    export(source, folder)
    theirs, before = map(transformers.AutoTokenizer.from_pretrained, (folder, source))
    assert theirs.special_tokens_map == before.special_tokens_map == ours.named_tokens
    assert set(theirs.all_special_tokens) == set(before.all_special_tokens)
    assert theirs.get_added_vocab() == before.get_added_vocab()
    # Each file says it by itself, for programs that read one of them only.
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in (
        "added_tokens", "special_tokens_map", "tokenizer", "tokenizer_config")}
    assert read["added_tokens"] == before.get_added_vocab()
    added = {entry["content"]: entry["id"] for entry in read["tokenizer"]["added_tokens"]}
    assert added == read["added_tokens"]
    for name in ("special_tokens_map", "tokenizer_config"):
        assert {key: read[name][key] for key in NAMED if read[name].get(key)} == {
            key: text for key, text in before.special_tokens_map.items() if key in NAMED}


def test_what_changes_no_ids_is_exported_and_what_only_the_old_class_knew_is_written_out(tmp_path):
    source = cast.write("llama2", tmp_path / "source")
    (source / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "model_max_length": 77,
         "add_prefix_space": True, "clean_up_tokenization_spaces": True,
         "auto_map": {"AutoTokenizer": ["a.B", None]}}))
    export(source, tmp_path / "final")
    written = json.loads((tmp_path / "final" / "tokenizer_config.json").read_text())
    assert written.pop("chat_template")
    assert written == {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 77,
                       "padding_side": "left", "clean_up_tokenization_spaces": True, "bos_token": "<s>",
                       "eos_token": "</s>", "unk_token": "<unk>"}


def test_a_space_in_front_that_tokenizer_json_adds_is_named_for_transformers_4(tmp_path):
    source = cast.write("llama3", tmp_path / "source")
    for i, space in enumerate((True, False)):
        change(source / "tokenizer.json", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": space,
                                                         "trim_offsets": True, "use_regex": True})
        export(source, tmp_path / f"{i}")
        assert json.loads((tmp_path / f"{i}/tokenizer_config.json").read_text())["add_prefix_space"] is space


@pytest.mark.parametrize("template, before, config_json, wanted", [
    # the template's end of turn goes before the checkpoint's own ends
    ("chatml", None, {"eos_token_id": 2}, {"eos_token_id": [3, 2], "bos_token_id": 1}),
    ("plain", None, {"eos_token_id": 2}, {"eos_token_id": 2, "bos_token_id": 1}),
    ("plain", None, {}, {"eos_token_id": 2, "bos_token_id": 1}),
    ("chatml", {"eos_token_id": [4, 3], "temperature": 0.5}, {"eos_token_id": 9},
     {"eos_token_id": [4, 3], "bos_token_id": 1, "temperature": 0.5}),
    # null is as good as absent; a BOS that is not the tokenizer's was not trained
    ("plain", {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}, {"eos_token_id": [2, 7]},
     {"eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": None}),
    ("plain", {"bos_token_id": 5, "pad_token_id": 6}, {}, {"eos_token_id": 2, "bos_token_id": 1,
                                                            "pad_token_id": 6}),
])
def test_generation_begins_and_ends_with_the_trained_tokens(template, before, config_json, wanted, tmp_path):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for pad, padding, rows in ((None, {}, 99), ("<unk>", {"pad_token_id": 0}, 99), ("[PAD]", {}, 99)):
        source = tmp_path / f"source-{pad}"
        source.mkdir()
        words = ["<unk>", "<s>", "</s>", END, START, *(f"w{i}" for i in range(5, 99))]
        spec = {"version": "1.0", "added_tokens": [], "model": {
            "type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"}}
        (source / "tokenizer.json").write_text(json.dumps(spec))
        (source / "tokenizer_config.json").write_text(json.dumps(
            {**names, "pad_token": pad, "additional_special_tokens": [START, END]}))
        if before is not None:
            (source / "generation_config.json").write_text(json.dumps(before))
        export(source, tmp_path / f"final-{pad}", template, rows, **config_json)
        written = json.loads((tmp_path / f"final-{pad}" / "generation_config.json").read_text())
        assert written == {**wanted, **(padding if wanted.get("pad_token_id") is None else {})}


# ---------------------------------------------------------------- ids and the embedding


@pytest.fixture(scope="module")
def padded(tmp_path_factory) -> Path:
    """A checkpoint whose tokenizer has a special token, <spare 4>, one beyond the embedding's rows."""
    folder = tiny.setup(tmp_path_factory.mktemp("padded"), 6)
    rows = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    change(folder / "model" / "tokenizer_config.json", pad_token="[PAD]", additional_special_tokens=[
        f"<spare {i}>" for i in range(5)])
    assert max(Tokenizer(folder / "model").special.values()) == rows
    return folder


def test_a_token_beyond_the_embedding_that_is_never_used_is_accepted(padded):
    assert tiny.run_here(tiny.arguments(padded, "run", epochs=1, eval_data=[padded / "train.jsonl"])) == 0
    final, source = Tokenizer(padded / "run" / "final"), Tokenizer(padded / "model")
    assert final.special["<spare 4>"] == source.special["<spare 4>"]
    (padded / "writes.jinja").write_text(TEMPLATES["llama3"].read_text() + "<spare 4>")
    with pytest.raises(ValueError, match=r"--template \S+/writes.jinja writes '<spare 4>', token \d+, but"):
        tiny.run_here(tiny.arguments(padded, "writes", template=padded / "writes.jinja"))


def test_a_record_with_a_token_beyond_the_embedding_is_named(padded, capsys):
    """As plain text, [PAD] cannot come up; an added token that is not special can."""
    change(padded / "model" / "tokenizer.json", added_tokens=[
        *json.loads((padded / "model" / "tokenizer.json").read_text())["added_tokens"],
        {"id": 10**6, **token("<beyond>", special=False)}])
    rows = json.loads((padded / "model" / "config.json").read_text())["vocab_size"]
    change(padded / "model" / "config.json", vocab_size=rows - 5)
    save_file({name: x[:rows - 5].clone() if "embed" in name else x for name, x in weights(
        padded / "model").items()}, padded / "model" / "model.safetensors")
    good, bad = (padded / "train.jsonl").read_text(), json.dumps({"prompt": "a <beyond>", "completion": "b"})
    (padded / "bad.jsonl").write_text(good + bad + "\n" + bad + "\n")
    message = f"bad.jsonl:7: holds '<beyond>', token {rows - 5}, but the embedding has only {rows - 5} rows"
    for flags in (dict(train_data=padded / "bad.jsonl"), dict(eval_data=[padded / "bad.jsonl"])):
        with pytest.raises(ValueError, match=message):
            train.main(tiny.arguments(padded, "bad", **flags))
        assert not (padded / "bad").exists()
    tokenizer = Tokenizer(padded / "model")
    template = load_template("llama3", tokenizer)
    check_vocabulary(rows - 5, tokenizer, template)
    last = tokenizer.special["<|eot_id|>"]
    check_vocabulary(last + 1, tokenizer, template)
    message = rf"--template llama3 writes '<\|eot_id\|>', token {last}, but the .* {last} rows"
    with pytest.raises(ValueError, match=message):
        check_vocabulary(last, tokenizer, template)


def test_held_out_loss_names_the_record_of_a_token_beyond_the_embedding(tmp_path):
    folder = tiny.setup(tmp_path, 3)
    tokenizer = Tokenizer(folder / "model")
    template = load_template("llama3", tokenizer)
    dataset = load_dataset([folder / "train.jsonl"], tokenizer, template, 99, "drop", tmp_path / "cache")
    largest = int(dataset.ids.max())
    loaded = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(vocab_size=largest)),
                             tokenizer=tokenizer, template=None)
    with pytest.raises(ValueError, match=f"train.jsonl:1: holds '<.eot_id.>', token {largest}, but"):
        spans.evaluate(loaded, [dataset], SimpleNamespace(data=["train.jsonl"]))
    first = tokenizer.special["<|begin_of_text|>"]      # where an example begins, it is that example's
    with pytest.raises(ValueError, match=f"train.jsonl:1: holds '<.begin_of_text.>', token {first}, but"):
        check_embedding(dataset, first, tokenizer)


def test_evaluation_names_a_token_beyond_the_embedding_too(tmp_path):
    model = load_model(tiny.make_model(tmp_path), "cpu")
    rows = model.config.vocab_size
    with pytest.raises(ValueError, match=f"token {rows}, but the embedding has only {rows} rows"):
        generate.generate(Engine(model), [[1, 2], [3, rows, 4]], {0}, 2)
    for request in (([1, rows], [2]), ([1, 2], [rows])):
        with pytest.raises(ValueError, match=f"token {rows}, but the embedding has only {rows} rows"):
            list(likelihood.log_likelihoods(model, [([1], [2]), request]))
