"""Messages -> spans -> tokens: chat templates, kinds of tokens. (records.py has where messages come from.)

    pieces = render(messages, template)         # [("<|user|>\n", TEMPLATE), ("2+2?", INSTRUCTION), ...]
    ids, kinds = tokenize(pieces, tokenizer)    # one kind a token

What differs from the usual way: spans are made by construction. A chat template is rendered around sentinels
and split at them, so no marker is ever searched for in token ids and no prompt is assumed to be a token
prefix.
"""
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date as Date
from difflib import SequenceMatcher
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

from runtime.foreign import check_file, read_text
from runtime.jinja import Refused, render_jinja
from runtime.tokenizer import Tokenizer, check_rows, naming_file

KINDS = ("template", "system", "instruction", "completion", "context")
TEMPLATE, SYSTEM, INSTRUCTION, COMPLETION, CONTEXT = range(len(KINDS))
ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": INSTRUCTION, "tool": INSTRUCTION,
         "function": INSTRUCTION, "ipython": INSTRUCTION, "assistant": COMPLETION}
# Of a record. The template is rendered once for each answer, so time grows with the square of their number.
MAX_MESSAGES = 1000


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

    @cached_property
    def special_pattern(self) -> re.Pattern:
        """Matches the special tokens' texts; nothing if there are none."""
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile("(" + ("|".join(map(re.escape, longest_first)) or r"(?!)") + ")")

    def ends_turn(self, token: str) -> bool:
        """Whether this special token ends an answer. While load_template() tries the template, end_of_turn is
        not known yet, and any does."""
        return not self.end_of_turn or token in (self.end_of_turn, self.tokens.get("eos_token"))

    def content(self, answer: str) -> str:
        """A generated answer as a message's content: without the text that this template puts before one."""
        return answer.removeprefix(self.lead)

    def expected(self, messages: list[dict]) -> str:
        """What content() of a generated answer must be to equal the last of the messages, an assistant's."""
        if not _holds_more_than_a_content(messages[-1]):
            return messages[-1]["content"]
        prompt = self(messages[:-1], add_generation_prompt=True)
        written = self(messages)[len(prompt):].partition(self.end_of_turn)[0]
        return self.content(self.special_pattern.sub("", written))

    def __call__(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Render as transformers' apply_chat_template does. The first message may hold the record's "tools".
        Refused, a ValueError, with the template's own words if it does not take them."""
        shown = [{field: m[field] for field in m if field not in ("weight", "tools")} for m in messages]
        return render_jinja(
            self.source, self.name, self.date, messages=shown, tools=_tools(messages) or None, documents=None,
            add_generation_prompt=add_generation_prompt, **self.tokens)


def _holds_more_than_a_content(message: dict) -> bool:
    return bool(message.get("tool_calls") or message.get("reasoning_content"))


def is_trained_answer(message: dict) -> bool:
    """Whether a message is an assistant's, and not marked with weight 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def has_empty_answer(messages: list[dict]) -> bool:
    """Whether an assistant's message that is trained holds nothing, so that only its end is."""
    return any(is_trained_answer(m) and not m["content"].strip()
               and not _holds_more_than_a_content(m) for m in messages)


def _tools(messages: list[dict]) -> list[dict]:
    """The definitions of a record's tools, which its first message holds."""
    return messages[0].get("tools", []) if messages else []


# A conversation to try templates with.
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def check_template_flags(name: str, date: str) -> None:
    """ValueError that names the flag for a --template that is neither auto, nor a key of TEMPLATES, nor a
    .jinja file, and for a --date that is not YYYY-MM-DD; "" is today."""
    if name.endswith(".jinja"):
        try:
            check_file(name)
        except ValueError as error:
            raise ValueError(f"--template {error}") from None
    elif name not in ("auto", *TEMPLATES):
        raise ValueError(f"--template {name}: neither auto, nor one of {', '.join(TEMPLATES)}, "
                         "nor a .jinja file")
    try:
        Date.fromisoformat(date or "2000-01-01")
    except ValueError:
        raise ValueError(f"--date {date}: write it as YYYY-MM-DD") from None


def load_template(name: str, tokenizer: Tokenizer, date: str = "") -> Template:
    """name, date: as for check_template_flags(). ValueError if they are not so, if auto is given and the
    checkpoint has no template of its own, or if the template ends an assistant's message without a special
    token: the model could never learn to stop."""
    date = str(date or "")      # lm_eval makes a number of 20260105
    check_template_flags(name, date)
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
    else:
        source = read_text(name)
    date = (Date.fromisoformat(date) if date else Date.today()).isoformat()
    template = Template(name, source, tokenizer.named_tokens, tuple(tokenizer.special), date)
    try:
        probe = render(PROBE, template)
    except ValueError as error:
        raise ValueError(f"{tokenizer.folder}: {error}" if name == "auto" else str(error)) from None
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
        # The template may refuse such a conversation.
        with suppress(Refused):
            warnings.append(_compare_prompts([*before, *PROBE], template))
    warning = next(filter(None, warnings), "")
    if name == "auto" and (others := ", ".join(tokenizer.other_templates)):
        warning += "; " * bool(warning) + (
            f"{tokenizer.folder} has other chat templates, too ({others}), which are neither trained nor "
            "exported; give the text of one as --template FILE.jinja to train it")
    return replace(template, warning=warning)


def _compare_prompts(conversation: list[dict], template: Template) -> str:
    """A warning if the conversation's last message is trained after other text than its generation prompt;
    else ""."""
    prompt, pieces = _generation_prompt(conversation[:-1], template), render(conversation, template)
    if prompt is None:
        return f"template {template.name} renders no generation prompt: answers are trained without one"
    if "".join(piece.text for piece in pieces).startswith(prompt):
        return ""
    kinds = [piece.kind for piece in pieces]
    # The first piece after the last question.
    first = len(kinds) - kinds[::-1].index(INSTRUCTION)
    trained = "".join(piece.text for piece in pieces[:kinds.index(COMPLETION, first)])
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
    except Refused:
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

    Tool calls and thoughts are COMPLETION, too. The definitions of a record's tools are SYSTEM: all text that
    the template does not write without them.

    ValueError for more than MAX_MESSAGES, if the template refuses the messages, or if its text cannot be
    taken apart into them because it drops, repeats or rewrites a message: better no example than a wrong
    mask.
    """
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"has {len(messages):,} messages, more than {MAX_MESSAGES:,}: split the record")
    special = template.special_pattern
    text = template(messages, add_generation_prompt)
    messages = _without_dropped_thoughts(messages, template, text, add_generation_prompt)
    # The template composes these answers of several parts, in its own way.
    composed = {i for i, m in enumerate(messages) if _holds_more_than_a_content(m)}
    _refuse_special_tokens(messages, template, composed)
    try:
        parts = _take_apart(text, messages, template, add_generation_prompt, composed)
    except Refused:
        # A template such as Qwen3's looks for the thoughts in a content.
        thinking = {i for i, m in enumerate(messages) if m["role"] == "assistant" and
                    THOUGHTS.fullmatch(m["content"]) and not special.search("\n".join(_thoughts(m)))}
        if thinking <= composed:
            raise
        composed |= thinking
        parts = _take_apart(text, messages, template, add_generation_prompt, composed)
    literals, contents, without_tools = parts

    # Where literals and contents begin, in turn, and the kind of each character.
    borders = [0]
    for literal, content in zip(literals, [*contents, ""]):
        borders += [borders[-1] + len(literal), borders[-1] + len(literal) + len(content or "")]
    kinds = bytearray([TEMPLATE]) * len(text)

    def mark(start: int, end: int, kind: int) -> None:
        kinds[start:end] = bytes([kind]) * (end - start)

    definitions = ""
    for position, literal, without in zip(borders[::2], literals, without_tools):
        for start, end in _definitions(literal, without, template):
            mark(position + start, position + end, SYSTEM)
            definitions += literal[start:end]
    _check_definitions(messages, template, definitions)
    end_of_last = 0
    for i, message in enumerate(messages):
        position, start, end = borders[2 * i:2 * i + 3]
        kind = CONTEXT if message.get("weight") == 0 else ROLES[message["role"]]
        if message["role"] == "assistant":
            next_content = next((borders[2 * j + 1] for j in range(i + 1, len(messages))
                                 if contents[j] is not None), len(text))
            if i in composed:
                start, end = _composed_answer(messages, i, template, text, max(position, end_of_last),
                                              next_content)
            elif contents[i] is not None:
                start = _start_of_answer(messages[:i], template, text, end_of_last, start, end)
                end += _end_of_answer(text[end:next_content], template)
            end_of_last = end
        mark(start, end, kind)

    pieces: list[Piece] = []
    for i, (start, end) in enumerate(pairwise(borders)):
        # Only literals, which have even numbers, hold special tokens.
        for j, part in enumerate(special.split(text[start:end]) if i % 2 == 0 else [text[start:end]]):
            # Runs of one kind.
            for run in re.finditer(rb"(.)\1*", kinds[start:start + len(part)], re.DOTALL):
                pieces.append(Piece(part[run.start():run.end()], run[0][0], special=j % 2 == 1))
            start += len(part)
    return pieces


def _refuse_special_tokens(messages: list[dict], template: Template, composed: set[int]) -> None:
    """ValueError if the template writes a special token that one of the messages' fields spells: it could not
    be told from the template's own. Contents are safe, except those of composed answers."""
    fields = [[m[field] for field in m if field not in ("role", "content", "weight")] for m in messages]
    # The template writes the tags around thoughts itself, so they may be special tokens.
    contents = [_thoughts(messages[i]) for i in composed]
    token = template.special_pattern.search(str([fields, contents]))
    # This matters only if the template reads the field.
    if token and template(messages) != template([{"role": m["role"], "content": m["content"]}
                                                 for m in messages]):
        raise ValueError(f"template {template.name} reads a field besides 'content' that holds the "
                         f"special token {token[0]!r}, which would not stay text there: remove it")


# An answer with thoughts: they, and what is said. In some templates the generation prompt opens them.
THOUGHTS = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)


def _thoughts(message: dict) -> tuple[str, str]:
    """What an answer thinks, and what it says."""
    thoughts, said = found.groups() if (found := THOUGHTS.fullmatch(message["content"])) else (
        "", message["content"])
    return message.get("reasoning_content", thoughts), said


def _without_dropped_thoughts(messages: list[dict], template: Template, text: str,
                              add_generation_prompt: bool) -> list[dict]:
    """The messages without the thoughts of answers before the last question, if the template leaves them out
    of the text, as it does when they are served."""
    question = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
    thinking = {i for i, m in enumerate(messages[:question]) if m["role"] == "assistant" and _thoughts(m)[0]}
    for strip in (str, lambda said: said.lstrip("\n"), str.strip) if thinking else ():
        shorter = [{field: m[field] for field in m if field != "reasoning_content"}
                   | {"content": strip(_thoughts(m)[1])} if i in thinking else m
                   for i, m in enumerate(messages)]
        if template(shorter, add_generation_prompt) == text:
            return shorter
    return messages


def _definitions(literal: str, without: str, template: Template) -> Iterator[tuple[int, int]]:
    """Where in a literal the definitions of the record's tools stand, as (start, end): what the template
    writes only if there are tools. without: the same literal without tools. Special tokens are left out."""
    if literal == without:
        return
    special = template.special_pattern

    def units(text: str) -> list[str]:
        """Special tokens, newlines, and what stands between them."""
        return [unit for i, part in enumerate(special.split(text))
                for unit in ([part] if i % 2 else re.findall(r"\n|[^\n]+", part))]

    tokens = units(literal)
    matcher = SequenceMatcher(lambda unit: unit == "\n", units(without), tokens, autojunk=False)
    inserted = {j for tag, _, _, first, last in matcher.get_opcodes() if tag != "equal"
                for j in range(first, last)}
    position = 0
    for j, token in enumerate(tokens):
        if j in inserted and not special.fullmatch(token):
            yield position, position + len(token)
        position += len(token)


def _check_definitions(messages: list[dict], template: Template, definitions: str) -> None:
    """ValueError if the definitions of the record's tools, as rendered, leave one out."""
    for tool in _tools(messages):
        name = tool.get("function", tool)["name"]
        if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", definitions):
            raise ValueError(f"template {template.name} leaves out the definition of the tool {name!r}: "
                             "give a --template that writes 'tools', or remove them from the record")


def _composed_answer(messages: list[dict], i: int, template: Template, text: str, first: int, limit: int
                     ) -> tuple[int, int]:
    """(start, end) in the text of answer i, whose tool calls or thoughts the template places itself: from the
    end of its generation prompt to the first token that ends a turn. It must stand in text[first:limit].
    ValueError if it does not, or if something that it holds is left out."""
    message, special = messages[i], template.special_pattern
    place = f"template {template.name} writes message {i + 1}"
    if message.get("weight") != 0 and _thoughts(message)[0].strip() not in text:
        raise ValueError(f"template {template.name} drops the thoughts of message {i + 1}, which would not "
                         "be trained: give a --template that keeps them, such as tulu or an edited copy of "
                         "this one as FILE.jinja, or take them out of the records")
    prompt, alone = _generation_prompt(messages[:i], template), template(messages[:i + 1])
    start = len(prompt or "")
    if prompt is None or not text.startswith(prompt) or not alone.startswith(prompt) or (
            not first <= start <= limit):
        raise ValueError(f"{place} after other text than its generation prompt, so what the model writes "
                         f"there cannot be told apart: {_way_out(message)}")

    def end_of_turn(rendered: str, limit: int) -> int | None:
        return next((token.end() for token in special.finditer(rendered, start, limit)
                     if template.ends_turn(token[0])), None)

    end, end_alone = end_of_turn(text, limit), end_of_turn(alone, len(alone))
    if end is None or end_alone is None:
        raise ValueError(f"{place} without {template.end_of_turn!r} at its end, so the model could not learn "
                         f"to stop: {_way_out(message)}")
    if special.sub("", alone[end_alone:]).strip():
        raise ValueError(f"{place} as several turns, which the model cannot write at once: "
                         f"{_way_out(message)}")
    if message.get("weight") != 0:
        _check_nothing_is_left_out(message, i, template, text[start:end])
    return start, end


def _check_nothing_is_left_out(message: dict, i: int, template: Template, answer: str) -> None:
    """ValueError unless the answer, as rendered, has everything that message i holds."""
    def is_missing(value: object, times: int) -> bool:
        forms = ([value.strip(), json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]]
                 if isinstance(value, str) else [json.dumps(value), str(value)])
        return all(answer.count(form) < times for form in forms)

    def squeezed(text: str) -> str:
        return re.sub(r"</?think>|\s+", "", text)

    thoughts, said = _thoughts(message)
    parts = {"thoughts": [thoughts], "content": [said]}
    for call in message.get("tool_calls", ()):
        # The calls of one function together: one of them may not stand for another.
        parts.setdefault(f"call of {call['function']['name']!r}", []).extend(_leaves(call["function"]))
    times = Counter((type(value), value) for values in parts.values() for value in values)
    for part, values in parts.items():
        if any(is_missing(value, times[type(value), value]) for value in values):
            raise ValueError(f"template {template.name} leaves out or rewrites the {part} of message "
                             f"{i + 1}, which would not be trained: {_way_out(message)}")
    # Where the thoughts are a part of the content, the template must not add anything to it.
    written = template.special_pattern.sub("", answer)
    if not _holds_more_than_a_content(message) and squeezed(written) != squeezed(thoughts + said):
        raise ValueError(f"template {template.name} rewrites the content of message {i + 1}: "
                         f"{_way_out(message)}")


def _leaves(value: object) -> list[object]:
    """What a function call holds: its name, and the names and values of its arguments, at any depth."""
    leaves, stack = [], [value["name"], value["arguments"]]
    while stack:
        match stack.pop():
            case dict(fields):
                stack += [*fields, *fields.values()]
            case list(values):
                stack += values
            case leaf:
                leaves.append(leaf)
    return leaves


def _way_out(message: dict) -> str:
    held = "tool calls" if message.get("tool_calls") else "thoughts"
    return (f"give another --template, mark the message \"weight\": 0 if it need not be trained, or take its "
            f"{held} out")


def _end_of_answer(literal: str, template: Template) -> int:
    """How much of the literal after an answer's content the model must write: up to its first special token,
    or nothing if that token does not end a turn. Some templates end only the last answer, so the next special
    token is another message's."""
    token = template.special_pattern.search(literal)
    return token.end() if token and template.ends_turn(token[0]) else 0


def _start_of_answer(before: list[dict], template: Template, text: str, first: int, content: int, end: int
                     ) -> int:
    """Where in the text an answer starts: after its generation prompt if the text begins with that, else at
    its content, text[content:end]. before: the messages before the answer; first: where it may start."""
    prompt = _generation_prompt(before, template)
    if prompt is None or not text.startswith(prompt):
        return content
    start = len(prompt)
    # A special token of the prompt must not come from the content, where it is only text.
    special = template.special_pattern.finditer(prompt)
    if not first <= start <= end or any(token.end() > content for token in special):
        return content
    return start


def _take_apart(text: str, messages: list[dict], template: Template, add_generation_prompt: bool,
                composed: set[int]) -> tuple[list[str], list[str | None], list[str]]:
    """The rendered text as (literals, contents): a literal, a content, a literal, a content, ..., a literal.
    There is one content for each message, None for an empty one that the template tests for and leaves out,
    and for those in `composed`: they are a part of the literal after them. The third list has the literals of
    the same messages without tools."""
    contents = ["" if i in composed else m["content"] for i, m in enumerate(messages)]
    mark = "\ue000"
    while mark in "".join(contents) + text + template.source:
        mark += "\ue000"
    problems = []

    def literals_around(edges: int, mark_empty: bool, with_tools: bool = True) -> list[str] | None:
        """The literals, from a rendering with sentinels as contents. Sentinels have the whitespace at the
        edges of the contents `edges` times. mark_empty: empty contents have sentinels, too."""
        sentinels = []
        for i, content in enumerate(contents):
            before = content[:len(content) - len(content.lstrip())]
            after = content[len(content.rstrip()):]
            sentinel = f"{before * edges}{mark}\ue001{i}\ue002{after * edges}"
            sentinels.append(sentinel if content or mark_empty and i not in composed else "")
        shown = [m if i in composed else {**m, "content": sentinels[i]} for i, m in enumerate(messages)]
        if not with_tools:
            shown[0] = {**shown[0], "tools": []}
        try:
            remaining = template(shown, add_generation_prompt)
        except Refused as refusal:
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

    for mark_empty, edges in product((True, False), (1, 0)):
        literals = literals_around(edges, mark_empty)
        # Contents that the template writes unchanged. Templates may test the whitespace at their edges
        # (`plain` does), so the sentinels have it. If doubling it changes no literal, it is not stripped.
        if literals is None or edges and literals != literals_around(2, mark_empty):
            continue
        variants = [[c] for c in contents]
        if not edges:
            # Contents that the template strips on either side, or writes as JSON, like a tool's answer.
            variants = [[c, c.strip(), c.lstrip(), c.rstrip(), json.dumps(c, ensure_ascii=False)[1:-1]]
                        for c in contents]
        written = _match(text, literals, variants)
        if written is None:
            continue
        without_tools = literals_around(edges, mark_empty, False) if _tools(messages) else literals
        if without_tools:
            written = [x if c or mark_empty and i not in composed else None
                       for i, (x, c) in enumerate(zip(written, contents))]
            return literals, written, without_tools
    problem = problems[0] if problems else f"template {template.name} rewrites or repeats a message's text"
    raise Refused(f"{problem}: its spans cannot be told apart, change the record or use another --template")


def _match(text: str, literals: list[str], variants: list[list[str]]) -> list[str] | None:
    """Choose a variant of each content so that literals and contents in turn spell the text. Returns the
    contents chosen, or None if no choice does."""
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
                return list(chosen)
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
        with naming_file(f"{tokenizer.folder}/tokenizer.json"):
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
        with naming_file(f"{tokenizer.folder}/tokenizer.json"):
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
