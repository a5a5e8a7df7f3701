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
import contextlib
import gzip
import hashlib
import heapq
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date as Date, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np
import tokenizers
import torch

import ranks
from files import checksum, commit, delete_left, read_json, writing

KINDS = ("template", "system", "instruction", "completion", "context")
TEMPLATE, SYSTEM, INSTRUCTION, COMPLETION, CONTEXT = range(len(KINDS))
ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": INSTRUCTION, "tool": INSTRUCTION,
         "function": INSTRUCTION, "ipython": INSTRUCTION, "assistant": COMPLETION}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}

# Switches of other trainers and servers with the value that changes nothing here. On a message the first
# seven say whether it is trained.
NEUTRAL = {"weight": 1, "train": 1, "training": 1, "trainable": 1, "loss": 1, "mask": 0, "masked": 0,
           "label": 1, "prefix": 0, "add_generation_prompt": 0, "continue_final_message": 0,
           "supervise": 1, "include": 1, "ignore": 0, "skip": 0}
TRAINS = tuple(NEUTRAL)[:7]
# Other fields that change what is trained or served elsewhere: {name, as a pattern: why it is refused}.
REFUSED = {
    r"(reasoning|thinking|thoughts?)(_\w+)?|tool_calls?|function_calls?":
        "which this trainer does not render: write what the model should say into 'content'",
    r"(\w+_)?tools|tool_choice|functions|documents|history|(image|audio|video)s?(_urls?|_paths?)?"
    r"|(chat_)?template_kwargs|chat_template|(enable|disable)_thinking"
    r"|prefix|prefill|add_generation_prompt|continue_final_message":
        "which would not be trained as it is served: write it into the messages as text, or remove it",
    r"(train|training|trainable|loss|masks?|masked)(_\w+)?|(\w+_)?loss_(mask|scale|weight)s?"
    r"|((sample|example|token|turn)_)?weights?|labels?|(chosen|rejected)(_\w+)?"
    r"|(is|do|no|to|should|compute|with)_?(train\w*|loss)|supervised?|include|ignored?|skip(ped)?|channel":
        "which would change here what is trained: mark messages that are not to be trained with "
        "\"weight\": 0, leave out records that are not, and remove the field",
}

# Fields whose text belongs to the conversation, in one layout or another.
TEXTS = ("prompt", "completion", "instruction", "input", "output", "context", "suffix", "system_message",
         "developer")

CACHE_DIR = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "spantune")

# ---------------------------------------------------------------- records -> messages


def read_records(path: str | Path) -> Iterator[tuple[list[dict], int]]:
    """Yield (messages, line) for every record of a .jsonl, .json or .jsonl.gz file; line counts from 1
    (in a .json list: the record's number). messages is [{"role", "content"}, ...],
    with "weight": 0 where it is not to be trained, and with what else the record's message holds: the
    template may read it.

        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
        {"prompt": "Hi", "completion": "Hello"}
        {"instruction": "Translate.", "input": "Hi", "output": "Salut"}      user: "Translate.\\n\\nHi"
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}

    "train", "training", "trainable" or "loss": false and "mask" or "masked": true mean "weight": 0. Fields
    that would change what is trained or served in another way (REFUSED) are refused; null means absent.
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
    record = _present(record)
    _refuse(record, "the record")
    if "messages" in record:
        messages = record["messages"]
    elif "conversations" in record:
        turns = record["conversations"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("'conversations' must be a list of {\"from\", \"value\"} objects")
        messages = []
        for number, turn in enumerate(map(_present, turns), 1):
            role, content = turn.pop("from", turn.get("role")), turn.pop("value", turn.get("content"))
            role = SHAREGPT_ROLES.get(str(role), role)
            if turn.get("role", role) != role or turn.get("content", content) != content:
                raise ValueError(f"message {number} has 'from' and 'value' besides another 'role' or "
                                 "'content': keep one of them")
            messages.append({**turn, "role": role, "content": content})
    elif "prompt" in record and "completion" in record:
        messages = [{"role": "user", "content": record["prompt"]},
                    {"role": "assistant", "content": record["completion"]}]
    elif "instruction" in record and "output" in record:
        parts = [record["instruction"], record.get("input", "")]
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
    for field in ("system", "system_prompt"):
        given = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "system"]
        if record.get(field) and not given:
            messages = [{"role": "system", "content": record[field]}, *messages]
        elif record.get(field, "") not in ("", *given):
            raise ValueError(f"the record's {field!r} is not what its system message says: keep one of them")
    messages = [_message(message, number) for number, message in enumerate(messages, 1)]
    for field in TEXTS:
        text = record.get(field)
        if isinstance(text, str) and not any(text.strip() in m["content"] for m in messages):
            raise ValueError(f"the record's {field!r} is in none of its messages and would not be trained: "
                             "write it into them, or remove the field")
    if "messages" in record and record.get("conversations"):
        raise ValueError("has both 'messages' and 'conversations': keep one of them")
    return messages


def _present(fields: dict) -> dict:
    """Without JSON's nulls, which mean absent."""
    return {field: value for field, value in fields.items() if value is not None}


def _refuse(fields: dict, owner: str) -> None:
    """ValueError for a field that would change what is trained or served, unless it is empty or NEUTRAL."""
    for field, value in fields.items():
        if value in ("", [], {}) or field in NEUTRAL and value == NEUTRAL[field]:
            continue
        for pattern, reason in REFUSED.items():
            if re.fullmatch(pattern, field, re.IGNORECASE):
                raise ValueError(f"{owner} has {field!r}, {reason}")


def _message(message: dict, number: int) -> dict:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} must be an object with 'role' and 'content'")
    rest = _present(message)
    role, content = rest.pop("role", None), rest.pop("content", None)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {number} has the unknown role {role!r}; known are {', '.join(ROLES)}")
    switches = {field: rest.pop(field) for field in TRAINS if field in rest}
    for field, value in switches.items():
        if value not in (0, 1):
            raise ValueError(f"message {number} has {field!r}: {value!r}; it must be 0 or 1, false or true")
    weights = {int(value == NEUTRAL[field]) for field, value in switches.items()}
    if len(weights) > 1:
        raise ValueError(f"message {number} is to be trained and not to be trained: "
                         f"{', '.join(f'{f!r} is {v!r}' for f, v in switches.items())}; keep one of them")
    _refuse(rest, f"message {number}")
    if not isinstance(content, str):
        raise ValueError(f"message {number} ({role}) has no text: 'content' is {type(content).__name__}")
    try:
        (content + json.dumps(rest, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        raise ValueError(f"message {number} ({role}) holds half a surrogate pair, "
                         "which is not text") from None
    return {"role": role, "content": content, **rest, **({"weight": 0} if weights == {0} else {})}


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
    lead: str = ""              # what the model writes in front of a content: Qwen3's empty think block
    warning: str = ""           # says so if the generation prompt is not what answers are trained behind

    @property
    def uses_date(self) -> bool:
        return "strftime_now" in self.source

    def content(self, answer: str) -> str:
        """A generated answer as a message's content: without the text that this template puts before one."""
        return answer.removeprefix(self.lead)

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


@cache
def _compile(source: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: object, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple | None = None, sort_keys: bool = False) -> str:  # jinja's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(  # a template is foreign code
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env.from_string(source)


# What a template is tried with.
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


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
    probe = render(PROBE, template)
    answer = [piece for piece in probe if piece.kind == COMPLETION]
    if not answer[-1].special:
        raise ValueError(
            f"--template {name} writes no special token of this tokenizer after an assistant's message, "
            "so the model could not learn to stop; end it with {{ eos_token }} or use a template that fits "
            f"{tokenizer.folder}")
    content = next(i for i, piece in enumerate(answer) if piece.text == "b")
    lead = "".join(piece.text for piece in answer[:content] if not piece.special)
    template = replace(template, end_of_turn=answer[-1].text, lead=lead)
    warnings = []
    for before in ([], [{"role": "system", "content": "s"}], PROBE):
        with contextlib.suppress(ValueError):   # the template takes no such conversation
            warnings.append(_compare_prompts([*before, *PROBE], template))
    return replace(template, warning=next(filter(None, warnings), ""))


def _compare_prompts(conversation: list[dict], template: Template) -> str:
    """A warning where the generation prompt for the conversation's last message is not what its text is
    trained after; else ""."""
    prompt, pieces = _generation_prompt(conversation[:-1], template), render(conversation, template)
    if prompt is None:
        return f"template {template.name} renders no generation prompt: answers are trained without one"
    kinds = [piece.kind for piece in pieces]
    first = len(kinds) - kinds[::-1].index(INSTRUCTION)     # behind the last question
    trained = "".join(piece.text for piece in pieces[:kinds.index(COMPLETION, first)])
    if "".join(piece.text for piece in pieces).startswith(prompt):
        return ""
    # Up to the question's end they are usually the same, and that says nothing.
    asked = "".join(piece.text for piece in pieces[:first])
    start = len(asked) if prompt.startswith(asked) else 0
    return (f"template {template.name}: the generation prompt is {prompt[start:]!r}, but the trained text "
            f"has {trained[start:]!r} in its place, so answers are trained after other text than they are "
            "generated after; to make both the same, edit a copy and give it as --template FILE.jinja")


def _generation_prompt(messages: list[dict], template: Template) -> str | None:
    """What serving puts in front of the answer to messages; None if the template refuses them."""
    try:
        return template(messages, add_generation_prompt=True)
    except ValueError:
        return None


def render(messages: list[dict], template: Template, add_generation_prompt: bool = False) -> list[Piece]:
    """Messages -> pieces; their texts joined are exactly what the template renders.
    add_generation_prompt: with the header of the answer to come, as for generation.

        tulu, [user "2+2?", assistant "4"]:
        [("<|user|>\\n", TEMPLATE), ("2+2?", INSTRUCTION), ("\\n<|assistant|>\\n", TEMPLATE),
         ("4", COMPLETION), ("</s>", COMPLETION, special)]

        the last of Qwen3, whose generation prompt ends with "<|im_start|>assistant\\n":
        [("<think>\\n\\n</think>\\n\\n", COMPLETION), ("4", COMPLETION), ("<|im_end|>", COMPLETION, special)]

    COMPLETION is all that the model must write itself: from the end of the generation prompt, the messages
    before rendered with add_generation_prompt, to the first special token after the content. Where the text
    does not begin with that prompt, it begins at the content. Messages' other fields go to the template. The
    template is rendered once more for each assistant message, so time grows with the square of their number.

    ValueError if the template refuses the messages, or if its text cannot be taken apart into them (it drops,
    repeats or rewrites a message): better no example than a wrong mask.
    """
    shown = [{field: value for field, value in m.items() if field != "weight"} for m in messages]
    special = _special_pattern(template.special)
    others = [{field: m[field] for field in m if field not in ("role", "content")} for m in shown]
    if any(others) and (token := special.search(str(others))):
        # Matters only if the template reads them.
        if template(shown) != template([{"role": m["role"], "content": m["content"]} for m in shown]):
            raise ValueError(f"template {template.name} reads a field besides 'content' that holds the "
                             f"special token {token[0]!r}, which would not stay text there: remove it")
    parts = _take_apart(shown, template, add_generation_prompt)
    text = "".join(part or "" for part in parts)
    ends = (template.end_of_turn, template.tokens.get("eos_token"))
    pieces: list[Piece] = []

    def add(text: str, kind: int) -> None:
        pieces.extend(Piece(token, kind, special=i % 2 == 1) for i, token in enumerate(special.split(text)))

    position, turn = 0, None  # where in the text this literal begins; kind of the answer that it ends
    for i, literal in enumerate(parts[::2]):
        content = parts[2 * i + 1] if i < len(messages) else None
        end = special.search(literal) if turn is not None else None
        # Not every template ends every answer; the next special token is then another message's.
        end = end.end() if end and (not template.end_of_turn or end[0] in ends) else 0
        start, kind = len(literal), TEMPLATE
        if content is not None:
            answers = messages[i]["role"] == "assistant"
            kind = CONTEXT if messages[i].get("weight") == 0 else ROLES[messages[i]["role"]]
            prompt = _generation_prompt(shown[:i], template) if answers else None
            if prompt is not None and text.startswith(prompt):
                # It may end in the content ("<think>"), but not with a special token: content makes none.
                reach = len(prompt) - position
                tokens = [token.end() - position for token in special.finditer(prompt)]
                if end <= reach <= len(literal) + len(content) and max(tokens, default=0) <= len(literal):
                    start = reach
        add(literal[:end], TEMPLATE if turn is None else turn)
        add(literal[end:start], TEMPLATE)
        add(literal[start:], kind)
        if content is not None:
            begins = max(0, start - len(literal))
            pieces += [Piece(content[:begins], TEMPLATE), Piece(content[begins:], kind)]
            turn = kind if answers else None
        position += len(literal) + len(content or "")
    return [piece for piece in pieces if piece.text]


@cache
def _special_pattern(special: tuple[str, ...]) -> re.Pattern:
    """Matches the special tokens' texts; nothing if there are none."""
    return re.compile(
        "(" + ("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)") + ")")


def _take_apart(messages: list[dict], template: Template, add_generation_prompt: bool) -> list[str | None]:
    """The rendered text as [literal, content, literal, content, ..., literal], one content a message, None
    for an empty one that the template asks for and leaves out."""
    text = template(messages, add_generation_prompt)
    contents = [m["content"] for m in messages]
    mark = "\ue000"
    while mark in "".join(contents) + text + template.source:
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


# What the tokenizers library takes for whitespace; Python adds the separators \x1c to \x1f.
SPACES = "".join(filter(str.isspace, map(chr, range(0x3001)))).translate(dict.fromkeys(range(0x1c, 0x20)))
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


class Tokenizer:
    """tokenizer.json of a checkpoint folder, with its special tokens and chat template.

    Normaliser, splitting, model and post-processor are those of tokenizer.json as it stands. transformers
    builds some of them anew for a few classes (LlamaTokenizer), so it may serve the source folder with other
    ids; the exported folder names a class that takes the file as it is (checkpoint.export).

    named_tokens: {"eos_token": "</s>", ...}; special: {text: id} of all special tokens; adds_bos: whether
    plain text begins with the BOS token; reference: parses special tokens in a text, as serving does;
    first and rest: for text whose special tokens are not to be parsed, at the start and behind a token.

    ValueError if the folder has none, or only SentencePiece's tokenizer.model, or if text could become a
    special token that it only spells.
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
        self.chat_template = _read_chat_template(self.folder, config)
        spec, text = read_json(file), file.read_text(encoding="utf-8")
        try:
            self.reference = tokenizers.Tokenizer.from_str(text)
        except Exception as error:      # the library knows no other class
            raise ValueError(f"{file}: {error}") from None
        if dropout := spec["model"].get("dropout"):
            raise ValueError(f"{file}: model.dropout is {dropout}, so the same text would get other ids each "
                             "time; set it to null")
        self.class_defaults = _class_defaults(self.folder, config, '"ByteLevel"' in text)
        self.named_tokens, self.extra_tokens = _add_special_tokens(
            self.reference, self.folder, config, spec, self.class_defaults)
        self.bos_token = self.named_tokens.get("bos_token")
        self.eos_token = self.named_tokens.get("eos_token")
        # The library's ids, not the file's: a token of the vocabulary has its id there, whatever
        # added_tokens says.
        self.added_tokens = [
            {"id": index, "content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
            for index, token in sorted(self.reference.get_added_tokens_decoder().items())]
        special = [token for token in self.added_tokens if token["special"]]
        self.special = {token["content"]: token["id"] for token in special}
        self.strips_left = {token["content"] for token in special if token["lstrip"]}
        self.strips_right = {token["content"] for token in special if token["rstrip"]}
        # Saved padding and truncation would hide BOS, and pad or cut what is encoded below. add_bos_token in
        # tokenizer_config.json changes nothing where there is a tokenizer.json: its post-processor decides.
        self.reference.no_padding()
        self.reference.no_truncation()
        bos = self.special.get(self.bos_token)
        self.adds_bos = bos is not None and self.reference.encode("a").ids[:1] == [bos]
        # We put special tokens in ourselves and need offsets of the text as it stands: no post-processor.
        self.reference.post_processor = None
        spec.update(added_tokens=self.added_tokens, post_processor=None, truncation=None, padding=None)
        self._encode_content_with(spec)

    def _encode_content_with(self, spec: dict) -> None:
        """Make `first` and `rest` of tokenizer.json's content: `</s>` in content stays text for them.

        Not to split at special tokens is not enough: a vocabulary that holds `</s>` as a piece finds it in
        a text, or in what the normaliser makes of `\uff1c/s\uff1e`. So they know special tokens by names
        that are in no text; all other tokens keep their ids.
        """
        model = spec["model"]
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:     # Unigram
            unknown = model["vocab"][model["unk_id"]][0]
        # Text that the model does not know does become the unknown token, but must not end a turn by that.
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
        if model.get("merges") and inside:      # BPE must not name what is gone
            pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [[a, b] for a, b in pairs
                               if inside.keys().isdisjoint((a, b, a + b.removeprefix(prefix)))]
        text = json.dumps(spec)
        self.first = self.rest = tokenizers.Tokenizer.from_str(text)
        # SentencePiece's space in front of the first word: "first" is at the start of the text only, so a run
        # that comes after a special token is encoded by a twin that adds none.
        if '"prepend_scheme": "first"' in text:
            self.rest = tokenizers.Tokenizer.from_str(text.replace('"prepend_scheme": "first"',
                                                                   '"prepend_scheme": "never"'))
        # Every special token, in full-width letters too, and a character that no vocabulary has.
        wide = {code: code + 0xfee0 for code in range(ord("!"), ord("~") + 1)}
        for text in (*self.special, *(text.translate(wide) for text in self.special), "\U000e0fff"):
            for encoder in {self.first, self.rest}:
                try:
                    ids = encoder.encode(text, add_special_tokens=False).ids
                except Exception:   # the library knows no other class: no unknown token, no such text
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

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return self.reference.decode(list(ids), skip_special_tokens=skip_special_tokens)


def _class_defaults(folder: Path, config: dict, byte_level: bool) -> dict[str, str]:
    """What the class that transformers would take for this folder adds to its files."""
    model = read_json(folder / "config.json")
    family = model.get("model_type")
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    # For two families it does not ask what is declared; and a "Llama" that is byte-level gets none.
    name = declared if declared and family not in ("qwen2", "mistral") else MODEL_CLASSES.get(family, "")
    name = name.removesuffix("Fast")
    return {} if byte_level and declared and name == "LlamaTokenizer" else CLASS_DEFAULTS.get(name, {})


def _add_special_tokens(tokenizer: tokenizers.Tokenizer, folder: Path, config: dict, spec: dict,
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

    TEMPLATE characters that are only whitespace never take a token away from the content that it touches
    (" Yes" above): whoever writes the content writes that token. Otherwise a token that touches TEMPLATE is
    TEMPLATE. Of two contents in one token the earlier kind holds.
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
            start, end = 0, len(text)
            if items and items[-1][2] in tokenizer.strips_right:
                start = end - len(text.lstrip(SPACES))
            if piece.text in tokenizer.strips_left:
                end = len(text.rstrip(SPACES))
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
        try:
            runs = encoder.encode_batch([layout[e][i][0] for e, i in keys], add_special_tokens=False)
        except Exception as error:      # the library knows no other class
            raise ValueError(f"{tokenizer.folder}/tokenizer.json: {error}") from None
        encoded.update(zip(keys, runs))

    out = []
    for e, items in enumerate(layout):
        ids, kinds = [], []
        for i, (run, kind, special) in enumerate(items):
            if special is not None:
                ids.append(run)
                kinds.append(kind)
                continue
            tokenizer.check_content(run, encoded[e, i].ids)
            ids += encoded[e, i].ids
            for start, end in encoded[e, i].offsets:
                kinds.append(_token_kind(run, kind, min(start, len(run) - 1), max(end, start + 1)))
        out.append((ids, kinds))
    return out


def _token_kind(text: str, kinds: list[int], start: int, end: int) -> int:
    covered = kinds[start:end]
    if TEMPLATE not in covered:
        return covered[0]
    held = [kind for character, kind in zip(text[start:end], covered)
            if kind != TEMPLATE or not character.isspace()]
    return TEMPLATE if TEMPLATE in held or not held else held[0]


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
    key: str                # hash of all that these arrays depend on, cache_parts()
    content: str            # hash of the arrays themselves

    def __post_init__(self) -> None:
        self.lengths = np.diff(self.offsets) - 1  # (E,) inputs of each example, one less than its tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def where(self, example: int) -> str:
        file, line = self.origins[example]
        return f"{self.files[file]}:{line}"

    def trainable(self, weights: Iterable[float], require_completion: bool = True) -> np.ndarray:
        """Indices of the examples that have at least one target of non-zero weight; weights: (K,).
        require_completion: and a completion target, whatever its weight: then every loss that weighs
        completions has the same examples."""
        some = (self.counts[:, np.asarray(list(weights)) != 0] > 0).any(axis=1)
        return np.flatnonzero(some & (self.counts[:, COMPLETION] > 0) if require_completion else some)


# A cache's files, and how they are mapped.
CACHE_FILES = {"ids.bin": (np.int32, (-1,)), "kinds.bin": (np.uint8, (-1,)), "offsets.bin": (np.int64, (-1,)),
               "origins.bin": (np.int32, (-1, 2)), "counts.bin": (np.int32, (-1, len(KINDS))),
               "report.json": (np.uint8, (-1,))}
# The code that turns records into tokens.
CODE = (Path(__file__),)


def cache_parts(files: list[str], tokenizer: Tokenizer, template: Template, max_length: int, overlong: str
                ) -> dict[str, object]:
    """All that decides what is in a token cache, by name, as JSON can hold it: hashes of the files' contents,
    wherever they lie, of tokenizer, template and this code; versions of libraries; flags. Only reads and
    hashes files. ValueError for a file that cannot be read."""
    marks = [template.tokens, sorted(template.special), tokenizer.named_tokens, tokenizer.added_tokens]
    return {
        "data": [_file_hash(file) for file in files],
        "tokenizer": _file_hash(tokenizer.folder / "tokenizer.json"),
        "special_tokens": _hash(json.dumps(marks, sort_keys=True)),
        "template": _hash(template.source),
        "date": template.date if template.uses_date else None,
        "max_length": max_length,
        "overlong": overlong,
        "code": _hash("".join(_file_hash(file) for file in CODE)),
        "libraries": " ".join(f"{name} {version(name)}" for name in ("tokenizers", "jinja2")),
    }


def load_dataset(files: list[str], tokenizer: Tokenizer, template: Template, max_length: int, overlong: str,
                 cache_dir: str | Path, progress: bool = False) -> Dataset:
    """Tokenise files into cache_dir, or map what is there already.

    max_length: most tokens an example may have; overlong: truncate, drop or error for longer ones. Returns a
    Dataset; ValueError for bad records, and for a damaged cache that cannot be replaced. A cache is written
    beside its place and renamed, so a killed writer leaves nothing behind that another run would read.
    """
    files = [str(file) for file in files]
    parts = cache_parts(files, tokenizer, template, max_length, overlong)
    key = _hash(json.dumps(parts, sort_keys=True))[:32]
    folder, opened = Path(cache_dir).expanduser() / key, None
    part = folder.with_name(f"{key}.{socket.gethostname()}.{os.getpid()}.part")
    if os.path.lexists(folder):
        try:
            opened = _open_cache(folder)
        except ValueError as error:
            _move_away(folder, part.with_suffix(".old.part"), str(error))
            print(f"warning: {error}; tokenizing again", file=sys.stderr)
    if opened is None:
        delete_left(folder.parent.glob(f"{key}.*.part"))
        try:
            part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; give another --cache-dir",
                          str(folder.parent)) from None
        try:
            with writing(part):
                _write_cache(part, files, tokenizer, template, max_length, overlong, progress)
                if [_file_hash(file) for file in files] != parts["data"]:
                    raise ValueError(f"{', '.join(files)}: changed while being read; start again")
                commit(part, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same bytes
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        opened = _open_cache(folder)
    arrays, content = opened
    columns = (arrays[f"{name}.bin"] for name in ("ids", "kinds", "offsets", "origins", "counts"))
    return Dataset(files, *columns, json.loads(arrays["report.json"].tobytes()), key, content)


def _open_cache(folder: Path) -> tuple[dict[str, np.ndarray], str]:
    """The files of a token cache, mapped, and a hash of their contents. Each is opened once, checked and
    mapped, so that nobody can put another in its place in between. ValueError names one that is not as it was
    written or cannot be read."""
    arrays, file = {}, folder / "crc32.json"
    try:
        sums = json.loads(file.read_text())
        for name, (dtype, shape) in CACHE_FILES.items():
            file = folder / name
            with open(file, "rb") as opened:
                if checksum(opened) != sums[name]:
                    raise ValueError
                arrays[name] = np.memmap(opened, np.uint8, "r").view(dtype).reshape(shape)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{file}: is damaged") from None
    return arrays, _hash(json.dumps(sums))[:32]


def _move_away(folder: Path, old: Path, fault: str) -> None:
    """Rename a token cache that cannot be used, and delete it as far as possible. ValueError, which begins
    with `fault`, if it cannot be renamed."""
    try:
        os.rename(folder, old)
    except FileNotFoundError:
        pass    # another process was first
    except OSError as error:
        raise ValueError(f"{fault}, and the folder cannot be replaced ({error.strerror}): delete it, or give "
                         "another --cache-dir") from None
    shutil.rmtree(old, ignore_errors=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _file_hash(path: str | Path) -> str:
    try:
        state = os.stat(path)
        return _hash_once(str(path), state.st_ino, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


@cache  # a run asks for its files' hashes before and after it reads them
def _hash_once(path: str, *state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_cache(folder: Path, files: list[str], tokenizer: Tokenizer, template: Template, max_length: int,
                 overlong: str, progress: bool) -> None:
    offsets, origins, counts = [0], [], []
    report = Counter({"records": 0, "truncated": 0, "dropped_overlong": 0, "dropped_empty": 0})
    checked = 0

    def flush(batch: list[tuple[list[Piece], int, int]]) -> None:
        nonlocal checked
        try:
            examples = tokenize_batch([pieces for pieces, _, _ in batch], tokenizer)
        except ValueError:      # again one by one, to name the record
            for pieces, file, line in batch:
                try:
                    tokenize(pieces, tokenizer)
                except ValueError as error:
                    raise ValueError(f"{files[file]}:{line}: {error}") from None
            raise
        for (pieces, file, line), (ids, kinds) in zip(batch, examples):
            if checked < 64:
                try:
                    checked += _check_ids(pieces, ids, tokenizer)
                except ValueError as error:
                    raise ValueError(f"{files[file]}:{line}: {error}") from None
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
    for name, values in (("offsets.bin", offsets), ("origins.bin", origins), ("counts.bin", counts)):
        (folder / name).write_bytes(np.asarray(values, CACHE_FILES[name][0]).tobytes())
    (folder / "report.json").write_text(json.dumps(report))
    sums = {name: checksum(folder / name) for name in CACHE_FILES}
    (folder / "crc32.json").write_text(json.dumps(sums))


def _with_progress(records: Iterable, progress: bool, name: str) -> Iterable:
    from tqdm import tqdm
    return tqdm(records, desc=f"tokenizing {Path(name).name}", unit=" records", disable=not progress,
                leave=False)


def _check_ids(pieces: list[Piece], ids: list[int], tokenizer: Tokenizer) -> int:
    """1 if the ids were checked to be those that serving gives,
    0 if a content spells a special token, or something that the normaliser makes one of."""
    def served(text: str) -> list[int]:
        return tokenizer.reference.encode(text, add_special_tokens=False).ids

    text = "".join(piece.text for piece in pieces)
    spelled = {piece.kind for piece in pieces if not piece.special and
               served(piece.text) != tokenizer.first.encode(piece.text, add_special_tokens=False).ids}
    if spelled and TEMPLATE not in spelled:
        return 0
    if served(text) != ids:
        raise ValueError(f"{tokenizer.folder}/tokenizer.json treats text around special tokens in a way that "
                         f"is not supported: pieces and whole text give different ids for {text[:80]!r}")
    bos = tokenizer.special.get(tokenizer.bos_token)
    if tokenizer.adds_bos and ids[:2] == [bos, bos]:
        raise ValueError(f"the template writes the BOS token {tokenizer.bos_token} twice")
    return 1


def check_vocabulary(rows: int, tokenizer: Tokenizer, template: Template | None = None,
                     datasets: Iterable[Dataset] = ()) -> None:
    """ValueError unless every token that the template writes and the datasets hold has one of the embedding's
    `rows`. Tokens that are never used, such as a padding token added without resizing, need none."""
    reason = (f"the embedding has only {rows} rows; {tokenizer.folder} holds a tokenizer and a model that do "
              "not belong together, or tokens were added without resizing the model")
    if template is not None:
        for piece in render(PROBE, template):
            if piece.special and tokenizer.special[piece.text] >= rows:
                raise ValueError(f"--template {template.name} writes {piece.text!r}, token "
                                 f"{tokenizer.special[piece.text]}, but {reason}")
    for dataset in datasets:
        if dataset.ids.max() >= rows:
            place = int(np.argmax(dataset.ids >= rows))
            example = int(np.searchsorted(dataset.offsets, place, side="right")) - 1
            index = int(dataset.ids[place])
            raise ValueError(f"{dataset.where(example)}: holds {tokenizer.reference.id_to_token(index)!r}, "
                             f"token {index}, but {reason}")


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


def statistics(dataset: Dataset, usable: np.ndarray, batch_size: int, capacity: int) -> dict:
    """What a run would see: per kind the targets an example has (those that have any), and how well steps
    pack. usable: (examples,) those that it trains on, Dataset.trainable()."""
    spans, lengths = {}, dataset.lengths[usable]
    if not len(usable):
        raise ValueError("no example has anything to train on; give another --loss, a larger --max-length or "
                         "--no-require-completion")
    for kind, name in enumerate(KINDS):
        counts = dataset.counts[usable, kind]
        counts = counts[counts > 0]
        if len(counts):
            spans[name] = {"examples": len(counts), "tokens": int(counts.sum()), "mean": float(counts.mean()),
                           "median": float(np.median(counts)), "p95": float(np.percentile(counts, 95)),
                           "max": int(counts.max())}
    steps = plan(lengths, 0, 0, batch_size, capacity, 1)
    rows = [int(lengths[m].sum()) for step in steps for m in step[0]]
    instruction, completion = (dataset.counts[usable, kind].sum() for kind in (INSTRUCTION, COMPLETION))
    return {**dataset.report, "left_out": len(dataset) - len(usable), "examples": len(usable),
            "tokens": int(lengths.sum()), "spans": spans,
            "instruction_completion_ratio": float(instruction / completion) if completion else None,
            "longest": int(lengths.max()) + 1, "steps_per_epoch": len(steps),
            "micro_batches_per_step": len(rows) / len(steps),
            "packing_efficiency": sum(rows) / (len(rows) * capacity),
            "padded_efficiency": float(lengths.mean() / lengths.max())}


def print_statistics(stats: dict, batch_size: int, capacity: int) -> None:
    print(f"{stats['records']:,} records: {stats['examples']:,} examples of {stats['tokens']:,} tokens; "
          f"{stats['truncated']:,} truncated,\n  {stats['dropped_overlong']:,} dropped as too long, "
          f"{stats['dropped_empty']:,} dropped as empty,\n  {stats['left_out']:,} left out with nothing to "
          f"train on; the longest has {stats['longest']:,} tokens")
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
    """An example's text with its spans coloured, or in marks like [instruction|...] without
    colour support."""
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


def export(dataset: Dataset, usable: np.ndarray, weights: Iterable[float], file: str | Path) -> None:
    """Write one JSON object an example, {"input_ids", "labels", "span_kinds"}; labels are unshifted, as
    transformers wants them, -100 where the target's weight is zero. usable: (examples,) which ones."""
    trained = np.asarray(list(weights)) != 0
    part = Path(f"{file}.part")
    with open(part, "w", encoding="utf-8") as out:
        for e in usable:
            a, b = dataset.offsets[e:e + 2]
            ids, kinds = dataset.ids[a:b], dataset.kinds[a:b]
            labels = np.where(trained[kinds], ids, -100)
            labels[0] = -100  # nothing predicts the first token
            out.write(json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist(),
                                  "span_kinds": [KINDS[kind] for kind in kinds]}) + "\n")
    os.replace(part, file)


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
    parser.add_argument("--loss", choices=tuple(PRESETS), default="im", help="which targets are trained")
    parser.add_argument("--require-completion", action=argparse.BooleanOptionalAction, default=True,
                        help="leave out examples without a completion to train")
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
        if template.warning:
            print(f"warning: {template.warning}", file=sys.stderr)
        dataset = load_dataset(args.train_data, tokenizer, template, args.max_length, args.overlong,
                               args.cache_dir, progress=sys.stderr.isatty())
        weights = span_weights(args.loss, *(getattr(args, f"{kind}_weight") for kind in KINDS[:4]))
        usable = dataset.trainable(weights, args.require_completion)
        stats = statistics(dataset, usable, args.batch_size, args.micro_batch_tokens)
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
            export(dataset, usable, weights, args.export)
            print(f"{len(usable):,} examples written to {args.export}", file=sys.stderr)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {ranks.message(error)}")


if __name__ == "__main__":
    main()
