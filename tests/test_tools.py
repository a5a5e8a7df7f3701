"""Records with tools have the ids and masks of transformers, and what cannot be told apart is refused.

The templates in templates/ are written in the way of Qwen 2.5, Qwen 3, Llama 3.1 and Hermes 2 Pro, and mark
with {% generation %} what the model emits, as transformers wants it.
"""
import json
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers_for_tests as cast
import transformers

from chat import COMPLETION, CONTEXT, INSTRUCTION, SYSTEM, TEMPLATE, load_template, render, tokenize
from data import load_dataset
from eval.generate import read_questions
from eval.memorization import read_targets
from eval.study import as_line
from records import read_records, to_messages
from runtime.tokenizer import Tokenizer
from tokenizers_for_tests import DATE

FIXTURES = Path(__file__).parent / "templates"
pytestmark = pytest.mark.usefixtures("today")

TOOLS = [
    {"type": "function", "function": {
        "name": "weather", "description": "The weather <now> & \"here\", à côté: 21°",
        "parameters": {"type": "object", "required": ["town"], "properties": {
            "town": {"type": "string"}, "days": {"type": "integer", "default": 1}}}}},
    {"type": "function", "function": {"name": "add", "description": "a + b", "parameters": {
        "type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}}},
]


def call(name: str, arguments: object, **more: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def calls(*tool_calls: dict, **more: object) -> dict:
    return {"role": "assistant", "tool_calls": [*tool_calls], **more}


ASKED = {"role": "user", "content": "Is it warm in Où?"}
WEATHER = call("weather", {"town": "Où \"<x>\"\n", "days": 2, "exact": [True, None, 1.50]}, id="call_1")
ANSWERED = {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "{\"degrees\": 21}"}
SAID = {"role": "assistant", "content": "It is 21 degrees."}
BRIEF = {"role": "system", "content": "Be brief."}
ADD = call("add", {"b": 2, "a": 1e-7}), call("add", {"a": 1, "b": 1})
SUM = {"role": "tool", "name": "add", "content": "3"}

CONVERSATIONS = {
    "one call": [ASKED, calls(WEATHER, content=None), ANSWERED, SAID],
    "a call at the end": [BRIEF, ASKED, calls(WEATHER, content="")],
    "no call": [BRIEF, ASKED, SAID],
    "two turns": [BRIEF, ASKED, calls(WEATHER), ANSWERED, SAID, {"role": "user", "content": "1 + 1?"},
                  calls(ADD[0]), SUM, {"role": "assistant", "content": "2"}],
    "a call after a call": [ASKED, calls(WEATHER), ANSWERED, calls(ADD[1]), SUM, SAID],
    "an empty answer of a tool": [ASKED, calls(call("weather", {})), {**ANSWERED, "content": ""}, SAID],
    "two calls": [BRIEF, ASKED, calls(*ADD), SUM, SUM, SAID],
    "text and calls": [ASKED, calls(WEATHER, ADD[0], content="Let me look."), ANSWERED, SUM, SAID],
    "thoughts": [BRIEF, ASKED, calls(WEATHER, content="", reasoning_content="I must look.\nSo: call"),
                 ANSWERED, {**SAID, "reasoning_content": "21 is\n\nwarm"}],
    "thoughts in the content": [ASKED, calls(WEATHER, content="<think>\nhm\n</think>\n\nI look."), ANSWERED,
                                {**SAID, "content": "<think>\nfine\n</think>\n\nWarm."}],
}
# {template: (tokenizer, the conversations that it refuses)}
TEMPLATES = {
    "qwen25.jinja": ("qwen", ["thoughts"]),
    "qwen3.jinja": ("qwen", []),
    "llama31.jinja": ("llama3", ["two calls", "text and calls", "thoughts", "thoughts in the content"]),
    "hermes.jinja": ("qwen", ["thoughts"]),
    "llama31.jinja, tools in the system block": (
        "llama3", ["two calls", "text and calls", "thoughts", "thoughts in the content"]),
    "llama31.jinja, with a tag": ("llama3", [
        "two calls", "text and calls", "thoughts", "thoughts in the content"]),
}
CASES = [(template, name) for template, (_, refused) in TEMPLATES.items()
         for name in CONVERSATIONS if name not in refused]


def source(template: str) -> str:
    file, _, variant = template.partition(", ")
    text = (FIXTURES / file).read_text(encoding="utf-8")
    if variant == "tools in the system block":
        return "{% set tools_in_user_message = false %}" + text
    return text.replace("""{{- '{"name": "'""", """{{- '<|python_tag|>{"name": "'""") if variant else text


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tokenizers and templates of both sides."""
    class World:
        folder = tmp_path_factory.mktemp("tools")
        ours, theirs = {}, {}

        def template(self, text: str, tokenizer: str):
            file = self.folder / f"{abs(hash(text))}.jinja"
            file.write_text(text, encoding="utf-8")
            return load_template(str(file), self.ours[tokenizer], date=DATE)

    world = World()
    for name in ("qwen", "llama3"):
        folder = cast.write(name, world.folder / name)
        tokenizer = cast.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens(["<|python_tag|>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        world.ours[name] = Tokenizer(folder)
        world.theirs[name] = transformers.AutoTokenizer.from_pretrained(folder)
    return world


def spans(pieces) -> list[tuple[int, str]]:
    return [(kind, "".join(piece.text for piece in group))
            for kind, group in groupby(pieces, key=lambda piece: piece.kind)]


def of_kind(pieces, kind: int) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


# ---------------------------------------------------------------- compared with transformers


@pytest.mark.parametrize("template, name", CASES)
def test_ids_and_mask_are_those_of_transformers(world, template, name):
    tokenizer = TEMPLATES[template][0]
    loaded = world.template(source(template), tokenizer)
    messages = CONVERSATIONS[name]
    theirs = world.theirs[tokenizer].apply_chat_template(
        messages, tools=TOOLS, chat_template=source(template), return_dict=True,
        return_assistant_tokens_mask=True)
    pieces = render(to_messages({"messages": messages, "tools": TOOLS}), loaded)
    ids, kinds = tokenize(pieces, world.ours[tokenizer])
    assert ids == theirs["input_ids"]
    assert [int(kind == COMPLETION) for kind in kinds] == theirs["assistant_masks"]
    assert 0 < sum(theirs["assistant_masks"]) < len(ids)

    # Definitions are SYSTEM, questions and the tools' answers INSTRUCTION.
    definitions = of_kind(pieces, SYSTEM)
    assert not any(piece.special for piece in pieces if piece.kind == SYSTEM)
    for tool in TOOLS:
        assert any(json.dumps(tool, ensure_ascii=False, indent=indent) in definitions for indent in (None, 4))
    asked = [m["content"] for m in messages if m["role"] in ("user", "tool")]
    asked = [json.dumps(text)[1:-1] if "JSON" not in text and text.startswith("{") and tokenizer == "llama3"
             or template == "hermes.jinja" and text.startswith("{") else text for text in asked]
    assert of_kind(pieces, INSTRUCTION) == "".join(asked)
    written = of_kind(pieces, TEMPLATE).replace('{"name": "weather", "content": ', "")
    assert "weather" not in written and "Be brief" not in written


@pytest.mark.parametrize("template, name", [(template, name) for template, (_, refused) in TEMPLATES.items()
                                            for name in refused])
def test_what_a_template_leaves_out_is_refused(world, template, name):
    loaded = world.template(source(template), TEMPLATES[template][0])
    with pytest.raises(ValueError, match="drops the thoughts|one tool at a time|the content of message"):
        render(to_messages({"messages": CONVERSATIONS[name], "tools": TOOLS}), loaded)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_call_is_what_the_model_writes_behind_the_generation_prompt(world, template):
    tokenizer = TEMPLATES[template][0]
    loaded = world.template(source(template), tokenizer)
    messages = to_messages({"messages": CONVERSATIONS["a call at the end"], "tools": TOOLS})
    prompt = world.theirs[tokenizer].apply_chat_template(
        CONVERSATIONS["a call at the end"][:-1], tools=TOOLS, chat_template=source(template), tokenize=False,
        add_generation_prompt=True)
    pieces = render(messages, loaded)
    emitted = of_kind(pieces, COMPLETION)
    assert "".join(piece.text for piece in pieces).strip() == prompt + emitted
    assert '"weather"' in emitted and emitted.endswith(loaded.end_of_turn)
    served = render(messages[:-1], loaded, add_generation_prompt=True)
    assert "".join(piece.text for piece in served) == prompt


# ---------------------------------------------------------------- written out by hand


def test_every_span_of_a_qwen_record(world):
    tool = {"name": "f", "parameters": {}}
    record = {"tools": json.dumps([tool]), "messages": [
        {"role": "user", "content": "Q"}, calls({"name": "f", "arguments": '{"x":"é"}'}, content=None),
        {"role": "tool", "content": "R"}, {"role": "tool", "content": "S"},
        {"role": "assistant", "content": "A"}]}
    loaded = world.template(source("qwen25.jinja"), "qwen")
    assert spans(render(to_messages(record), loaded)) == [
        (TEMPLATE, "<|im_start|>system\n"
                   "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        (SYSTEM, "\n\n# Tools\n\nCall one or more of these functions if they help.\n<tools>\n"
                 '{"name": "f", "parameters": {}}\n</tools>\n\nWrite a call as\n<tool_call>\n'
                 '{"name": <name>, "arguments": <object>}\n</tool_call>'),
        (TEMPLATE, "<|im_end|>\n<|im_start|>user\n"), (INSTRUCTION, "Q"),
        (TEMPLATE, "<|im_end|>\n<|im_start|>assistant\n"),
        (COMPLETION, '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call><|im_end|>'),
        (TEMPLATE, "\n<|im_start|>user\n<tool_response>\n"), (INSTRUCTION, "R"),
        (TEMPLATE, "\n</tool_response>\n<tool_response>\n"), (INSTRUCTION, "S"),
        (TEMPLATE, "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
        (COMPLETION, "A<|im_end|>"), (TEMPLATE, "\n")]


def test_definitions_in_two_places_are_system_and_what_stands_between_is_template(world):
    record = {"tools": [{"name": "f"}], "messages": [{"role": "user", "content": "These words"}, SAID]}
    loaded = world.template(source("llama31.jinja"), "llama3")
    assert spans(render(to_messages(record), loaded))[:5] == [
        (TEMPLATE, "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"),
        (SYSTEM, "Environment: ipython\n"),
        (TEMPLATE, "Cutting Knowledge Date: December 2023\nToday Date: 05 Jan 2026\n\n<|eot_id|>"
                   "<|start_header_id|>user<|end_header_id|>\n\n"),
        (SYSTEM, 'These functions can be called with {"name": ..., "parameters": ...}:\n\n'
                 '{\n    "name": "f"\n}\n\n'),
        (INSTRUCTION, "These words")]


def test_a_call_of_weight_0_is_context(world):
    messages = [ASKED, calls(WEATHER, weight=0), ANSWERED, SAID]
    loaded = world.template(source("hermes.jinja"), "qwen")
    pieces = render(to_messages({"messages": messages, "tools": TOOLS}), loaded)
    assert of_kind(pieces, CONTEXT).startswith("<tool_call>\n")
    assert of_kind(pieces, CONTEXT).endswith("</tool_call><|im_end|>")
    assert of_kind(pieces, COMPLETION) == "It is 21 degrees.<|im_end|>"


def test_thoughts_before_the_last_question_are_left_out_as_they_are_served(world):
    loaded = world.template(source("qwen3.jinja"), "qwen")
    for thinking in ({"content": "<think>\nhm\n</think>\n\nWarm."},
                     {"content": "Warm.", "reasoning_content": "hm"},
                     {"content": "<think>\nhm\n</think>\n\nWarm.", "tool_calls": [WEATHER]}):
        first, last = {"role": "assistant", **thinking}, {**SAID, "reasoning_content": "no"}
        pieces = render(to_messages({"messages": [ASKED, first, {"role": "user", "content": "And?"}, last]}),
                        loaded)
        called = '\n<tool_call>\n{"name": "weather", "arguments": ' + json.dumps(
            WEATHER["function"]["arguments"], ensure_ascii=False) + "}\n</tool_call>"
        assert of_kind(pieces, COMPLETION) == (
            f"Warm.{called if 'tool_calls' in first else ''}<|im_end|>"
            "<think>\nno\n</think>\n\nIt is 21 degrees.<|im_end|>")


# ---------------------------------------------------------------- layouts


LAYOUTS = {
    "an object": call("weather", {"town": "Où", "n": 1}),
    "JSON text": call("weather", '{"town": "Où", "n": 1}'),
    "bare": {"name": "weather", "arguments": {"town": "Où", "n": 1}},
    "null": {**call("weather", {"town": "Où", "n": 1}, id=None), "function": {
        "name": "weather", "arguments": {"town": "Où", "n": 1}, "output": None}},
    "bare JSON text": {"name": "weather", "arguments": '{"town":"Où","n":1}', "id": None},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("as_text", [False, True])
def test_every_layout_of_tools_and_calls_is_one_record(layout, as_text):
    messages = [ASKED, calls(LAYOUTS[layout], content=None), ANSWERED, SAID]
    expected = [{**ASKED, "tools": TOOLS}, calls(LAYOUTS["an object"], content=""), ANSWERED, SAID]
    if as_text:
        messages[1]["tool_calls"] = json.dumps(messages[1]["tool_calls"])
    assert to_messages({"messages": messages, "tools": json.dumps(TOOLS) if as_text else TOOLS}) == expected
    # The definitions may stand in the first message, as they are given back.
    assert to_messages({"messages": expected}) == expected


def test_function_call_and_observation_of_sharegpt():
    turns = [("human", "Warm?"), ("function_call", '{"name": "weather", "arguments": {"town": "X"}}'),
             ("observation", "21"), ("function_call", '[{"name": "add", "arguments": {}}]'),
             ("observation", "3"), ("function_call", [{"name": "add", "arguments": {}}]),
             ("observation", "4"), ("gpt", "Yes.")]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns],
              "tools": json.dumps(TOOLS), "system": "S"}
    assert to_messages(record) == [
        {"role": "system", "content": "S", "tools": TOOLS}, {"role": "user", "content": "Warm?"},
        calls(call("weather", {"town": "X"}), content=""), {"role": "tool", "content": "21"},
        calls(call("add", {}), content=""), {"role": "tool", "content": "3"},
        calls(call("add", {}), content=""), {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize("nothing", [None, [], "", "[]", "null", " "])
def test_empty_is_absent(nothing):
    plain = [ASKED, SAID]
    absent = {"tool_calls": nothing, "reasoning_content": None}
    record = {"messages": [{**ASKED, **absent}, {**SAID, **absent}], "tools": nothing}
    assert to_messages(record) == plain
    assert to_messages({"messages": [{**ASKED, "tools": nothing}, SAID]}) == plain
    assert to_messages({"messages": [{**ASKED, "tools": nothing}, SAID], "tools": TOOLS}) == [
        {**ASKED, "tools": TOOLS}, SAID]


@pytest.mark.parametrize("tools, message, says", [
    ("[{", SAID, "'tools' must be a list of objects, or JSON text of one, not '[{'"),
    (7, SAID, "'tools' must be a list of objects, or JSON text of one, not '7'"),
    (["f"], SAID, "'tools' must be a list of objects"), ([{"type": "web_search"}], SAID, "no \"name\""),
    ([{"function": {"name": 1}}], SAID, "no \"name\""),
    ([], calls("f"), "message 2's 'tool_calls' must be a list of objects"),
    ([], calls({"function": "f"}), "message 2 has the tool call f; write"),
    ([], calls({"name": None}), "message 2 has the tool call"),
    ([], calls({"name": "f", "parameters": {}}), "message 2 has the tool call"),
    ([], calls(call("f", "x=1")), "message 2's arguments of 'f' must be an object"),
    ([], calls(call("f", "[1]")), "must be an object, or JSON text of one, not '[1]'"),
    ([], calls(call("f", '{"x": ' + "[" * 100_000)), "message 2's arguments of 'f' must be an"),
    ([], {**SAID, "reasoning_content": ["hm"]}, "message 2's 'reasoning_content' must be text, not a list"),
    ([], {**ANSWERED, "tool_calls": [WEATHER]}, "message 2 has 'tool_calls'"),
    ([], {**SAID, "tools": TOOLS}, "message 2 has 'tools'"),
    ([], {"role": "assistant", "content": None}, "message 2 (assistant) has no text"),
    ([], calls(call("f", {"x": "\ud800"})), "surrogate"),
    ([{"name": "\ud800"}], SAID, "surrogate"),
])
def test_bad_tools_are_named_with_file_and_line(tools, message, says, tmp_path):
    file = tmp_path / "bad.jsonl"
    lines = [{"messages": [ASKED, SAID]}, {"messages": [ASKED, message], "tools": tools}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError) as error:
        list(read_records(file))
    assert says in str(error.value) and f"{file}:2: " in str(error.value)


def test_other_tools_in_record_and_message_are_refused():
    with pytest.raises(ValueError, match="not those of its first message"):
        to_messages({"messages": [{**ASKED, "tools": TOOLS[:1]}, SAID], "tools": TOOLS})


# ---------------------------------------------------------------- what cannot be told apart


LOOP = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.role == 'assistant' %}"
END = ("{% else %}{{ m.content ~ '<|im_end|>\n' }}{% endif %}{% endfor %}"
       "{{ '<|im_start|>assistant\n' if add_generation_prompt }}")
LIST = "{{ tools | tojson if tools }}"
CALLS = "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"


@pytest.mark.parametrize("text, says", [
    (LOOP + "{{ m.content }}" + CALLS + "{{ '<|im_end|>\n' }}" + END, "the definition of the tool 'weather'"),
    (LIST + LOOP + "{{ m.content ~ '<|im_end|>\n' }}" + END, "the call of 'add' of message 2"),
    (LIST + LOOP + "{{ m.content }}{{ m.tool_calls[0].function | tojson if m.tool_calls }}"
     "{{ '<|im_end|>\n' }}" + END, "the call of 'add' of message 2"),
    (LIST + LOOP + "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}"
     "{{ '<|im_end|>\n' }}" + END, "the call of 'add' of message 2"),
    (LIST + LOOP + CALLS + "{{ (m.content if not m.tool_calls) ~ '<|im_end|>\n' }}" + END,
     "the content of message 2"),
    # Two turns, the end of the text, another end than that of a turn, another header than the prompt's.
    (LIST + LOOP + "{% if m.tool_calls %}{% for c in m.tool_calls %}"
     "{{ c.function | tojson ~ '<|im_end|>\n<|im_start|>assistant\n' }}{% endfor %}{% endif %}"
     "{{ m.content ~ '<|im_end|>\n' }}" + END, "as several turns"),
    (LIST + LOOP + "{{ m.content }}" + CALLS + "{{ '<|im_end|>\n' if not m.tool_calls }}" + END,
     "without '<|im_end|>' at its end"),
    (LIST + LOOP + "{{ m.content }}" + CALLS + "{{ '<|im_end|>' if not m.tool_calls else '<|endoftext|>' }}"
     + END, "without '<|im_end|>' at its end"),
    ((LIST + LOOP + "{{ m.content }}" + CALLS + "{{ '<|im_end|>\n' }}" + END).replace(
        "m.role ~", "('tool_call' if m.tool_calls else m.role) ~"), "after other text than its generation"),
])
def test_a_template_by_which_a_call_cannot_be_told_apart_is_refused_by_name(world, text, says, tmp_path):
    file, template = tmp_path / "calls.jsonl", world.template(text, "qwen")
    messages = [ASKED, calls(*ADD, content="I add."), SUM, SUM, SAID]
    file.write_text(json.dumps({"messages": messages, "tools": TOOLS}) + "\n")
    with pytest.raises(ValueError) as error:
        load_dataset([file], world.ours["qwen"], template, 512, "error", tmp_path / "cache")
    assert says in str(error.value) and str(error.value).startswith(f"{file}:1: template {template.name} ")


def test_two_calls_of_which_only_the_last_ends_are_refused(world):
    """Else the second message's header would be trained as a part of the first call."""
    template = world.template(LOOP + "{{ m.content }}" + CALLS + "{{ '<|im_end|>' if loop.last and "
                              "not add_generation_prompt else '\n' }}" + END, "qwen")
    with pytest.raises(ValueError, match="after other text than its generation prompt"):
        render(to_messages({"messages": [ASKED, calls(ADD[0]), calls(ADD[1])]}), template)


def test_what_is_written_around_thoughts_is_refused(world):
    template = world.template(LOOP + "{{ m.content ~ ('!' if '</think>' in m.content) ~ '<|im_end|>' }}"
                              + END, "qwen")
    with pytest.raises(ValueError, match="rewrites the content of message 2"):
        render(to_messages({"messages": [ASKED, {**SAID, "content": "<think>hm</think>Warm."}]}), template)


def test_a_special_token_among_thoughts_is_refused(world):
    template = world.template(source("qwen3.jinja"), "qwen")
    with pytest.raises(ValueError, match="cannot be told apart"):
        render([ASKED, {**SAID, "content": "<think>\n<|im_end|>\n</think>\n\nWarm."}], template)


def test_tags_of_thoughts_may_be_special_tokens(world, tmp_path):
    folder = cast.write("qwen", tmp_path / "tokenizer")
    text = (folder / "tokenizer.json").read_text()
    spec = json.loads(text)
    for token in spec["added_tokens"]:
        token["special"] |= "think>" in token["content"]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer(folder)
    template = load_template(str(FIXTURES / "qwen3.jinja"), tokenizer, date=DATE)
    messages = [ASKED, {**SAID, "content": "<think>\nhm\n</think>\n\nWarm."}]
    for answer in (messages[1], {**messages[1], "tool_calls": [WEATHER]}):
        pieces = render(to_messages({"messages": [ASKED, answer]}), template)
        assert [piece.text for piece in pieces if piece.special and piece.kind == COMPLETION] == [
            "<think>", "</think>", "<|im_end|>"]


def test_the_templates_above_are_refused_for_nothing_else(world):
    template = world.template(LIST + LOOP + "{{ m.content }}" + CALLS + "{{ '<|im_end|>\n' }}" + END, "qwen")
    messages = [ASKED, calls(*ADD, content="I add."), SUM, SUM, SAID]
    pieces = render(to_messages({"messages": messages, "tools": TOOLS}), template)
    assert of_kind(pieces, SYSTEM) == json.dumps(TOOLS, ensure_ascii=False)


def test_built_in_templates_refuse_tools(world):
    template = load_template("chatml", world.ours["qwen"], date=DATE)
    for record in ({"messages": [ASKED, SAID], "tools": TOOLS}, {"messages": [ASKED, calls(WEATHER)]},
                   {"messages": [ASKED, {**SAID, "reasoning_content": "hm"}]}):
        with pytest.raises(ValueError, match="template chatml (leaves out|drops)"):
            render(to_messages(record), template)


def test_one_of_two_calls_or_definitions_stands_for_no_other(world):
    """A template that writes the last of each only. (The name of the tool get is also part of get_all's.)"""
    text = (LIST.replace("tools |", "tools[-1:] |") + LOOP + "{{ m.content }}"
            + CALLS.replace("m.tool_calls", "(m.tool_calls or [])[-1:]") + "{{ '<|im_end|>\n' }}" + END)
    template = world.template(text, "qwen")
    twice = [ASKED, calls(WEATHER, call("weather", {"city": "London"})), ANSWERED, ANSWERED, SAID]
    with pytest.raises(ValueError, match="leaves out or rewrites the call of 'weather' of message 2"):
        render(to_messages({"messages": twice, "tools": TOOLS[-1:]}), template)
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}}
             for name in ("get", "get_all")]
    with pytest.raises(ValueError, match="leaves out the definition of the tool 'get'"):
        render(to_messages({"messages": [ASKED, SAID], "tools": tools}), template)


@pytest.mark.parametrize("part", ["arguments", "description", "content"])
def test_a_special_token_in_a_call_or_a_definition_is_refused(world, part):
    text = "a<|im_end|>b"
    tool = {"name": "f", "description": text if part == "description" else "x"}
    asks = calls(call("f", {"x": text if part == "arguments" else "x"}),
                 content=text if part == "content" else "")
    template = world.template(source("hermes.jinja"), "qwen")
    with pytest.raises(ValueError, match=r"special token '<\|im_end\|>'"):
        render(to_messages({"messages": [ASKED, asks, SUM, SAID], "tools": [tool]}), template)


def test_a_tools_answer_that_spells_a_special_token_stays_text(world):
    messages = [ASKED, calls(WEATHER), {**ANSWERED, "content": "<|im_end|>"}, SAID]
    template = world.template(source("qwen25.jinja"), "qwen")
    pieces = render(to_messages({"messages": messages, "tools": TOOLS}), template)
    assert [piece.special for piece in pieces if piece.kind == INSTRUCTION] == [False, False]


# ---------------------------------------------------------------- everyone else who reads messages


def test_generation_shows_the_tools_and_expects_the_call(world, tmp_path):
    file, template = tmp_path / "calls.jsonl", world.template(source("qwen25.jinja"), "qwen")
    messages = CONVERSATIONS["a call at the end"]
    file.write_text(json.dumps({"messages": messages, "tools": TOOLS}) + "\n")
    args = SimpleNamespace(data=str(file), columns=(), limit=None)
    ((_, expected),), (pieces,) = read_questions(args, template)
    prompt = world.theirs["qwen"].apply_chat_template(
        messages[:-1], tools=TOOLS, chat_template=template.source, tokenize=False, add_generation_prompt=True)
    assert "".join(piece.text for piece in pieces) == prompt
    assert expected.startswith('<tool_call>\n{"name": "weather"') and expected.endswith("}\n</tool_call>")

    args = SimpleNamespace(data=[str(file)], columns=(), limit=0, max_length=4096)
    (record,), _ = read_targets(args, world.ours["qwen"], template)
    assert record["text"] == expected == world.ours["qwen"].decode(record["target"])
    assert world.ours["qwen"].decode(record["prompt"], skip_special_tokens=False) == prompt


def test_a_study_keeps_the_order_in_which_tools_name_their_fields_and_their_nulls(tmp_path):
    file, again = tmp_path / "calls.jsonl", tmp_path / "again.jsonl"
    tools = json.dumps([*TOOLS, {"name": "f", "parameters": {"properties": {"x": {"default": None}}}}])
    messages = [ASKED, calls(call("f", '{"x": null}')), *CONVERSATIONS["one call"][1:]]
    file.write_text(json.dumps({"messages": messages, "tools": tools}) + "\n")
    again.write_text(as_line(next(read_records(file))[0]))
    def first(path):
        return json.dumps(next(read_records(path))[0])
    assert first(again) == first(file)
