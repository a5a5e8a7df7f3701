"""Messages -> spans -> tokens: chat templates, kinds of tokens. (records.py has where messages come from.)

    pieces = render(messages, template)         # [("<|user|>\n", TEMPLATE), ("2+2?", INSTRUCTION), ...]
    ids, kinds = tokenize(pieces, tokenizer)    # one kind a token

What differs from the usual way: spans are made by construction. A chat template is rendered around sentinels
and split at them, so no marker is ever searched for in token ids and no prompt is assumed to be a token
prefix.
"""
import contextlib
import json
import re
from dataclasses import dataclass, replace
from datetime import date as Date
from functools import cache
from pathlib import Path
from typing import NamedTuple

from runtime.jinja import render_jinja
from runtime.tokenizer import Tokenizer, check_rows

KINDS = ("template", "system", "instruction", "completion", "context")
TEMPLATE, SYSTEM, INSTRUCTION, COMPLETION, CONTEXT = range(len(KINDS))
ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": INSTRUCTION, "tool": INSTRUCTION,
         "function": INSTRUCTION, "ipython": INSTRUCTION, "assistant": COMPLETION}


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
        # The template may refuse such a conversation.
        with contextlib.suppress(ValueError):
            warnings.append(_compare_prompts([*before, *PROBE], template))
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

    ValueError if the template refuses the messages, or if its text cannot be taken apart into them because it
    drops, repeats or rewrites a message: better no example than a wrong mask.
    """
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


# An answer with thoughts: what opens them, they, what closes them, and the rest. In some templates the
# generation prompt opens them.
THOUGHTS = re.compile(r"(\s*(?:<think>\s*)?)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


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

    def variants(content: str) -> list[str]:
        return [content, content.strip(), content.lstrip(), content.rstrip(),
                json.dumps(content, ensure_ascii=False)[1:-1]]

    def stripped_or_json(mark_empty: bool) -> tuple[list[str], list[str]] | None:
        """Contents that the template strips on either side, or writes as JSON, like a tool's answer."""
        literals = literals_around(0, mark_empty)
        if literals is None:
            return None
        return _match(text, literals, [variants(content) for content in contents])

    def with_thoughts() -> tuple[list[str], list[str]] | None:
        """Contents with thoughts, which the template writes in its own way. It may drop those of answers
        before the last question, as it does when they are served. ValueError if it drops others."""
        thoughts = [THOUGHTS.fullmatch(m["content"]) if m["role"] == "assistant" else None for m in messages]
        if not any(thoughts):
            return None
        question = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        # A thought and the answer after it have a sentinel each: (message, text, sentinel, is a thought).
        sentinels, parts = [], []
        for i, (content, thought) in enumerate(zip(contents, thoughts)):
            first, second = (f"{mark}\ue001{i}{name}\ue002" for name in "ab")
            if thought:
                before, thinking, between, answer = thought.groups()
                sentinels.append(f"{before}{first}{between}{second}")
                parts += [(i, thinking, first, True), (i, answer, second, False)]
            else:
                sentinels.append(first)
                parts.append((i, content, first, False))
        remaining = template([{**m, "content": x} for m, x in zip(messages, sentinels)],
                             add_generation_prompt)
        owners, texts, literals = [], [], []
        for i, part, sentinel, is_thought in parts:
            literal, found, after = remaining.partition(sentinel)
            if found:
                owners.append(i)
                texts.append(part)
                literals.append(literal)
                remaining = after
            elif is_thought and i > question:
                raise ValueError(
                    f"template {template.name} drops the thoughts of the assistant message, all up to "
                    "</think>, so they would not be trained: give a --template that keeps them, such as tulu "
                    "or an edited copy of this one as FILE.jinja, or take them out of the records")
            elif not is_thought:
                return None
        literals.append(remaining)
        matched = _match(text, literals, [variants(part) for part in texts])
        if matched is None or mark in "".join(literals):
            return None
        # What the template writes between a thought and its answer belongs to the content, too.
        joined, written = [], []
        for number, (literal, part) in enumerate(zip(*matched)):
            if number and owners[number] == owners[number - 1]:
                written[-1] += literal + part
            else:
                joined.append(literal)
                written.append(part)
        return [*joined, remaining], written

    for mark_empty in (True, False):
        if found := as_they_are(mark_empty) or stripped_or_json(mark_empty):
            literals, written = found
            return literals, [x if c or mark_empty else None for x, c in zip(written, contents)]
    if found := with_thoughts():
        return found
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
        try:
            results = encoder.encode_batch([layout[e][i].text for e, i in keys], add_special_tokens=False)
        except Exception as error:
            # The library raises nothing more specific.
            raise ValueError(f"{tokenizer.folder}/tokenizer.json: {error}") from None
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
