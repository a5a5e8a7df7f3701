"""Chat templates as transformers renders them: Jinja in a sandbox, with its filters, functions and blocks."""
import json
from datetime import datetime
from functools import cache

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox


def render_jinja(source: str, name: str, date: str, **variables: object) -> str:
    """The text of a template with these variables. name: for messages; date: YYYY-MM-DD, printed by
    strftime_now. ValueError with the template's own words if it refuses them."""
    now = datetime.fromisoformat(date)
    try:
        return _compile(source).render(strftime_now=now.strftime, **variables)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"template {name}, line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"template {name} refuses the messages: {error}") from None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` blocks mark assistant text for transformers. Here spans come from sentinels, so only
    the block's body matters."""
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
               separators: tuple | None = None, sort_keys: bool = False) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    # The sandbox, because a template is code that others wrote.
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env.from_string(source)
