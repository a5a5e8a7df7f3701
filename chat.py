"""Records -> messages -> spans -> tokens: layouts of records, chat templates, kinds of tokens.

    for messages, line in read_records("train.jsonl"):
        pieces = render(messages, template)         # [("<|user|>\n", TEMPLATE), ("2+2?", INSTRUCTION), ...]
        ids, kinds = tokenize(pieces, tokenizer)    # one kind a token

What differs from the usual way: spans are made by construction. A chat template is rendered around sentinels
and split at them, so no marker is ever searched for in token ids and no prompt is assumed to be a token
prefix.
"""
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date as Date
from functools import cache
from pathlib import Path
from typing import NamedTuple

from runtime.foreign import check_file, lines_of, parse_json, parse_line, read_text
from runtime.jinja import TooMuch, render_jinja
from runtime.tokenizer import Tokenizer, check_rows, naming

KINDS = ("template", "system", "instruction", "completion", "context")
TEMPLATE, SYSTEM, INSTRUCTION, COMPLETION, CONTEXT = range(len(KINDS))
ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": INSTRUCTION, "tool": INSTRUCTION,
         "function": INSTRUCTION, "ipython": INSTRUCTION, "assistant": COMPLETION}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}

# A message's switches in other trainers that decide whether it is trained, with the value that says yes.
TRAINS = {"weight": 1, "train": 1, "training": 1, "trainable": 1, "loss": 1, "mask": 0, "masked": 0}
# These and other switches, with the value that changes nothing here.
NEUTRAL = TRAINS | {"label": 1, "prefix": 0, "add_generation_prompt": 0, "continue_final_message": 0,
                    "supervise": 1, "include": 1, "ignore": 0, "skip": 0}
# Other fields that change what is trained or served elsewhere: {pattern of the name: why it is refused}.
REFUSED = {
    r"""(reasoning|thinking|thoughts?)(_\w+)?
      | (tool|function)_calls?
    """: "which this trainer does not render: write what the model should say into 'content'",
    r"""(\w+_)?tools
      | tool_choice | functions | documents | history
      | (image|audio|video)s?(_urls?|_paths?)?
      | chat_template | (chat_)?template_kwargs | (enable|disable)_thinking
      | prefix | prefill | add_generation_prompt | continue_final_message
    """: "which would not be trained as it is served: write it into the messages as text, or remove it",
    r"""(train|training|trainable|loss|masks?|masked)(_\w+)?
      | (\w+_)?loss_(mask|scale|weight)s?
      | ((sample|example|token|turn)_)?weights?
      | labels? | (chosen|rejected)(_\w+)?
      | (is|do|no|to|should|compute|with)_?(train\w*|loss)
      | supervised? | include | ignored? | skip(ped)? | channel
    """: "which would change here what is trained: mark messages that are not to be trained with "
         "\"weight\": 0, leave out records that are not, and remove the field",
}

# Characters of a .json file, which is read whole: enough for any that people exchange.
MAX_LIST = 2**30
# Of a record. The template is rendered once for each answer, so time grows with the square of their number.
MAX_MESSAGES = 1000

# Fields whose text belongs to the conversation in one layout or another.
CONVERSATION_FIELDS = ("prompt", "completion", "instruction", "input", "output", "context", "suffix",
                       "system_message", "developer")


# ---------------------------------------------------------------- records -> messages


def read_records(path: str | Path) -> Iterator[tuple[list[dict], int]]:
    """Yield (messages, line) for every record of a .jsonl, .json or .jsonl.gz file. line counts from 1; in a
    .json list it is the record's number. messages is [{"role", "content"}, ...], with "weight": 0 on messages
    that are not to be trained, and with the other fields of the record's messages, which the template may
    read.

        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
        {"prompt": "Hi", "completion": "Hello"}
        {"instruction": "Translate.", "input": "Hi", "output": "Salut"}      user: "Translate.\\n\\nHi"
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}

    "train", "training", "trainable" or "loss": false and "mask" or "masked": true mean "weight": 0. Other
    fields that would change what is trained or served are refused (REFUSED). null means absent. A bad record
    is a ValueError with file, line and what is wrong with it.
    """
    path = Path(path)
    check_file(path)
    if not path.name.endswith((".jsonl", ".json", ".jsonl.gz")):
        raise ValueError(f"{path}: unknown file type; records are read from .jsonl, .json and .jsonl.gz")
    text, line = read_text(path, "utf-8-sig", MAX_LIST) if path.suffix == ".json" else "", 0
    try:
        if path.suffix == ".json":
            records = parse_json(text)
            if not isinstance(records, list):
                raise ValueError(f"holds a JSON {type(records).__name__}, not a list of records; "
                                 "one record a line goes into a .jsonl file")
            for line, record in enumerate(records, 1):
                yield to_messages(record), line
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                for line, raw in enumerate(lines_of(file), 1):
                    if raw.strip():
                        yield to_messages(parse_line(raw)), line
    # JSON and Unicode errors are ValueErrors.
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}{f':{line}' if line else ''}: {error}") from None


def to_messages(record: dict) -> list[dict]:
    """The messages of a record in any of the four layouts. Another layout is another branch here. ValueError
    says what is wrong with the record."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, not {type(record).__name__}")
    record = _present(record)
    _refuse(record, "the record")
    if "messages" in record:
        messages = record["messages"]
    elif "conversations" in record:
        messages = _from_sharegpt(record["conversations"])
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
    messages = _with_system_prompt(messages, record)
    messages = [_message(message, number) for number, message in enumerate(messages, 1)]
    _check_messages(messages, record)
    return messages


def _from_sharegpt(turns: object) -> list[dict]:
    """The messages of a record's 'conversations'."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("'conversations' must be a list of {\"from\", \"value\"} objects")
    messages = []
    for number, turn in enumerate(map(_present, turns), 1):
        role = turn.pop("from", turn.get("role"))
        role = SHAREGPT_ROLES.get(str(role), role)
        content = turn.pop("value", turn.get("content"))
        if turn.get("role", role) != role or turn.get("content", content) != content:
            raise ValueError(f"message {number} has 'from' and 'value' in addition to another 'role' or "
                             "'content': keep one of them")
        messages.append({**turn, "role": role, "content": content})
    return messages


def _with_system_prompt(messages: list, record: dict) -> list:
    """The messages with the record's system prompt first. ValueError if they have another one."""
    for field in ("system", "system_prompt"):
        given = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "system"]
        if record.get(field) and not given:
            messages = [{"role": "system", "content": record[field]}, *messages]
        elif record.get(field, "") not in ("", *given):
            raise ValueError(f"the record's {field!r} is not what its system message says: keep one of them")
    return messages


def _check_messages(messages: list[dict], record: dict) -> None:
    """ValueError if the record holds text that is in none of its messages."""
    for field in CONVERSATION_FIELDS:
        text = record.get(field)
        if isinstance(text, str) and not any(text.strip() in m["content"] for m in messages):
            raise ValueError(f"the record's {field!r} is in none of its messages and would not be trained: "
                             "write it into them, or remove the field")
    if "messages" in record and record.get("conversations"):
        raise ValueError("has both 'messages' and 'conversations': keep one of them")


def _present(fields: dict) -> dict:
    """The fields that are not null, which means absent."""
    return {field: value for field, value in fields.items() if value is not None}


def _refuse(fields: dict, owner: str) -> None:
    """ValueError for a field that would change what is trained or served, unless its value is empty or
    NEUTRAL."""
    for field, value in fields.items():
        if value in ("", [], {}) or field in NEUTRAL and value == NEUTRAL[field]:
            continue
        for pattern, reason in REFUSED.items():
            if re.fullmatch(pattern, field, re.IGNORECASE | re.VERBOSE):
                raise ValueError(f"{owner} has {field!r}, {reason}")


def _message(message: dict, number: int) -> dict:
    """A message with "weight": 0 if any of its switches says that it is not trained. ValueError for what is
    wrong with it."""
    if not isinstance(message, dict):
        raise ValueError(f"message {number} must be an object with 'role' and 'content'")
    fields = _present(message)
    role, content = fields.pop("role", None), fields.pop("content", None)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {number} has the unknown role {role!r}; known are {', '.join(ROLES)}")
    switches = {field: fields.pop(field) for field in TRAINS if field in fields}
    for field, value in switches.items():
        if value not in (0, 1):
            raise ValueError(f"message {number} has {field!r}: {value!r}; it must be 0 or 1, false or true")
    weights = {int(value == TRAINS[field]) for field, value in switches.items()}
    if len(weights) > 1:
        raise ValueError(f"message {number} is to be trained and not to be trained: "
                         f"{', '.join(f'{f!r} is {v!r}' for f, v in switches.items())}; keep one of them")
    _refuse(fields, f"message {number}")
    if not isinstance(content, str):
        raise ValueError(f"message {number} ({role}) has no text: 'content' is {type(content).__name__}")
    try:
        (content + json.dumps(fields, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        raise ValueError(f"message {number} ({role}) holds half a surrogate pair, "
                         "which is not text") from None
    return {"role": role, "content": content, **fields, **({"weight": 0} if weights == {0} else {})}


# ---------------------------------------------------------------- messages -> pieces

# The built-in templates: every file in templates/, by name. tulu is the paper's; like the paper's code it
# trims contents. plain joins prompt and completion as that code does: with a space, unless either has
# whitespace there.
TEMPLATES = {file.stem: file for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}


class Piece(NamedTuple):
    """A stretch of rendered text and its kind; special: whether it is a special token that the template
    wrote, which is put in by id."""
    text: str
    kind: int
    special: bool = False


@dataclass(frozen=True)
class Template:
    """A Jinja chat template with what it needs from a tokenizer."""
    name: str
    source: str                 # exported with the model
    tokens: dict[str, str]      # bos_token, eos_token, ... as the template sees them
    special: tuple[str, ...]    # the texts of all special tokens
    date: str                   # YYYY-MM-DD, printed by strftime_now
    end_of_turn: str = ""       # the special token that ends an assistant's message
    lead: str = ""              # what the model writes before a message's content: Qwen3's empty think block
    warning: str = ""           # if answers are trained after other text than the generation prompt

    @property
    def uses_date(self) -> bool:
        return "strftime_now" in self.source

    def content(self, answer: str) -> str:
        """A generated answer as a message's content: without the text that this template puts before one."""
        return answer.removeprefix(self.lead)

    def __call__(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Render as transformers' apply_chat_template does.
        ValueError with the template's own words if it refuses."""
        return render_jinja(
            self.source, self.name, self.date, messages=messages, tools=None, documents=None,
            add_generation_prompt=add_generation_prompt, **self.tokens)


# A conversation to try templates with.
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def load_template(name: str, tokenizer: Tokenizer, date: str | None = None) -> Template:
    """name: auto (the checkpoint's own template), a key of TEMPLATES, or the path of a .jinja file; date:
    YYYY-MM-DD for templates that print today's date, default today. ValueError if the template does not
    exist, or ends an assistant's message without a special token: the model could never learn to stop.
    """
    if name == "auto":
        source = tokenizer.chat_template
        if source is None:
            raise ValueError(f"--template auto: {tokenizer.folder} has no chat template; choose one of "
                             f"{', '.join(TEMPLATES)} or give a .jinja file")
    elif name in TEMPLATES:
        source = TEMPLATES[name].read_text(encoding="utf-8")
        if not tokenizer.adds_bos:
            # This tokenizer does not add BOS to plain text, so its model was not trained with one. It is left
            # out of the exported source, too.
            source = re.sub(r"{{-? bos_token }}", "", source)
    elif name.endswith(".jinja") and os.path.lexists(name):
        source = read_text(name)
    else:
        raise ValueError(f"--template {name}: neither auto, nor one of {', '.join(TEMPLATES)}, "
                         "nor a .jinja file")
    try:
        date = Date.fromisoformat(str(date)).isoformat() if date else Date.today().isoformat()
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
        try:
            warnings.append(_compare_prompts([*before, *PROBE], template))
        except TooMuch:
            raise
        except ValueError:
            # The template may refuse such a conversation.
            continue
    return replace(template, warning=next(filter(None, warnings), ""))


def _compare_prompts(conversation: list[dict], template: Template) -> str:
    """A warning if the conversation's last message is trained after other text than its generation prompt;
    else ""."""
    prompt, pieces = _generation_prompt(conversation[:-1], template), render(conversation, template)
    if prompt is None:
        return f"template {template.name} renders no generation prompt: answers are trained without one"
    kinds = [piece.kind for piece in pieces]
    # The first piece after the last question.
    first = len(kinds) - kinds[::-1].index(INSTRUCTION)
    trained = "".join(piece.text for piece in pieces[:kinds.index(COMPLETION, first)])
    if "".join(piece.text for piece in pieces).startswith(prompt):
        return ""
    # Up to the question's end they are usually the same, so that part is not shown.
    asked = "".join(piece.text for piece in pieces[:first])
    start = len(asked) if prompt.startswith(asked) else 0
    return (f"template {template.name}: the generation prompt is {prompt[start:]!r}, but the trained text "
            f"has {trained[start:]!r} in its place, so answers are trained after other text than they are "
            "generated after; to make both the same, edit a copy and give it as --template FILE.jinja")


def _generation_prompt(messages: list[dict], template: Template) -> str | None:
    """What serving puts before the answer to these messages; None if the template refuses them."""
    try:
        return template(messages, add_generation_prompt=True)
    except TooMuch:
        raise
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

    COMPLETION is all that the model must write itself: from the end of the generation prompt (the messages
    before, rendered with add_generation_prompt) to the first special token after the content. Where the text
    does not begin with that prompt, it starts at the content. The template is rendered once more for each
    assistant message, so time grows with the square of their number.

    ValueError for more than MAX_MESSAGES, if the template refuses the messages, or if its text cannot be
    taken apart into them because it drops, repeats or rewrites a message: better no example than a wrong
    mask.
    """
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"has {len(messages):,} messages, more than {MAX_MESSAGES:,}: split the record")
    shown = [{field: value for field, value in m.items() if field != "weight"} for m in messages]
    special = _special_pattern(template.special)
    others = [{field: m[field] for field in m if field not in ("role", "content")} for m in shown]
    if any(others) and (token := special.search(str(others))):
        # This matters only if the template reads the field.
        if template(shown) != template([{"role": m["role"], "content": m["content"]} for m in shown]):
            raise ValueError(f"template {template.name} reads a field besides 'content' that holds the "
                             f"special token {token[0]!r}, which would not stay text there: remove it")
    text = template(shown, add_generation_prompt)
    literals, contents = _take_apart(text, shown, template, add_generation_prompt)
    pieces: list[Piece] = []

    def add(text: str, kind: int) -> None:
        pieces.extend(Piece(token, kind, special=i % 2 == 1) for i, token in enumerate(special.split(text)))

    # Where in the text the literal begins, and the kind of the answer that it ends, if any.
    position, answer_kind = 0, None
    for i, (literal, content) in enumerate(zip(literals, [*contents, None])):
        end = 0
        if answer_kind is not None:
            end = _end_of_answer(literal, template)
            add(literal[:end], answer_kind)
        if content is None:
            # The end of the text, or an empty message that the template left out, literal and all.
            add(literal[end:], TEMPLATE)
            continue
        role = messages[i]["role"]
        kind = CONTEXT if messages[i].get("weight") == 0 else ROLES[role]
        start, answer_kind = len(literal), None
        if role == "assistant":
            start = _start_of_answer(shown[:i], template, text, position, end, literal, content)
            answer_kind = kind
        add(literal[end:start], TEMPLATE)
        add(literal[start:], kind)
        # The generation prompt may end inside the content ("<think>").
        start_in_content = max(0, start - len(literal))
        pieces.append(Piece(content[:start_in_content], TEMPLATE))
        pieces.append(Piece(content[start_in_content:], kind))
        position += len(literal) + len(content)
    return [piece for piece in pieces if piece.text]


def _end_of_answer(literal: str, template: Template) -> int:
    """How much of the literal after an answer's content the model must write: up to its first special token,
    or nothing if that token does not end a turn. Some templates end only the last answer, so the next special
    token is another message's."""
    token = _special_pattern(template.special).search(literal)
    ends = (template.end_of_turn, template.tokens.get("eos_token"))
    # While load_template tries the template, end_of_turn is not known yet: any special token counts.
    if token and (not template.end_of_turn or token[0] in ends):
        return token.end()
    return 0


def _start_of_answer(before: list[dict], template: Template, text: str, position: int, end: int,
                     literal: str, content: str) -> int:
    """Where in literal + content the answer starts: after the generation prompt if the text begins with it,
    else at the content. before: the messages before the answer; position: of the literal in the text; end:
    how much of the literal belongs to the answer before."""
    prompt = _generation_prompt(before, template)
    if prompt is None or not text.startswith(prompt):
        return len(literal)
    start = len(prompt) - position
    if not end <= start <= len(literal) + len(content):
        return len(literal)
    # A special token of the prompt must not come from the content, where it is only text.
    tokens = _special_pattern(template.special).finditer(prompt)
    if any(token.end() - position > len(literal) for token in tokens):
        return len(literal)
    return start


@cache
def _special_pattern(special: tuple[str, ...]) -> re.Pattern:
    """Matches the special tokens' texts; nothing if there are none."""
    return re.compile(
        "(" + ("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)") + ")")


def _take_apart(text: str, messages: list[dict], template: Template, add_generation_prompt: bool
                ) -> tuple[list[str], list[str | None]]:
    """The rendered text as (literals, contents): a literal, a content, a literal, a content, ..., a literal.
    There is one content for each message, None for an empty one that the template tests for and leaves out.
    """
    contents = [m["content"] for m in messages]
    mark = "\ue000"
    while mark in "".join(contents) + text + template.source:
        mark += "\ue000"
    problems = []

    def literals_around(edges: int, mark_empty: bool) -> list[str] | None:
        """The literals, from a rendering with sentinels as contents. Sentinels have the whitespace at the
        edges of the contents `edges` times. mark_empty: empty contents have sentinels, too."""
        sentinels = []
        for i, content in enumerate(contents):
            before = content[:len(content) - len(content.lstrip())]
            after = content[len(content.rstrip()):]
            sentinel = f"{before * edges}{mark}\ue001{i}\ue002{after * edges}"
            sentinels.append(sentinel if content or mark_empty else "")
        try:
            remaining = template([{**m, "content": x} for m, x in zip(messages, sentinels)],
                                 add_generation_prompt)
        except TooMuch:
            raise
        except ValueError as refusal:
            problems.append(str(refusal))
            return None
        literals = []
        for message, sentinel in zip(messages, sentinels):
            literal, found = "", True
            if sentinel:
                literal, found, remaining = remaining.partition(sentinel)
            if not found:
                problems.append(f"template {template.name} leaves out the {message['role']} message")
                return None
            literals.append(literal)
        literals.append(remaining)
        return literals if mark not in "".join(literals) else None

    def as_they_are(mark_empty: bool) -> tuple[list[str], list[str]] | None:
        """Contents that the template writes unchanged. Templates may test the whitespace at their edges
        (`plain` does), so the sentinels have it. If doubling it changes no literal, it is not stripped."""
        literals = literals_around(1, mark_empty)
        if literals is None or literals != literals_around(2, mark_empty):
            return None
        return _match(text, literals, [[c] for c in contents])

    def stripped_or_json(mark_empty: bool) -> tuple[list[str], list[str]] | None:
        """Contents that the template strips on either side, or writes as JSON, like a tool's answer."""
        literals = literals_around(0, mark_empty)
        if literals is None:
            return None
        variants = [[c, c.strip(), c.lstrip(), c.rstrip(), json.dumps(c, ensure_ascii=False)[1:-1]]
                    for c in contents]
        return _match(text, literals, variants)

    for mark_empty in (True, False):
        if found := as_they_are(mark_empty) or stripped_or_json(mark_empty):
            literals, written = found
            return literals, [x if c or mark_empty else None for x, c in zip(written, contents)]
    problem = problems[0] if problems else f"template {template.name} rewrites or repeats a message's text"
    raise ValueError(f"{problem}: its spans cannot be told apart, change the record or use another "
                     "--template")


def _match(text: str, literals: list[str], variants: list[list[str]]) -> tuple[list[str], list[str]] | None:
    """Choose a variant of each content so that literals and contents in turn spell the text. Returns
    (literals, contents chosen), or None if no choice does."""
    # (content, position in text, contents chosen): depth first, earlier variants first.
    stack = [(0, 0, ())]
    tried = set()
    while stack:
        i, position, chosen = stack.pop()
        if (i, position) in tried or not text.startswith(literals[i], position):
            continue
        tried.add((i, position))
        position += len(literals[i])
        if i == len(variants):
            if position == len(text):
                return literals, list(chosen)
            continue
        stack += [(i + 1, position + len(variant), (*chosen, variant)) for variant in reversed(variants[i])
                  if text.startswith(variant, position)]
    return None


# ---------------------------------------------------------------- pieces -> tokens

# What the tokenizers library takes for whitespace; Python's includes the separators \x1c to \x1f.
SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")


def tokenize(pieces: list[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Pieces of one example -> (ids, kinds), one kind for each token."""
    return tokenize_batch([pieces], tokenizer)[0]


def tokenize_batch(examples: list[list[Piece]], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """tokenize() for many examples at once: the tokenizer uses all cores on a batch.

    Special tokens are put in by id; the text between two of them is encoded as a whole, whatever pieces it is
    made of, so the ids are those of the text as it is served. A token takes its kind from the characters it
    covers:

        "...[/INST] Yes"  ->  "[/INST]" TEMPLATE, " Yes" COMPLETION

    If a token's TEMPLATE characters are all whitespace, it belongs to the content that it touches (" Yes"
    above): whoever writes the content writes that token. Otherwise a token that touches TEMPLATE is TEMPLATE.
    If it covers two contents, it has the kind of the first.
    """
    layout = [_runs(pieces, tokenizer) for pieces in examples]
    encoded = {}
    for encoder, is_at_start in ((tokenizer.at_start, True), (tokenizer.after_special, False)):
        keys = [(e, i) for e, runs in enumerate(layout) for i, run in enumerate(runs)
                if not run.special and (i == 0) == is_at_start]
        with naming(f"{tokenizer.folder}/tokenizer.json"):
            results = encoder.encode_batch([layout[e][i].text for e, i in keys], add_special_tokens=False)
        encoded.update(zip(keys, results))

    out = []
    for e, runs in enumerate(layout):
        ids, kinds = [], []
        for i, (text, kinds_of_text, special) in enumerate(runs):
            if special:
                ids.append(tokenizer.special[text])
                kinds += kinds_of_text
                continue
            tokenizer.check_content(text, encoded[e, i].ids)
            ids += encoded[e, i].ids
            for start, end in encoded[e, i].offsets:
                # Characters that a normalizer puts before the text have the empty span (0, 0). Their token
                # has the kind of the text's first character.
                kinds.append(_token_kind(text, kinds_of_text, start, max(end, 1)))
        out.append((ids, kinds))
    return out


class _Run(NamedTuple):
    """A special token and its kind, or the text between two of them and the kind of each character."""
    text: str
    kinds: list[int]
    special: bool


def _runs(pieces: list[Piece], tokenizer: Tokenizer) -> list[_Run]:
    """The pieces of one example, joined between special tokens, without the whitespace that those strip."""
    runs: list[_Run] = []
    text, kinds = "", []
    # The last piece only ends the last text.
    for piece in [*pieces, Piece("", TEMPLATE, special=True)]:
        if not piece.special:
            text += piece.text
            kinds += [piece.kind] * len(piece.text)
            continue
        start, end = 0, len(text)
        if runs and runs[-1].special and runs[-1].text in tokenizer.strips_right:
            start = end - len(text.lstrip(SPACES))
        if piece.text in tokenizer.strips_left:
            end = len(text.rstrip(SPACES))
        if start < end:
            runs.append(_Run(text[start:end], kinds[start:end], False))
        if piece.text:
            runs.append(_Run(piece.text, [piece.kind], True))
        text, kinds = "", []
    return runs


def _token_kind(text: str, kinds: list[int], start: int, end: int) -> int:
    """The kind of the token that covers text[start:end]; kinds: of the text's characters."""
    covered = kinds[start:end]
    if TEMPLATE not in covered:
        return covered[0]
    without_space = [kind for character, kind in zip(text[start:end], covered)
                     if kind != TEMPLATE or not character.isspace()]
    return TEMPLATE if TEMPLATE in without_space or not without_space else without_space[0]


def matches_serving(pieces: list[Piece], ids: list[int], tokenizer: Tokenizer) -> bool:
    """Whether the ids of an example were compared with those that serving gives, and found equal. False if
    they cannot be compared: serving parses special tokens in contents, and one of these spells a special
    token, or something that the normalizer makes one of. ValueError if the ids differ, or BOS is written
    twice."""
    def served(text: str) -> list[int]:
        with naming(f"{tokenizer.folder}/tokenizer.json"):
            return tokenizer.reference.encode(text, add_special_tokens=False).ids

    text = "".join(piece.text for piece in pieces)
    spelled = {piece.kind for piece in pieces if not piece.special and
               served(piece.text) != tokenizer.at_start.encode(piece.text, add_special_tokens=False).ids}
    if spelled and TEMPLATE not in spelled:
        return False
    if served(text) != ids:
        raise ValueError(f"{tokenizer.folder}/tokenizer.json treats text around special tokens in a way that "
                         f"is not supported: pieces and whole text give different ids for {text[:80]!r}")
    bos = tokenizer.special.get(tokenizer.bos_token)
    if tokenizer.adds_bos and ids[:2] == [bos, bos]:
        raise ValueError(f"the template writes the BOS token {tokenizer.bos_token} twice")
    return True


def check_vocabulary(rows: int, tokenizer: Tokenizer, template: Template) -> None:
    """ValueError unless every token that the template writes has one of the embedding's `rows`. Tokens that
    are never used, such as a padding token added without resizing, need none."""
    for piece in render(PROBE, template):
        if piece.special:
            check_rows([tokenizer.special[piece.text]], rows,
                       f"--template {template.name} writes {piece.text!r},", tokenizer.folder)
