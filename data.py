"""Records -> messages -> spans -> token cache -> step plan -> packed batches.

    python data.py --model FOLDER --train-data FILE... [--template NAME] [--show 3] [--export OUT.jsonl]

prints what a training run would see: tokens per span, what is dropped or cut and why, how well steps pack,
and examples coloured by span.

Two things differ from the usual way. Spans are made by construction: a chat template is rendered around
sentinels and split at them, so no marker is ever searched for in token ids and no prompt is assumed to be a
token prefix. And a step is a set of *examples*; packing happens inside it, so packing can change the speed of
a run and nothing else.

Shapes: E examples, N packed tokens of a micro-batch, K kinds of span.
"""
import argparse
import gzip
import hashlib
import heapq
import io
import json
import os
import re
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date as Date, datetime
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np
import tokenizers
import torch

from files import checksum, commit, delete_left, writing

KINDS = ("template", "system", "instruction", "completion", "context")
TEMPLATE, SYSTEM, INSTRUCTION, COMPLETION, CONTEXT = range(len(KINDS))
ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": INSTRUCTION, "tool": INSTRUCTION,
         "function": INSTRUCTION, "ipython": INSTRUCTION, "assistant": COMPLETION}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}

CACHE_DIR = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "spantune")

# ---------------------------------------------------------------- records -> messages


def read_records(path: str | Path) -> Iterator[tuple[list[dict], int]]:
    """Yield (messages, line) for every record of a .jsonl, .json or .jsonl.gz file; line counts from 1
    (in a .json list: the record's number). messages is [{"role", "content"}, ...],
    with "weight": 0 where the record has it.

        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
        {"prompt": "Hi", "completion": "Hello"}
        {"instruction": "Translate.", "input": "Hi", "output": "Salut"}      user: "Translate.\\n\\nHi"
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}

    A bad record is a ValueError with file, line and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not path.name.endswith((".jsonl", ".json", ".jsonl.gz")):
        raise ValueError(f"{path}: unknown file type; records are read from .jsonl, .json and .jsonl.gz")
    line = 0
    try:
        if path.suffix == ".json":
            records = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(records, list):
                raise ValueError(f"holds a JSON {type(records).__name__}, not a list of records; "
                                 "one record a line goes into a .jsonl file")
            for line, record in enumerate(records, 1):
                yield to_messages(record), line
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                for line, raw in enumerate(file, 1):
                    text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                    if text.strip():
                        yield to_messages(json.loads(text)), line
    except (ValueError, OSError, EOFError) as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"{path}{f':{line}' if line else ''}: {error}") from None


def to_messages(record: dict) -> list[dict]:
    """One record in any of the four layouts -> its messages; ValueError says what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, not {type(record).__name__}")
    for field in ("tools", "history"):
        if record.get(field):
            raise ValueError(f"{field!r} would not be trained as it is served: "
                             "write it into the messages instead")
    if "messages" in record:
        messages = record["messages"]
    elif "conversations" in record:
        turns = record["conversations"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("'conversations' must be a list of {\"from\", \"value\"} objects")
        messages = [{**turn, "role": SHAREGPT_ROLES.get(turn.get("from"), turn.get("from")),
                     "content": turn.get("value")} for turn in turns]
    elif "prompt" in record and "completion" in record:
        messages = [{"role": "user", "content": record["prompt"]},
                    {"role": "assistant", "content": record["completion"]}]
    elif "instruction" in record and "output" in record:
        parts = [record["instruction"], record.get("input") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("'instruction' and 'input' must be text")
        messages = [{"role": "user", "content": "\n\n".join(filter(None, parts))},
                    {"role": "assistant", "content": record["output"]}]
    else:
        raise ValueError("has none of the known layouts: 'messages', 'conversations', "
                         "'prompt' + 'completion', 'instruction' + 'output'; "
                         f"its fields are {', '.join(map(repr, record)) or 'none'}")
    if not isinstance(messages, list) or not messages:
        raise ValueError("holds no messages")
    if record.get("system") and not any(isinstance(m, dict) and m.get("role") == "system" for m in messages):
        messages = [{"role": "system", "content": record["system"]}, *messages]
    return [_message(message, number) for number, message in enumerate(messages, 1)]


def _message(message: dict, number: int) -> dict:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} must be an object with 'role' and 'content'")
    role, content, weight = message.get("role"), message.get("content"), message.get("weight", 1)
    if role not in ROLES:
        raise ValueError(f"message {number} has the unknown role {role!r}; known are {', '.join(ROLES)}")
    for field in ("tool_calls", "function_call", "reasoning_content", "thinking"):
        if message.get(field):
            raise ValueError(f"message {number} has {field!r}, which this trainer does not render: "
                             "write what the model should say into 'content'")
    if not isinstance(content, str):
        raise ValueError(f"message {number} ({role}) has no text: 'content' is {type(content).__name__}")
    if weight not in (0, 1):
        raise ValueError(f"message {number} has the weight {weight!r}; it must be 0 or 1")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise ValueError(f"message {number} ({role}) holds half a surrogate pair, "
                         "which is not text") from None
    return {"role": role, "content": content, **({"weight": 0} if weight == 0 else {})}


# ---------------------------------------------------------------- messages -> pieces

# `{{ bos_token }}` is taken out where the tokenizer adds no BOS itself. tulu is the paper's;
# like the paper's code it trims contents. plain joins prompt and completion as that code does:
# with a space, unless either has whitespace there.
TEMPLATES = {
    "tulu": """{{ bos_token }}{% for message in messages %}\
{{ '<|' + message['role'] + '|>\n' + message['content'] | trim }}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\
{% if message['role'] != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}\
{% if messages and messages[-1]['role'] == 'assistant' %}{{ '\n' }}{% endif %}\
{{ '<|assistant|>\n' }}{% endif %}""",
    "chatml": """{{ bos_token }}{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama2": """{% set state = namespace(system='') %}{% for message in messages %}\
{% if message['role'] == 'system' %}\
{% if not loop.first %}\
{{ raise_exception('llama2: only the first message can be a system message') }}{% endif %}\
{% set state.system = '<<SYS>>\n' + message['content'] | trim + '\n<</SYS>>\n\n' %}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}\
{% else %}{{ bos_token }}{{ '[INST] ' + state.system + message['content'] | trim + ' [/INST]' }}\
{% set state.system = '' %}{% endif %}{% endfor %}""",
    "llama3": """{{ bos_token }}{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' \
+ message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "alpaca": """{{ bos_token }}{% if messages and messages[0]['role'] != 'system' %}\
{{ 'Below is an instruction that describes a task. \
Write a response that appropriately completes the request.' }}\
{% endif %}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\
{% elif message['role'] == 'assistant' %}{{ '\n\n### Response:\n' + message['content'] + eos_token }}\
{% else %}{{ '\n\n### Instruction:\n' + message['content'] }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}""",
    "plain": """{{ bos_token }}{% set space = [' ', '\n', '\t'] %}{% for message in messages %}\
{% if message['role'] == 'assistant' %}{% if not loop.first and loop.previtem['role'] != 'assistant' \
and loop.previtem['content'][-1:] not in space and message['content'][:1] not in space %}{{ ' ' }}{% endif %}\
{{ message['content'] + eos_token }}{% else %}{{ message['content'] }}{% endif %}{% endfor %}""",
}


class Piece(NamedTuple):
    """A stretch of rendered text and its kind; special: a special token that the template wrote,
    put in by id."""
    text: str
    kind: int
    special: bool = False


@dataclass(frozen=True)
class Template:
    """A Jinja chat template with what it needs from a tokenizer.
    `source` is what gets exported with the model."""
    name: str
    source: str
    tokens: dict[str, str]      # bos_token, eos_token, ... as the template sees them
    special: tuple[str, ...]    # every special token's text
    date: str                   # YYYY-MM-DD, what strftime_now prints
    end_of_turn: str = ""       # the special token that ends an assistant's message

    @property
    def uses_date(self) -> bool:
        return "strftime_now" in self.source

    def __call__(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Render as transformers' apply_chat_template does.
        ValueError with the template's own words if it refuses."""
        now = datetime.fromisoformat(self.date)
        try:
            return _compile(self.source).render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                strftime_now=now.strftime, **self.tokens)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"template {self.name}, line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise ValueError(f"template {self.name} refuses the messages: {error}") from None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` blocks mark assistant text for transformers; spans come from sentinels here:
    just the body."""
    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(lineno)


_compiled: dict[str, jinja2.Template] = {}


def _compile(source: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: object, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple | None = None, sort_keys: bool = False) -> str:  # jinja's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    if source not in _compiled:
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(  # a template is foreign code
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        env.filters["tojson"] = tojson
        env.globals["raise_exception"] = raise_exception
        _compiled[source] = env.from_string(source)
    return _compiled[source]


def load_template(name: str, tokenizer: "Tokenizer", date: str | None = None) -> Template:
    """name: auto (the checkpoint's own; without one a ValueError), a key of TEMPLATES,
    or a .jinja file's path.

    date: YYYY-MM-DD for templates that print today's date; default today.
    ValueError if there is no such template, or if it ends an assistant's message with no special token:
    a model trained so could never learn to stop.
    """
    if name == "auto":
        source = tokenizer.chat_template
        if source is None:
            raise ValueError(f"--template auto: {tokenizer.folder} has no chat template; choose one of "
                             f"{', '.join(TEMPLATES)} or give a .jinja file")
    elif name in TEMPLATES:
        source = TEMPLATES[name] if tokenizer.adds_bos else TEMPLATES[name].replace("{{ bos_token }}", "")
    elif name.endswith(".jinja") and Path(name).is_file():
        source = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(f"--template {name}: neither auto, nor one of {', '.join(TEMPLATES)}, "
                         "nor a .jinja file")
    try:
        date = Date.fromisoformat(date).isoformat() if date else Date.today().isoformat()
    except ValueError:
        raise ValueError(f"--date {date}: write it as YYYY-MM-DD") from None
    template = Template(name, source, tokenizer.named_tokens, tuple(tokenizer.special), date)
    probe = render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], template)
    ends = [piece.text for piece in probe if piece.special and piece.kind == COMPLETION]
    if not ends:
        raise ValueError(
            f"--template {name} writes no special token of this tokenizer after an assistant's message, "
            "so the model could not learn to stop; end it with {{ eos_token }} or use a template that fits "
            f"{tokenizer.folder}")
    return replace(template, end_of_turn=ends[0])


def render(messages: list[dict], template: Template, add_generation_prompt: bool = False) -> list[Piece]:
    """Messages -> pieces; their texts joined are exactly what the template renders.
    add_generation_prompt: with the header of the answer to come, as for generation.

        tulu, [user "2+2?", assistant "4"]:
        [("<|user|>\\n", TEMPLATE), ("2+2?", INSTRUCTION), ("\\n<|assistant|>\\n", TEMPLATE),
         ("4", COMPLETION), ("</s>", COMPLETION, special)]

    After an assistant's content all that the model must write to end its turn, up to and with the first
    special token, is COMPLETION. ValueError if the template refuses the messages, or if its text cannot be
    taken apart into them (it drops, repeats or rewrites a message): better no example than a wrong mask.
    """
    shown = [{"role": m["role"], "content": m["content"]} for m in messages]
    parts = _take_apart(shown, template, add_generation_prompt)
    pieces: list[Piece] = []
    previous = None  # the message before this literal
    for i, (literal, message) in enumerate(zip(parts[::2], [*messages, None])):
        ends_turn = previous is not None and previous["role"] == "assistant"
        own = CONTEXT if ends_turn and previous.get("weight") == 0 else COMPLETION
        pieces += _split_special(literal, own if ends_turn else TEMPLATE, template.special)
        if message is not None and parts[2 * i + 1] is not None:
            kind = CONTEXT if message.get("weight") == 0 else ROLES[message["role"]]
            pieces.append(Piece(parts[2 * i + 1], kind))
            previous = message
    return [piece for piece in pieces if piece.text]


def _split_special(literal: str, kind: int, special: tuple[str, ...]) -> list[Piece]:
    """Template text -> pieces, special tokens apart; up to and with the first one they are of `kind`."""
    tokens = _special_pattern(special).split(literal) if special else [literal]
    if len(tokens) == 1:
        kind = TEMPLATE
    return [Piece(token, kind if i < 2 else TEMPLATE, special=i % 2 == 1) for i, token in enumerate(tokens)]


def _special_pattern(special: tuple[str, ...]) -> re.Pattern:
    return re.compile(  # re caches
        "(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")


def _take_apart(messages: list[dict], template: Template, add_generation_prompt: bool) -> list[str | None]:
    """The rendered text as [literal, content, literal, content, ..., literal], one content a message, None
    for an empty one that the template asks for and leaves out."""
    text = template(messages, add_generation_prompt)
    contents = [m["content"] for m in messages]
    mark = "\ue000"
    while mark in "".join(contents) + template.source:
        mark += "\ue000"
    error = ""

    def skeleton(edges: int, empty: bool) -> list[str] | None:
        """The literals around sentinels that have `edges` times the whitespace of the contents' edges."""
        nonlocal error
        rest, literals, sentinels = "", [], []
        for i, content in enumerate(contents):
            lead = content[:len(content) - len(content.lstrip())]
            tail = content[len(content.rstrip()):]
            sentinels.append(f"{lead * edges}{mark}\ue001{i}\ue002{tail * edges}" if content or empty else "")
        try:
            rest = template([{**m, "content": x} for m, x in zip(messages, sentinels)], add_generation_prompt)
        except ValueError as refusal:
            error = error or str(refusal)
            return None
        for message, sentinel in zip(messages, sentinels):
            literal, found, rest = rest.partition(sentinel) if sentinel else ("", "yes", rest)
            if not found:
                error = error or f"template {template.name} leaves out the {message['role']} message"
                return None
            literals.append(literal)
        literals.append(rest)
        return literals if mark not in "".join(literals) else None

    for empty in (True, False):
        # Contents as they are: the edges are the contents' own if twice of them changes nothing else.
        # Templates may look at them (`plain` does), so the sentinels have them.
        literals = skeleton(1, empty)
        chosen = contents
        if (literals is None or literals != skeleton(2, empty)
                or _match(text, literals, [[c] for c in contents]) is None):
            # Templates strip contents, on either side, or write a tool's answer as JSON.
            literals = skeleton(0, empty)
            chosen = literals and _match(text, literals, [
                list(dict.fromkeys([c, c.strip(), c.lstrip(), c.rstrip(),
                                    json.dumps(c, ensure_ascii=False)[1:-1]]))
                for c in contents])
        if literals is not None and chosen is not None:
            chosen = [c if content or empty else None for c, content in zip(chosen, contents)]
            return [x for pair in zip(literals, chosen) for x in pair] + [literals[-1]]
    error = error or f"template {template.name} rewrites or repeats a message's text"
    raise ValueError(f"{error}: its spans cannot be told apart, change the record or use another --template")


def _match(text: str, literals: list[str], variants: list[list[str]]) -> list[str] | None:
    """Choose a variant of each content so that literals and contents in turn spell text; None if none do."""
    stack = [(0, 0, ())]  # (content, position in text, contents chosen): depth first, earlier variants first
    seen = set()
    while stack:
        i, position, chosen = stack.pop()
        if (i, position) in seen or not text.startswith(literals[i], position):
            continue
        seen.add((i, position))
        position += len(literals[i])
        if i == len(variants):
            if position == len(text):
                return list(chosen)
            continue
        stack += [(i + 1, position + len(variant), (*chosen, variant)) for variant in reversed(variants[i])
                  if text.startswith(variant, position)]
    return None


# ---------------------------------------------------------------- pieces -> tokens


class Tokenizer:
    """tokenizer.json of a checkpoint folder, with its named special tokens and chat template.

    ValueError if the folder has none, or only SentencePiece's tokenizer.model.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            hint = ""
            if (self.folder / "tokenizer.model").is_file():
                hint = (", only a SentencePiece tokenizer.model; convert it once with `python -c \"from "
                        "transformers import AutoTokenizer; "
                        f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\"`")
            raise ValueError(f"{file}: no such file{hint}")
        config = read_json(self.folder / "tokenizer_config.json")
        named = {**read_json(self.folder / "special_tokens_map.json"), **config}
        self.named_tokens: dict[str, str] = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = named.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                self.named_tokens[name] = token
        self.bos_token = self.named_tokens.get("bos_token")
        self.eos_token = self.named_tokens.get("eos_token")
        self.chat_template = _read_chat_template(self.folder, config)

        spec = json.loads(file.read_text(encoding="utf-8"))
        whole = tokenizers.Tokenizer.from_file(str(file))
        added = {token["content"]: token for token in spec.get("added_tokens", [])}
        for token in self.named_tokens.values():  # transformers makes the named tokens special ones, so do we
            if token in added:
                added[token]["special"] = True
            elif whole.token_to_id(token) is not None:
                added[token] = {"id": whole.token_to_id(token), "content": token, "single_word": False,
                                "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        # We put special tokens in ourselves and need offsets of the text as it stands: no post-processor.
        spec.update(added_tokens=sorted(added.values(), key=lambda t: t["id"]), post_processor=None,
                    truncation=None, padding=None)
        self.special = {text: token["id"] for text, token in added.items() if token["special"]}
        self.strips_left = {text for text, token in added.items() if token["special"] and token["lstrip"]}
        self.strips_right = {text for text, token in added.items() if token["special"] and token["rstrip"]}
        text = json.dumps(spec)
        self.reference = tokenizers.Tokenizer.from_str(text)  # parses special tokens, as transformers does
        self.first = self.rest = tokenizers.Tokenizer.from_str(text)
        # SentencePiece's space in front of the first word: "first" is at the start of the text only, so a run
        # that comes after a special token is encoded by a twin that adds none.
        if '"prepend_scheme": "first"' in text:
            self.rest = tokenizers.Tokenizer.from_str(text.replace('"prepend_scheme": "first"',
                                                                   '"prepend_scheme": "never"'))
        # `</s>` in content stays text.
        self.first.encode_special_tokens = self.rest.encode_special_tokens = True
        self.vocab_size = max(whole.get_vocab(with_added_tokens=True).values()) + 1
        bos_id = whole.token_to_id(self.bos_token) if self.bos_token else None
        starts = whole.encode("a", add_special_tokens=True).ids[:1]
        self.adds_bos = bos_id is not None and config.get("add_bos_token", starts == [bos_id]) is True

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return self.reference.decode(list(ids), skip_special_tokens=skip_special_tokens)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_chat_template(folder: Path, config: dict) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def tokenize(pieces: list[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Pieces of one example -> (ids, kinds), one kind a token."""
    return tokenize_batch([pieces], tokenizer)[0]


def tokenize_batch(examples: list[list[Piece]], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """tokenize() for many examples at once: the tokenizer uses all cores on a batch.

    Special tokens come in by id; the text between two of them is encoded whole, whatever pieces it is made
    of, so ids are those of the text as it is served. A token takes its kind from the characters it covers:

        "...[/INST] Yes"  ->  "[/INST]" TEMPLATE, " Yes" COMPLETION

    One that touches TEMPLATE is TEMPLATE, except where the template gave only the whitespace before a
    completion (" Yes" above): at inference the model writes that token, so it must be trained.
    Otherwise the earlier kind holds.
    """
    layout: list[list] = []  # per example: (id, kind) of a special token, or (run, kinds of its characters)
    for pieces in examples:
        items: list = []
        text, kinds = "", []
        for piece in [*pieces, Piece("", TEMPLATE, special=True)]:  # the last one only closes the last run
            if not piece.special:
                text += piece.text
                kinds += [piece.kind] * len(piece.text)
                continue
            start = (re.match(r"[^\S\x1c-\x1f]*", text).end()
                     if items and items[-1][2] in tokenizer.strips_right else 0)
            end = len(text.rstrip()) if piece.text in tokenizer.strips_left else len(text)
            if start < end:
                items.append((text[start:end], kinds[start:end], None))
            if piece.text:
                items.append((tokenizer.special[piece.text], piece.kind, piece.text))
            text, kinds = "", []
        layout.append(items)

    encoded = {}
    for encoder, wanted in ((tokenizer.first, lambda i: i == 0), (tokenizer.rest, lambda i: i > 0)):
        keys = [(e, i) for e, items in enumerate(layout) for i, item in enumerate(items)
                if item[2] is None and wanted(i)]
        runs = encoder.encode_batch([layout[e][i][0] for e, i in keys], add_special_tokens=False)
        encoded.update(zip(keys, runs))

    out = []
    for e, items in enumerate(layout):
        ids, kinds = [], []
        for i, (run, kind, special) in enumerate(items):
            if special is not None:
                ids.append(run)
                kinds.append(kind)
                continue
            ids += encoded[e, i].ids
            for start, end in encoded[e, i].offsets:
                kinds.append(_token_kind(run, kind, min(start, len(run) - 1), max(end, start + 1)))
        out.append((ids, kinds))
    return out


def _token_kind(text: str, kinds: list[int], start: int, end: int) -> int:
    covered = kinds[start:end]
    if TEMPLATE not in covered or covered.count(TEMPLATE) == len(covered):
        return covered[0]
    own = covered.index(COMPLETION) if COMPLETION in covered else 0
    leading_space = own > 0 and text[start:start + own].isspace() and TEMPLATE not in covered[own:]
    return COMPLETION if leading_space else TEMPLATE


# ---------------------------------------------------------------- tokens -> cache on disk


@dataclass
class Dataset:
    """Tokenised examples in memory-mapped files. Targets are shifted per example: target t is ids[t + 1]."""
    files: list[str]
    ids: np.ndarray         # (all tokens,) int32
    kinds: np.ndarray       # (all tokens,) uint8
    offsets: np.ndarray     # (E + 1,) int64: example e is ids[offsets[e]:offsets[e + 1]]
    origins: np.ndarray     # (E, 2) int32: which file, which line
    counts: np.ndarray      # (E, K) int32: targets of each kind
    report: dict            # what was read, cut and dropped
    key: str                # hash of all that these arrays depend on

    def __post_init__(self) -> None:
        self.lengths = np.diff(self.offsets) - 1  # (E,) inputs of each example, one less than its tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def where(self, example: int) -> str:
        file, line = self.origins[example]
        return f"{self.files[file]}:{line}"

    def trainable(self, weights: Iterable[float]) -> np.ndarray:
        """Indices of the examples that have at least one target of non-zero weight; weights: (K,)."""
        return np.flatnonzero((self.counts[:, np.asarray(list(weights)) != 0] > 0).any(axis=1))


def load_dataset(files: list[str], tokenizer: Tokenizer, template: Template, max_length: int, overlong: str,
                 cache_dir: str | Path, progress: bool = False) -> Dataset:
    """Tokenise files into cache_dir, or map what is there already.

    max_length: most tokens an example may have; overlong: truncate, drop or error for longer ones. Returns a
    Dataset; ValueError for bad records. Written beside its place and renamed, so a killed writer leaves
    nothing behind that another run would read; what is damaged later is made anew.
    """
    files = [str(file) for file in files]
    key = hashlib.sha256(json.dumps([
        "2", [_file_hash(file) for file in files], _file_hash(tokenizer.folder / "tokenizer.json"),
        tokenizer.named_tokens, template.source, template.date if template.uses_date else None,
        max_length, overlong,
    ]).encode()).hexdigest()[:32]
    folder = Path(cache_dir).expanduser() / key
    if folder.is_dir() and (name := _damaged(folder)):
        print(f"warning: {folder / name}: is damaged; tokenizing anew", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir():
        delete_left(folder.parent.glob(f"{key}.*.part"))
        part = folder.with_name(f"{key}.{socket.gethostname()}.{os.getpid()}.part")
        try:
            with writing(part):
                part.mkdir(parents=True, exist_ok=True)
                _write_cache(part, files, tokenizer, template, max_length, overlong, progress)
                commit(part, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same bytes
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    meta = read_json(folder / "report.json")
    offsets = np.load(folder / "offsets.npy", mmap_mode="r")

    def flat(name: str, dtype: type) -> np.ndarray:
        return np.memmap(folder / name, dtype=dtype, mode="r", shape=(int(offsets[-1]),))

    return Dataset(files, flat("ids.bin", np.int32), flat("kinds.bin", np.uint8), offsets,
                   np.load(folder / "origins.npy", mmap_mode="r"),
                   np.load(folder / "counts.npy", mmap_mode="r"), meta, key)


def _damaged(folder: Path) -> str | None:
    """A file of a token cache that is not as it was written, if there is one."""
    try:
        sums = json.loads((folder / "crc32.json").read_text())
        return next((name for name, crc in sums.items()
                     if not (folder / name).is_file() or checksum(folder / name) != crc), None)
    except (ValueError, OSError):
        return "crc32.json"


def _file_hash(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _write_cache(folder: Path, files: list[str], tokenizer: Tokenizer, template: Template, max_length: int,
                 overlong: str, progress: bool) -> None:
    offsets, origins, counts = [0], [], []
    report = Counter({"records": 0, "truncated": 0, "dropped_overlong": 0, "dropped_empty": 0})
    checked = 0

    def flush(batch: list[tuple[list[Piece], int, int]]) -> None:
        nonlocal checked
        examples = tokenize_batch([pieces for pieces, _, _ in batch], tokenizer)
        for (pieces, file, line), (ids, kinds) in zip(batch, examples):
            if checked < 64:
                checked += _check_ids(pieces, ids, tokenizer)
            report["records"] += 1
            if len(ids) > max_length:
                if overlong == "error":
                    raise ValueError(f"{files[file]}:{line}: {len(ids)} tokens, more than --max-length "
                                     f"{max_length}; raise it, or choose --overlong truncate or drop")
                report["truncated" if overlong == "truncate" else "dropped_overlong"] += 1
                if overlong == "drop":
                    continue
                ids, kinds = ids[:max_length], kinds[:max_length]
            if len(ids) < 2:  # no target
                report["dropped_empty"] += 1
                continue
            ids_file.write(np.asarray(ids, np.int32).tobytes())
            kinds_file.write(np.asarray(kinds, np.uint8).tobytes())
            offsets.append(offsets[-1] + len(ids))
            origins.append((file, line))
            counts.append(np.bincount(kinds[1:], minlength=len(KINDS)))

    with open(folder / "ids.bin", "wb") as ids_file, open(folder / "kinds.bin", "wb") as kinds_file:
        batch = []
        for number, file in enumerate(files):
            for messages, line in _with_progress(read_records(file), progress, file):
                try:
                    batch.append((render(messages, template), number, line))
                except ValueError as error:
                    raise ValueError(f"{file}:{line}: {error}") from None
                if len(batch) == 512:
                    flush(batch)
                    batch = []
        flush(batch)
    if not origins:
        raise ValueError(f"{', '.join(files)}: no example left of {report['records']} records "
                         f"({report['dropped_overlong']} longer than --max-length {max_length}, "
                         f"{report['dropped_empty']} empty)")
    for name, values, dtype in (("offsets", offsets, np.int64), ("origins", origins, np.int32),
                                ("counts", counts, np.int32)):
        array = io.BytesIO()    # np.save into a file does not say when the disk is full
        np.save(array, np.asarray(values, dtype))
        (folder / f"{name}.npy").write_bytes(array.getvalue())
    (folder / "report.json").write_text(json.dumps(report))
    sums = {file.name: checksum(file) for file in sorted(folder.iterdir())}
    (folder / "crc32.json").write_text(json.dumps(sums))


def _with_progress(records: Iterable, progress: bool, name: str) -> Iterable:
    from tqdm import tqdm
    return tqdm(records, desc=f"tokenizing {Path(name).name}", unit=" records", disable=not progress,
                leave=False)


def _check_ids(pieces: list[Piece], ids: list[int], tokenizer: Tokenizer) -> int:
    """1 if the ids were checked to be those that serving gives,
    0 if a content holds a special token's text."""
    if any(token in piece.text for piece in pieces if not piece.special for token in tokenizer.special):
        return 0
    text = "".join(piece.text for piece in pieces)
    if tokenizer.reference.encode(text, add_special_tokens=False).ids != ids:
        raise ValueError(f"{tokenizer.folder}/tokenizer.json treats text around special tokens in a way that "
                         f"is not supported: pieces and whole text give different ids for {text[:80]!r}")
    bos = tokenizer.special.get(tokenizer.bos_token)
    if tokenizer.adds_bos and ids[:2] == [bos, bos]:
        raise ValueError(f"the template writes the BOS token {tokenizer.bos_token} twice")
    return 1


# ---------------------------------------------------------------- step plan


def plan(lengths: np.ndarray, seed: int, epoch: int, batch_size: int, capacity: int,
         world_size: int) -> list[list[list[np.ndarray]]]:
    """Every step of an epoch: plan[step][rank][micro-batch] is an array of example indices. A pure function.

    lengths: (E,) inputs of each example; batch_size: examples a step; capacity: most tokens of a micro-batch.
    A step is `batch_size` examples of a seeded permutation (the last one of an epoch may be smaller),
    whatever the capacity and the number of ranks; only how they are packed depends on those.
    ValueError if an example exceeds capacity.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    return [pack(order[i:i + batch_size], lengths, capacity, world_size)
            for i in range(0, len(order), batch_size)]


def pack(examples: np.ndarray, lengths: np.ndarray, capacity: int, world_size: int) -> list[list[np.ndarray]]:
    """Examples of one step -> [rank][micro-batch], as few micro-batches as will do,
    the same number on every rank.

    The longest example goes first, each to the cheapest micro-batch that has room;
    if one finds no room, another micro-batch a rank is added.
    A document of n tokens costs n for the matrices and n * n / 4096 for attention.
    """
    sizes = lengths[examples]
    if len(examples) and sizes.max() > capacity:
        raise ValueError(f"--micro-batch-tokens {capacity} is less than an example of {sizes.max()} tokens: "
                         "raise it, or lower --max-length")
    order = np.argsort(-sizes, kind="stable").tolist()
    tokens = sizes.tolist()
    micro = max(1, -(-int(sizes.sum()) // (capacity * world_size)))
    while True:
        count = micro * world_size
        bins: list[list[int]] = [[] for _ in range(count)]
        heap = [(0.0, b, 0) for b in range(count)]  # cost, micro-batch, tokens
        for i in order:
            full = []
            while heap and heap[0][2] + tokens[i] > capacity:
                full.append(heapq.heappop(heap))
            if not heap:
                break
            cost, b, used = heap[0]
            heapq.heapreplace(heap, (cost + tokens[i] + tokens[i] ** 2 / 4096, b, used + tokens[i]))
            bins[b].append(i)
            for entry in full:
                heapq.heappush(heap, entry)
        else:
            costs = {b: cost for cost, b, _ in heap}
            by_cost = sorted(range(count), key=lambda b: (-costs[b], b))
            ranks: list[list[np.ndarray]] = [[] for _ in range(world_size)]
            for row in range(micro):  # snake: 0 1 | 1 0 | 0 1, so that ranks come out even
                row_bins = by_cost[row * world_size:(row + 1) * world_size]
                for rank, b in enumerate(row_bins if row % 2 == 0 else reversed(row_bins)):
                    ranks[rank].append(examples[np.asarray(bins[b], np.int64)])
            return ranks
        micro += 1


def steps_per_epoch(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)


# ---------------------------------------------------------------- packed batches


@dataclass
class Batch:
    """One micro-batch as a flat row of documents, each with its targets shifted within itself.

        documents  a b c | d e        ids        a  b | d
                                      targets    b  c | e
                                      positions  0  1 | 0
                                      cu_seqlens 0 2 3
    """
    ids: torch.Tensor           # (N,) int64
    targets: torch.Tensor       # (N,) int64
    kinds: torch.Tensor         # (N,) int64, kind of the target
    positions: torch.Tensor     # (N,) int64, from each document's start
    cu_seqlens: torch.Tensor    # (documents + 1,) int32; stays on the CPU: lengths decide what is run
    documents: torch.Tensor     # (N,) int64, which document of the row
    coefficients: torch.Tensor  # (N,) float32, what the target's NLL counts in the step's loss
    rows: torch.Tensor          # (R,) int64, the targets whose coefficient is not zero
    examples: np.ndarray        # (documents,) which example of the dataset

    def to(self, device: torch.device) -> "Batch":
        """To CUDA from pinned memory, so that the copy can overlap with work on the device."""
        if device.type == "cpu":
            return self
        return Batch(**{name: x.pin_memory().to(device, non_blocking=True)
                        if isinstance(x, torch.Tensor) and name != "cu_seqlens" else x
                        for name, x in vars(self).items()})


def collate(dataset: Dataset, examples: np.ndarray, table: np.ndarray) -> Batch:
    """The examples as one packed row on the CPU; table: (documents, K) coefficient of each kind in each of
    them (loss.coefficients). No examples give an empty row."""
    starts, lengths = dataset.offsets[examples], dataset.lengths[examples]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    documents = np.repeat(np.arange(len(examples)), lengths)
    positions = np.arange(cu_seqlens[-1]) - cu_seqlens[documents]
    source = starts[documents] + positions  # (N,) places in the dataset's flat arrays
    kinds = dataset.kinds[source + 1].astype(np.int64)
    coefficients = table[documents, kinds].astype(np.float32)
    arrays = (dataset.ids[source].astype(np.int64), dataset.ids[source + 1].astype(np.int64), kinds,
              positions, cu_seqlens.astype(np.int32), documents, coefficients, np.flatnonzero(coefficients))
    return Batch(*map(torch.from_numpy, arrays), examples)


# ---------------------------------------------------------------- python data.py: look at data

COLOURS = {"template": "90", "system": "35", "instruction": "36", "completion": "32", "context": "33"}  # ANSI


def statistics(dataset: Dataset, batch_size: int, capacity: int) -> dict:
    """What a run would see: per kind the targets an example has (those that have any),
    and how well steps pack."""
    spans = {}
    for kind, name in enumerate(KINDS):
        counts = dataset.counts[:, kind]
        counts = counts[counts > 0]
        if len(counts):
            spans[name] = {"examples": len(counts), "tokens": int(counts.sum()), "mean": float(counts.mean()),
                           "median": float(np.median(counts)), "p95": float(np.percentile(counts, 95)),
                           "max": int(counts.max())}
    steps = plan(dataset.lengths, 0, 0, batch_size, capacity, 1)
    rows = [int(dataset.lengths[m].sum()) for step in steps for m in step[0]]
    instruction, completion = (dataset.counts[:, kind].sum() for kind in (INSTRUCTION, COMPLETION))
    return {**dataset.report, "examples": len(dataset), "tokens": int(dataset.lengths.sum()), "spans": spans,
            "instruction_completion_ratio": float(instruction / completion) if completion else None,
            "longest": int(dataset.lengths.max()) + 1, "steps_per_epoch": len(steps),
            "micro_batches_per_step": len(rows) / len(steps),
            "packing_efficiency": sum(rows) / (len(rows) * capacity),
            "padded_efficiency": float(dataset.lengths.mean() / dataset.lengths.max())}


def print_statistics(stats: dict, batch_size: int, capacity: int) -> None:
    print(f"{stats['records']:,} records: {stats['examples']:,} examples of {stats['tokens']:,} tokens; "
          f"{stats['truncated']:,} truncated,\n  {stats['dropped_overlong']:,} dropped as too long, "
          f"{stats['dropped_empty']:,} dropped as empty; the longest has {stats['longest']:,} tokens")
    print(f"\n{'span':<12}{'examples':>10}{'tokens':>12}{'mean':>9}{'median':>8}{'95 %':>8}{'max':>8}")
    for name, span in stats["spans"].items():
        print(f"{name:<12}{span['examples']:>10,}{span['tokens']:>12,}{span['mean']:>9.1f}"
              f"{span['median']:>8.0f}{span['p95']:>8.0f}{span['max']:>8,}")
    if ratio := stats["instruction_completion_ratio"]:
        print(f"\ninstruction / completion: {ratio:.3g} in tokens. The paper finds that loss over "
              "instructions helps most\n  where this is large or examples are few (it does little for LIMA, "
              "at 0.09 in words).")
    print(f"\nsteps of {batch_size} examples: {stats['steps_per_epoch']:,} an epoch, "
          f"{stats['micro_batches_per_step']:.2f} micro-batches each, "
          f"{stats['packing_efficiency']:.1%} of\n  {capacity:,} tokens used and no padding "
          f"(padded to the longest: {stats['padded_efficiency']:.1%})")


def show(dataset: Dataset, example: int, tokenizer: Tokenizer, colour: bool) -> str:
    """An example's text with its spans coloured, or in marks like [instruction|...] where colours
    are not to be had."""
    a, b = dataset.offsets[example:example + 2]
    ids, kinds = dataset.ids[a:b].tolist(), dataset.kinds[a:b]
    out = []
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    for start, end in zip(edges, edges[1:]):
        # Decode up to here rather than this alone: a tokenizer may drop the first space of what it decodes.
        before, text = (tokenizer.decode(ids[:i], skip_special_tokens=False) for i in (start, end))
        name = KINDS[kinds[start]]
        text = text[len(before):]
        out.append(f"\x1b[{COLOURS[name]}m{text}\x1b[0m" if colour else f"[{name}|{text}]")
    return "".join(out)


def export(dataset: Dataset, weights: Iterable[float], file: str | Path) -> int:
    """Write one JSON object an example, {"input_ids", "labels", "span_kinds"}; labels are unshifted, as
    transformers wants them, -100 where the target's weight is zero. Returns how many were written."""
    trained = np.asarray(list(weights)) != 0
    examples = dataset.trainable(weights)
    part = Path(f"{file}.part")
    with open(part, "w", encoding="utf-8") as out:
        for e in examples:
            a, b = dataset.offsets[e:e + 2]
            ids, kinds = dataset.ids[a:b], dataset.kinds[a:b]
            labels = np.where(trained[kinds], ids, -100)
            labels[0] = -100  # nothing predicts the first token
            out.write(json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist(),
                                  "span_kinds": [KINDS[kind] for kind in kinds]}) + "\n")
    os.replace(part, file)
    return len(examples)


def main() -> None:
    from loss import PRESETS, span_weights
    from model import resolve_model

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True,
                        help="checkpoint folder (or hub id) whose tokenizer is used")
    parser.add_argument("--train-data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--template", default="auto", help=f"auto, {', '.join(TEMPLATES)} or FILE.jinja")
    parser.add_argument("--date", help="YYYY-MM-DD for templates that print the date; default today")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens an example may have")
    parser.add_argument("--overlong", choices=("truncate", "drop", "error"), default="truncate")
    parser.add_argument("--batch-size", type=int, default=128, help="examples a step")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--cache-dir", default=CACHE_DIR)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N examples, coloured by span")
    parser.add_argument("--json", action="store_true", help="print the statistics as one JSON object")
    parser.add_argument("--export", metavar="FILE",
                        help="write ids, labels and span kinds for other trainers")
    parser.add_argument("--loss", choices=tuple(PRESETS), default="im", help="which labels --export keeps")
    for kind in KINDS[:4]:
        parser.add_argument(f"--{kind}-weight", type=float,
                            help=f"override the preset's weight of {kind} tokens")
    args = parser.parse_args()
    try:
        for name in ("max_length", "batch_size", "micro_batch_tokens"):
            if getattr(args, name) < (2 if name == "max_length" else 1):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be larger")
        tokenizer = Tokenizer(resolve_model(args.model))
        template = load_template(args.template, tokenizer, args.date)
        dataset = load_dataset(args.train_data, tokenizer, template, args.max_length, args.overlong,
                               args.cache_dir, progress=sys.stderr.isatty())
        stats = statistics(dataset, args.batch_size, args.micro_batch_tokens)
        if args.json:
            print(json.dumps(stats))
        else:
            print_statistics(stats, args.batch_size, args.micro_batch_tokens)
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for example in range(min(args.show, len(dataset))):
            legend = (" ".join(f"\x1b[{code}m{kind}\x1b[0m" for kind, code in COLOURS.items())
                      if colour else "")
            print(f"\n--- {dataset.where(example)} {legend}\n{show(dataset, example, tokenizer, colour)}")
        if args.export:
            weights = span_weights(args.loss, *(getattr(args, f"{kind}_weight") for kind in KINDS[:4]))
            print(f"{export(dataset, weights, args.export):,} examples written to {args.export}",
                  file=sys.stderr)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
