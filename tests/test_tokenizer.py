"""What a checkpoint folder's tokenizer must have, and what is said when it has not."""
import json

import pytest

import tokenizers_for_tests
from data import Tokenizer, load_dataset, load_template
from model import ModelConfig, check_vocabulary
from tiny import make_records


def test_a_folder_with_a_sentencepiece_model_only_is_told_how_to_convert(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="only a SentencePiece tokenizer.model; convert it once with"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="tokenizer.json: no such file$"):
        Tokenizer(tmp_path)


def test_the_embedding_may_have_rows_to_spare_but_none_too_few():
    config = ModelConfig.from_dict(dict(model_type="llama", vocab_size=100, hidden_size=8,
                                        intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    check_vocabulary(config, 100)
    check_vocabulary(config, 60)
    with pytest.raises(ValueError, match="ids up to 100, the embedding only 100 rows"):
        check_vocabulary(config, 101)


@pytest.mark.parametrize("name", ["llama3", "llama2"])
def test_a_template_that_writes_bos_twice_is_refused(name, tmp_path):
    tokenizer = Tokenizer(tokenizers_for_tests.write(name, tmp_path / "model"))
    source = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    make_records(tmp_path / "train.jsonl", 3)
    for bos, fine in (("", True), ("{{ bos_token }}", True), ("{{ bos_token }}{{ bos_token }}", False)):
        (tmp_path / "t.jinja").write_text(bos + source)
        template = load_template(str(tmp_path / "t.jinja"), tokenizer)
        if fine:
            load_dataset([tmp_path / "train.jsonl"], tokenizer, template, 99, "truncate", tmp_path / "cache")
        else:
            with pytest.raises(ValueError, match="twice"):
                load_dataset([tmp_path / "train.jsonl"], tokenizer, template, 99, "truncate",
                             tmp_path / "cache")


def test_whether_bos_is_added_is_read_from_the_tokenizer_and_its_config(tmp_path):
    assert Tokenizer(tokenizers_for_tests.write("llama3", tmp_path / "a")).adds_bos
    assert not Tokenizer(tokenizers_for_tests.write("qwen", tmp_path / "b")).adds_bos
    assert not Tokenizer(tokenizers_for_tests.write("phi3", tmp_path / "c")).adds_bos  # has one, adds none
    config = tmp_path / "a" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "add_bos_token": False}))
    assert not Tokenizer(tmp_path / "a").adds_bos


def test_named_tokens_are_special_even_where_the_file_forgot_to_say_so(tmp_path):
    folder = tokenizers_for_tests.write("llama3", tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer(folder)
    end = tokenizer.special["<|eot_id|>"]
    assert end in tokenizer.reference.encode("a<|eot_id|>").ids
    assert end not in tokenizer.first.encode("a<|eot_id|>", add_special_tokens=False).ids
