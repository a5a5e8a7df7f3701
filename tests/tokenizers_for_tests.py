"""Tiny tokenizers with the habits of real ones, trained in a moment on the text below and written as Hugging
Face folders, so that tests need neither downloads nor large files.

  name      model                                  adds BOS  what it is here for
  llama2    SentencePiece-like BPE, byte fallback  yes       invents a space at the start of every run of text
  mistral   the same vocabulary, Metaspace         yes       ... only where a text starts; [INST] is special
  phi3      as llama2                              no        special tokens swallow the whitespace behind them
  gemma     the same vocabulary                    yes       invents no space
  llama3    byte-level BPE                         yes       its post-processor trims spaces off offsets
  qwen      byte-level BPE, NFC                    no        no BOS at all; added tokens that are not special
"""
import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordLevelTrainer, WordPieceTrainer

DATE = "2026-01-05"     # a Monday, on which templates that print the date are rendered

# Merges must cross what is easily taken for a boundary: a full stop and the newlines behind it, a space and
# the word behind it, a bracket and the word before it.
TEXT = """Name a colour. Red is a colour.

Name a fruit. A plum is a fruit.

And another? A pear, and another: a fig.

### Instruction:
What is the weather in a town by the sea?

### Response:
It is 21 degrees and sunny.

<|user|>
Be brief. Say hello to the world.
<|assistant|>
Hello, world!
<|im_start|>user
Where is the café? Où est la gare?<|im_end|>
<|im_start|>assistant
The café is by the station.<|im_end|>
[INST] <<SYS>>
Be brief.
<</SYS>>

Name a colour. [/INST] Red. [INST] And a fruit? [/INST] A plum. """

# {name: (bos_token, eos_token, adds BOS, special tokens, added tokens that are not special)}
CAST = {
    "llama2": ("<s>", "</s>", True, ["<unk>", "<s>", "</s>"], []),
    "mistral": ("<s>", "</s>", True, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], []),
    "phi3": ("<s>", "<|endoftext|>", False,
             ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
             []),
    "gemma": ("<bos>", "<eos>", True, ["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], []),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", True,
               ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                "<|eot_id|>"], []),
    "qwen": (None, "<|im_end|>", False, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
             ["<think>", "</think>", "<tool_response>", "</tool_response>"]),
}
SENTENCEPIECE = ("llama2", "mistral", "phi3", "gemma")
SWALLOWING = {"phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Words, numbers, punctuation with its newlines, newlines, spaces: how byte-level tokenizers split nowadays.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@cache
def _trained(byte_level: bool) -> tuple[list[str], list[tuple[str, str]]]:
    """(symbols in the order of their ids, merges)."""
    tokenizer = Tokenizer(models.BPE())
    alphabet = []
    if byte_level:
        tokenizer.pre_tokenizer = _byte_level_split()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.train_from_iterator([" " + part for part in TEXT.split("?")] * 2, BpeTrainer(
        vocab_size=620, min_frequency=2, initial_alphabet=alphabet, max_token_length=8, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def _byte_level_split():
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@cache
def build(name: str) -> Tokenizer:
    bos, _, adds_bos, special, added = CAST[name]
    symbols, merges = _trained(name not in SENTENCEPIECE)
    if name in SENTENCEPIECE:
        symbols = special + BYTES + symbols
        vocab = {symbol: index for index, symbol in enumerate(symbols)}
        assert len(vocab) == len(symbols)
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        space = [] if name == "gemma" else [decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *space])
        if name == "mistral":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        else:
            prepend = [] if name == "gemma" else [normalizers.Prepend("▁")]
            tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        processor = []
    else:
        tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, merges))
        tokenizer.pre_tokenizer = _byte_level_split()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.normalizer = normalizers.NFC() if name == "qwen" else None
        processor = [processors.ByteLevel(trim_offsets=name == "llama3")]
    swallowing = SWALLOWING.get(name, ())
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=text in swallowing) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    if adds_bos:
        processor.append(processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))]))
    if processor:
        tokenizer.post_processor = processors.Sequence(processor) if len(processor) > 1 else processor[0]
    return tokenizer


def write(name: str, folder: Path, chat_template: str | None = None) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and, if given, chat_template.jinja; returns the folder."""
    bos, eos, *_ = CAST[name]
    folder.mkdir(parents=True, exist_ok=True)
    build(name).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "model_max_length": 4096, "eos_token": eos} | ({"bos_token": bos} if bos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return folder


# Tokenizers whose vocabulary itself holds the special tokens, so that plain text can find them there.
SPELLED = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
OTHERS = ("unigram", "unigram_nfkc", "wordlevel", "wordpiece", "bpe_ignore_merges", "bpe_merges")


@cache
def build_other(name: str) -> Tokenizer:
    special = list(SPELLED)
    split_at_spaces = pre_tokenizers.WhitespaceSplit()
    if name.startswith("unigram"):
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC() if name == "unigram_nfkc" else None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="first")
        trainer = UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>",
                                 initial_alphabet=list("<>/|_0123456789"), show_progress=False)
    elif name == "wordlevel":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), split_at_spaces
        trainer = WordLevelTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    elif name == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), split_at_spaces
        tokenizer.decoder = decoders.WordPiece()
        trainer = WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(ignore_merges=name == "bpe_ignore_merges"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), split_at_spaces
        trainer = BpeTrainer(vocab_size=260, special_tokens=special, show_progress=False, min_frequency=2)
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    if name == "bpe_merges":    # "</s>" is what the letters merge to, and a part of a longer piece
        spec = json.loads(tokenizer.to_str())
        size = len(spec["model"]["vocab"])
        spec["model"]["vocab"] |= {"</": size, "s>": size + 1, "</s>.": size + 2}
        spec["model"]["merges"][:0] = [["<", "/"], ["s", ">"], ["</", "s>"], ["</s>", "."]]
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


def write_other(name: str, folder: Path) -> Path:
    """As write(), for one of OTHERS."""
    folder.mkdir(parents=True, exist_ok=True)
    build_other(name).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return folder
