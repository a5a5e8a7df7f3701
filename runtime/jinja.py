"""Chat templates as transformers renders them: Jinja in a sandbox, with its filters, functions and blocks.

A template is code that others wrote. The sandbox keeps it away from the program's objects, and a budget from
its time and memory: whatever a rendering makes is charged, and what could grow is measured before it is made.
"""
import functools
import json
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, MappingView
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

from runtime.foreign import shorten

SECONDS = 5             # of a thread's time that one rendering may take
CHARACTERS = 2**28      # that one rendering may write, with all that it makes on the way
SOURCE = 2**18          # characters of a template; those of known models have some 2**15
ITEM = 64               # characters that an item of a list counts as

# Filters that make nothing new.
_FREE = {"abs", "attr", "count", "d", "default", "first", "float", "int", "items", "last", "length", "map",
         "reject", "rejectattr", "select", "selectattr"}
# Filters and methods whose result may be as long as their text times their arguments.
_GROWING = {"center", "expandtabs", "format", "indent", "join", "ljust", "replace", "rjust", "round",
            "to_bytes", "tojson", "translate", "zfill"}
# Filters and methods that take a text apart into words or lines.
_SPLITTING = {"rsplit", "split", "splitlines", "title", "wordcount"}
_METHODS = _GROWING | _SPLITTING
# Filters that grow in other ways, search a text slowly, or draw at random. No chat template needs them.
_MISSING = ("batch", "pprint", "random", "slice", "striptags", "sum", "urlize", "wordwrap", "xmlattr")


class Refused(ValueError):
    """A template does not take these messages; it may take others."""


class _TooMuch(Exception):
    """A template asks for more time or memory than a conversation can need."""


def render_jinja(source: str, name: str, date: str, **variables: object) -> str:
    """The text of a template with these variables. name: for messages; date: YYYY-MM-DD, printed by
    strftime_now. Refused with the template's own words if it refuses them; ValueError if it is not a
    template, is nested too deeply, or if its rendering takes longer than SECONDS or makes more than
    CHARACTERS."""
    if len(source) > SOURCE:
        raise ValueError(f"template {name} has {len(source):,} characters, more than {SOURCE:,}")
    now = datetime.fromisoformat(date)
    try:
        # Two threads would spend each other's budget.
        with _lock:
            _budget.start()
            return _compile(source).render(strftime_now=now.strftime, **variables)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"template {name}, line {error.lineno}: {error.message}") from None
    except _TooMuch as error:
        raise ValueError(f"template {name} {error}; give another --template") from None
    except RecursionError:
        raise ValueError(f"template {name} is nested too deeply, or calls itself endlessly; give "
                         "another --template") from None
    except Exception as error:
        # It is code, and may raise anything.
        reason = shorten(str(error), 500) or type(error).__name__
        raise Refused(f"template {name} refuses the messages: {reason}") from None


# ---------------------------------------------------------------- what a rendering may spend


class _Budget:
    """What the rendering that runs now may still spend."""
    __slots__ = "left", "charges", "end"

    def start(self) -> None:
        self.left, self.charges, self.end = CHARACTERS, 0, time.thread_time() + SECONDS

    def charge(self, amount: int) -> None:
        self.left -= amount
        self.charges += 1
        if self.left < 0:
            raise _TooMuch(f"makes more than {CHARACTERS:,} characters")
        # Asking for the time takes longer than the rest.
        if not self.charges & 63 and time.thread_time() > self.end:
            raise _TooMuch(f"takes longer than {SECONDS} seconds")


_budget, _lock = _Budget(), threading.Lock()


def _size(value: object, written: bool = True) -> int:
    """About how many characters a value has when it is written; written=False: as it is stored, where a text
    in a list is only one of its items. Counting stops above CHARACTERS."""
    if isinstance(value, str):
        return len(value)
    size, waiting = 0, [value]
    while waiting and size <= CHARACTERS:
        value = waiting.pop()
        if isinstance(value, str | bytes):
            size += len(value) * written
        elif isinstance(value, dict | list | tuple):
            size += ITEM * len(value)
            waiting += [*value, *value.values()] if isinstance(value, dict) else value
        else:
            size += ITEM + (value.bit_length() // 3 if isinstance(value, int) else 0)
    return size


def _check(name: str, subject: object, arguments: Iterable[object]) -> None:
    """_TooMuch if the filter or method `name` of a text or list could make too long a text."""
    arguments = list(arguments)
    size = _size(subject)
    if name == "replace" and [type(x) for x in (subject, *arguments[:2])] == [str, str, str]:
        size += subject.count(arguments[0]) * len(arguments[1])
    elif name in ("split", "rsplit") and arguments and arguments[0] and isinstance(arguments[0], str):
        size += ITEM * subject.count(arguments[0])
    elif name in _SPLITTING:
        size *= ITEM
    elif name in _GROWING:
        if name == "format" and isinstance(subject, str):
            # Widths: "%9d", "{:9}"; "{:{}}" takes them from the arguments.
            size += sum(int(digits[:12]) for digits in re.findall(r"\d+", subject))
            if re.search(r"{[^{}]*{", subject):
                raise _TooMuch("takes a width in format() from an argument")
        size *= 1 + sum(abs(x) if isinstance(x, int) else _size(x) for x in arguments)
    if size > CHARACTERS:
        raise _TooMuch(f"makes more than {CHARACTERS:,} characters")


def _made(value: object) -> object:
    """The value, charged for."""
    if type(value) is str:
        _budget.charge(len(value))
    else:
        # All of a list: [x, x] of [x, x] of [x, x] and so on would take forever to compare, too.
        _budget.charge(_size(value, written=False) if isinstance(value, str | dict | list | tuple) else 1)
    return value


def _joined(parts: list) -> str:
    """a ~ b ~ c"""
    for part in parts:
        if type(part) is not str:
            _check("string", part, ())
    return _made("".join(map(str, parts)))


def _steps(items: Iterable) -> Iterator:
    """The items of a loop, each charged for."""
    for item in items:
        _budget.charge(1)
        yield item


def _charged(name: str, function: Callable) -> Callable:
    """A filter whose work is charged for, and measured before if it could be much."""
    # The first argument may be the environment.
    first, growing = int(hasattr(function, "jinja_pass_arg")), name in _METHODS

    @functools.wraps(function)
    def charged(*arguments: object, **named: object) -> object:
        subject = arguments[first]
        if growing or type(subject) is not str:
            if isinstance(subject, Iterator | MappingView | range):
                subject = list(_steps(subject))
                arguments = (*arguments[:first], subject, *arguments[first + 1:])
            if name not in ("list", "reverse"):
                _check(name, subject, [*arguments[first + 1:], *named.values()])
        return _made(function(*arguments, **named))
    return charged


class _Charge(jinja2.visitor.NodeTransformer):
    """Puts charges into a template's code where the sandbox has none: loops, a ~ b, slices, [a, b]."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        node = self.generic_visit(node)
        node.iter = _filter(node.iter, "charge steps")
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        parts = self.generic_visit(node).nodes
        return _filter(jinja2.nodes.List(parts, lineno=node.lineno), "charge joined")

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        node = self.generic_visit(node)
        return _filter(node, "charge made") if isinstance(node.arg, jinja2.nodes.Slice) else node

    def visit_List(self, node: jinja2.nodes.List | jinja2.nodes.Tuple | jinja2.nodes.Dict
                   ) -> jinja2.nodes.Node:
        node = self.generic_visit(node)
        fixed = all(isinstance(item, jinja2.nodes.Const) for item in node.items)
        # A tuple may also be what is assigned to: {% for a, b in ... %}.
        return node if fixed or getattr(node, "ctx", "load") != "load" else _filter(node, "charge made")

    visit_Tuple = visit_Dict = visit_List


def _filter(node: jinja2.nodes.Node, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


# ---------------------------------------------------------------- the environment


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with charges for all that a template does."""
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _parse(self, *source: object) -> jinja2.nodes.Template:
        return _Charge().visit(super()._parse(*source))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What a template, macro or block has written."""
        parts = list(parts)
        _budget.charge(sum(map(len, parts)))
        return "".join(parts)

    def call(self, context: jinja2.runtime.Context, function: Callable, /, *arguments: object, **named: object
             ) -> object:
        if getattr(function, "__name__", "") in _METHODS:
            _check(function.__name__, getattr(function, "__self__", ""), [*arguments, *named.values()])
        return _made(super().call(context, function, *arguments, **named))

    def wrap_str_format(self, value: object) -> Callable | None:
        """str.format and format_map, which do not come through call() as methods."""
        function = super().wrap_str_format(value)
        if function is None:
            return None

        def limited(*arguments: object, **named: object) -> str:
            _check("format", value.__self__, [*arguments, *named.values()])
            return function(*arguments, **named)
        return limited

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object, right: object
                   ) -> object:
        if operator == "%" and isinstance(left, str):
            _check("format", left, right if isinstance(right, tuple) else [right])
        elif operator == "*" and not all(isinstance(x, int | float) for x in (left, right)):
            # A text or a list, repeated.
            repeated, times = (left, right) if isinstance(right, int) else (right, left)
            _budget.charge(_size(repeated) * max(0, times))
        elif isinstance(left, int) and isinstance(right, int):
            # Numbers may have any number of digits.
            if operator == "*":
                _budget.charge(left.bit_length() + right.bit_length())
            elif operator == "**":
                _budget.charge(left.bit_length() * max(0, right))
        return _made(super().call_binop(context, operator, left, right))


def _written(value: object) -> object:
    """What {{ value }} writes. A list may hold a long text many times."""
    if not isinstance(value, str):
        _check("string", value, ())
    return value


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` blocks mark assistant text for transformers. Here spans come from sentinels, so only
    the block's body matters."""
    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(lineno)


@functools.cache
def _compile(source: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: object, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple | None = None, sort_keys: bool = False) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    env = _Environment(trim_blocks=True, lstrip_blocks=True, finalize=_written,
                       extensions=[_Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.filters = {name: function if name in _FREE else _charged(name, function)
                   for name, function in env.filters.items() if name not in _MISSING}
    # No template can name these.
    env.filters |= {"charge made": _made, "charge joined": _joined, "charge steps": _steps}
    env.globals["raise_exception"] = raise_exception
    del env.globals["lipsum"]
    with warnings.catch_warnings():
        # Python's, about the code that Jinja makes of the template.
        warnings.simplefilter("ignore", SyntaxWarning)
        return env.from_string(source)
