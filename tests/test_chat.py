"""Records of every layout and file type -> messages, and records that are refused."""
import gzip
import json

import pytest

import chat
from chat import read_records

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("record, expected", [
    ({"messages": MESSAGES, "id": 7}, MESSAGES),
    ({"prompt": "Hi", "completion": "Hello"}, MESSAGES),
    ({"instruction": "Hi", "output": "Hello"}, MESSAGES),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, MESSAGES),
    ({"instruction": "Translate.", "input": "Hi", "output": "Salut"},
     [{"role": "user", "content": "Translate.\n\nHi"}, {"role": "assistant", "content": "Salut"}]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, MESSAGES),
    ({"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}]},
     [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "S"},
     [{"role": "system", "content": "S"}, *MESSAGES]),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}]}, [MESSAGES[0], {**MESSAGES[1], "weight": 0}]),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 1, "name": "x", "id": 3}]},  # the template may read
     [MESSAGES[0], {**MESSAGES[1], "name": "x", "id": 3}]),
    ({"conversations": [{"from": "human", "value": "Hi", "name": "x"}, {"from": "gpt", "value": "Hello"}]},
     [{**MESSAGES[0], "name": "x"}, MESSAGES[1]]),
    ({"messages": MESSAGES, "system": "S"}, [{"role": "system", "content": "S"}, *MESSAGES]),
    ({"messages": MESSAGES, "system_prompt": "S"}, [{"role": "system", "content": "S"}, *MESSAGES]),
    ({"messages": [{"role": "system", "content": "S"}, *MESSAGES], "system": "S"},
     [{"role": "system", "content": "S"}, *MESSAGES]),
    # null means absent, and so does what is empty or says what holds anyway
    ({"messages": None, "prompt": "Hi", "completion": "Hello", "tools": None, "system": None}, MESSAGES),
    ({"instruction": "Hi", "input": None, "output": "Hello", "history": [], "weight": 1, "label": True},
     MESSAGES),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": None, "train": None, "tool_calls": None,
                                 "reasoning": "", "prefix": False, "images": []}],
      "tools": [], "chat_template_kwargs": {}},
     [MESSAGES[0], {**MESSAGES[1], "reasoning": "", "prefix": False, "images": []}]),
])
@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz"])
def test_every_layout_in_every_file_type(record, expected, kind, tmp_path):
    file = tmp_path / f"x.{kind}"
    text = (json.dumps([record, record]) if kind == "json"
            else f"{json.dumps(record)}\n\n{json.dumps(record)}\n")
    (gzip.open if kind == "jsonl.gz" else open)(file, "wt").write(text)
    read = list(read_records(file))
    assert [messages for messages, _ in read] == [expected] * 2
    assert [line for _, line in read] == ([1, 2] if kind == "json" else [1, 3])


@pytest.mark.parametrize("switch, weight", [
    ({"train": False}, 0), ({"train": True}, 1), ({"training": 0}, 0), ({"trainable": False}, 0),
    ({"loss": False}, 0), ({"loss": 1}, 1), ({"mask": True}, 0), ({"mask": False}, 1), ({"masked": 1}, 0),
    ({"masked": 0}, 1), ({"weight": 0, "train": False, "mask": 1}, 0), ({"weight": 1.0, "loss": True}, 1),
    ({"weight": False}, 0), ({"train": None}, 1),
])
@pytest.mark.parametrize("layout", ["messages", "conversations"])
def test_switches_of_other_trainers_are_weights(switch, weight, layout):
    fields = ("role", "content") if layout == "messages" else ("from", "value")
    turns = [dict(zip(fields, ("user", "Hi"))), {**dict(zip(fields, ("assistant", "Hello"))), **switch}]
    assert chat.to_messages({layout: turns}) == [
        MESSAGES[0], MESSAGES[1] | ({} if weight else {"weight": 0})]


# Fields by which other trainers and servers train or serve something else, with values that say so.
MESSAGE_FIELDS = {
    "reasoning": "hm", "reasoning_details": [{"text": "hm"}], "thinking": "hm",
    "thoughts": "hm", "function_call": {"name": "f"}, "images": ["a.png"],
    "image_url": "a.png", "audio": {"id": 1}, "videos": ["v"], "documents": ["d"], "prefix": True,
    "train_detail": [{"begin_offset": 0}], "training_detail": [1], "train_on": "all", "loss_scale": 0.5,
    "loss_weight": 2, "loss_mask": [0, 1], "step_loss_mask": 0, "labels": [1], "weights": [1], "label": False}
RECORD_FIELDS = {
    "functions": [1], "builtin_tools": ["x"], "tool_choice": "auto", "documents": ["d"],
    "history": [["a", "b"]], "images": ["a.png"], "audio": "a.wav", "audios": ["a"], "video": "v",
    "chat_template_kwargs": {"enable_thinking": False}, "template_kwargs": {"x": 1}, "enable_thinking": False,
    "thinking": False, "reasoning": "on", "reasoning_effort": "high", "chat_template": "{{ x }}",
    "add_generation_prompt": True, "continue_final_message": True, "prefill": "Sure", "train": False,
    "loss": 0, "mask": [1], "weight": 0.5, "sample_weight": 2, "label": False, "labels": [1],
    "rejected": "x", "rejected_response": "x", "chosen": "x"}


@pytest.mark.parametrize("field", MESSAGE_FIELDS)
def test_a_messages_field_that_would_change_what_is_trained_is_refused_by_name(field):
    for i in (0, 1):
        messages = [{**m, field: MESSAGE_FIELDS[field]} if i == j else m for j, m in enumerate(MESSAGES)]
        with pytest.raises(ValueError, match=f"message {i + 1} has '{field}', which"):
            chat.to_messages({"messages": messages})


@pytest.mark.parametrize("field", RECORD_FIELDS)
def test_a_records_field_that_would_change_what_is_trained_is_refused_by_name(field):
    for record in ({"messages": MESSAGES}, {"prompt": "Hi", "completion": "Hello"}):
        with pytest.raises(ValueError, match=f"the record has '{field}', which"):
            chat.to_messages({**record, field: RECORD_FIELDS[field]})


@pytest.mark.parametrize("fields", [
    # of well-known data sets
    {"prompt": "Hi", "prompt_id": "x"}, {"id": 1, "source": "x", "dataset": "y"},
    {"is_reasoning_complete": [True], "finish_reasons": ["stop"], "used_in_training": ["x"]},
    {"category": "qa", "model_name": None, "skip_prompt_formatting": False, "split": "train"},
    {"text": "whole", "timestamp": 0, "tool_call_id": "1", "refusal": None, "score": 1.0},
])
def test_metadata_is_let_through(fields):
    assert chat.to_messages({"messages": MESSAGES, **fields}) == MESSAGES
    assert chat.to_messages({"messages": [{**m, **fields} for m in MESSAGES]}) == [
        {**m, **{k: v for k, v in fields.items() if v is not None}} for m in MESSAGES]


@pytest.mark.parametrize("line, says", [
    ("{not json", "Expecting property name"), ("[]", "JSON object"), ("{}", "known layouts"),
    ('{"text": "x"}', "'text'"), ('{"messages": []}', "no messages"), ('{"messages": "x"}', "no messages"),
    ('{"messages": ["x"]}', "message 1 must be an object"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "unknown role 'robot'"),
    ('{"messages": [{"role": "user", "content": null}]}', "'content' is NoneType"),
    ('{"messages": [{"role": "user", "content": "x", "weight": 0.5}]}', "'weight': 0.5"),
    ('{"messages": [{"role": "user", "content": "x", "train": "no"}]}', "'train': 'no'"),
    ('{"messages": [{"role": "user", "content": "x", "mask": [0]}]}', "'mask': [0]"),
    ('{"messages": [{"role": "user", "content": "x", "weight": 1, "train": false}]}',
     "'weight' is 1, 'train' is False"),
    ('{"messages": [{"role": "user", "content": "x", "mask": 1, "loss": true}]}',
     "'loss' is True, 'mask' is 1"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', "unknown role ['user']"),
    ('{"conversations": [{"from": ["human"], "value": "x"}]}', "unknown role ['human']"),
    ('{"messages": [{"role": "user", "content": "x", "name": "\\ud800"}]}', "surrogate"),
    ('{"messages": [{"role": "system", "content": "S"}], "system": "T"}', "'system' is not what"),
    ('{"prompt": "x", "completion": null}', "known layouts"),
    ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}', "tool_calls"),
    ('{"messages": [{"role": "user", "content": "x"}], "tools": [1]}', "'tools'"),
    ('{"prompt": "capital", "input": "of France", "completion": "Paris"}', "'input' is in none of its"),
    ('{"instruction": "a", "output": "b", "context": "of France"}', "'context' is in none"),
    ('{"messages": [{"role": "user", "content": "x"}], "prompt": "a", "completion": "b"}', "'prompt' is in"),
    ('{"messages": [{"role": "user", "content": "x"}], "conversations": [{}]}', "both 'messages' and"),
    ('{"instruction": "a", "input": 0, "output": "b"}', "'instruction' and 'input' must be text"),
    ('{"conversations": [{"from": "human", "role": "assistant", "value": "x"}]}', "'from' and 'value'"),
    ('{"messages": [{"role": "user", "content": "x", "compute_loss": false}]}', "'compute_loss'"),
    ('{"messages": [{"role": "user", "content": "x", "Train": false}]}', "'Train'"),
    ('{"messages": [{"role": "user", "content": "x", "ignore": true}]}', "'ignore'"),
    ('{"conversations": ["x"]}', "'conversations'"), ('{"instruction": 1, "output": "x"}', "'instruction'"),
    ('{"prompt": ["x"], "completion": "y"}', "'content' is list"),
    ('{"prompt": "\\ud800", "completion": "y"}', "surrogate"), ("\udcff", "can't decode"),
])
def test_a_bad_record_is_named_with_file_and_line(line, says, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(f'{json.dumps({"messages": MESSAGES})}\n{line}\n'.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        list(read_records(file))
    assert says in str(error.value) and "bad.jsonl:2:" in str(error.value)


def test_bad_files_are_named(tmp_path):
    for name, content, says in (("none.jsonl", None, "no such file"), ("x.csv", b"a", "unknown file type"),
                                ("x.json", b"{}", "not a list"), ("x.jsonl.gz", b"no gzip", "x.jsonl.gz")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=says):
            list(read_records(tmp_path / name))
