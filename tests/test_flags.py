"""Flags: one check for the command line and for --config's file, and names that could mean something else."""
import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import train
from runtime.flags import Parser, flag, given_flags
from tiny import arguments, flags


@dataclass
class Some:
    rate: float = flag(0.5, "a number", above=0)
    share: float | None = flag(None, "a number, or none", least=0, below=1)
    count: int = flag(3, "a whole number", least=1)
    mode: str = flag("a", "a word", choices=("a", "b"))
    name: str = flag("", "any text")
    files: list[str] = flag(list, "names")
    fast: bool = flag(False, "yes or no")
    tidy: bool | None = flag(None, "yes, no, or as the device asks")
    delete: bool = flag(False, "only on the command line", in_file=False)


def given(tmp_path: Path, saved: object, argv: list[str] = ()) -> dict:
    file = tmp_path / "config.json"
    file.write_text(saved if isinstance(saved, str) else json.dumps(saved))
    return given_flags(Some, ["--config", str(file), *argv], "some.py", "")


@pytest.mark.parametrize("name, value, says", [
    ("rate", 0, "--rate 0: must be a finite number above 0"), ("rate", "x", "--rate x: must be a finite"),
    ("rate", float("nan"), "--rate NaN: must be"), ("rate", float("inf"), "--rate Infinity: must be"),
    ("rate", True, "--rate true: must be"), ("rate", [1], r"--rate \[1\]: must be"),
    ("share", 1, "--share 1: must be a finite number, 0 or more and below 1"), ("share", -1, "--share -1"),
    ("count", 0, "--count 0: must be a whole number, 1 or more"), ("count", 1.5, "--count 1.5: must be a"),
    ("count", True, "--count true"), ("count", "1e3", "--count 1e3"),
    ("count", "1_0", "--count 1_0: must be"),
    ("count", "\uff11", "--count \uff11: must be a whole"), ("rate", " 1", "--rate  1: must be a finite"),
    ("mode", "c", "--mode c: must be one of a, b"), ("mode", 1, "--mode 1: must be one of a, b"),
    ("mode", "", '--mode "": must be one of'), ("mode", ["a"], r'--mode \["a"\]: must be one of'),
    ("name", "", '--name "": must be text, and not empty'), ("name", [], r"--name \[\]: must be text"),
    ("files", [1], r"--files \[1\]: must be one name or a list"), ("files", {"a": 1}, "--files"),
    ("files", [""], "--files"), ("fast", "no", '--fast "no": must be true or false'), ("fast", 1, "--fast 1"),
    ("tidy", "no", '--tidy "no": must be true or false'), ("tidy", None, ""),
    ("delete", "no", ""), ("unheard_of", 1, "unknown flags:\n  unheard_of 1: unrecognized")])
def test_a_config_file_passes_the_checks_of_the_flags(tmp_path, name, value, says):
    if not says:
        assert given(tmp_path, {name: value}) == {}
        return
    with pytest.raises(ValueError, match=says):
        given(tmp_path, {name: value})
    if isinstance(value, str) and name not in ("fast", "tidy"):   # the same words on the command line
        with pytest.raises(ValueError, match=says.split(":")[0]):
            given_flags(Some, flags(**{name: value}), "some.py", "")


def test_what_a_config_file_says_is_what_a_command_line_says(tmp_path):
    saved = {"rate": "1e-4", "share": 0, "count": 7, "mode": "b", "files": "one.jsonl", "fast": True,
             "tidy": False}
    argv = ["--rate", "1e-4", "--share", "0", "--count", "7", "--mode", "b", "--files", "one.jsonl", "--fast",
            "--no-tidy"]
    expected = {"rate": 1e-4, "share": 0.0, "count": 7, "mode": "b", "files": ["one.jsonl"], "fast": True,
                "tidy": False}
    assert given(tmp_path, saved) == given_flags(Some, argv, "some.py", "") == expected
    assert given(tmp_path, saved, ["--no-fast", "--rate", "2", "--files", "a", "b"]) == {
        **expected, "fast": False, "rate": 2.0, "files": ["a", "b"]}
    # what is null or an empty list is not given; dashes are as good as underscores
    assert given(tmp_path, {"rate": None, "files": [], "--count": 2}) == {"count": 2}
    for broken in ("[]", "{", '"text"', '{"rate": 1, "rate": 2}', '{"rate": 1, "--rate": 2}'):
        with pytest.raises(ValueError, match="--config .*config.json: "):
            given(tmp_path, broken)


@pytest.mark.parametrize("name, text", [
    ("c.toml", 'rate = 1e-4\nshare = 0\ncount = 7\nfiles = ["one"]\nfast = true\n"--name" = 2026-01-05\n'),
    ("c.yaml", "rate: 1e-4\nshare: 0\ncount: 7\nfiles: [one]\nfast: yes\n--name: 2026-01-05\nmode: ~\n"),
    ("c.YML", "{rate: 1e-4, share: 0, count: '7', files: one, fast: true, name: '2026-01-05'}")])
def test_toml_and_yaml_say_what_json_says(tmp_path, name, text):
    """YAML 1.1 takes 1e-4 for text, and both take a date for a date."""
    (tmp_path / name).write_text(text)
    assert given_flags(Some, ["--config", str(tmp_path / name)], "some.py", "") == {
        "rate": 1e-4, "share": 0.0, "count": 7, "files": ["one"], "fast": True, "name": "2026-01-05"}


# Eight lists, each of which holds the one before ten times: 10^7 items.
BOMB = b"[&a [x], " + b", ".join(
    b"&%c [%s]" % (b + 1, b", ".join([b"*%c" % b] * 10)) for b in b"abcdefg") + b"]"


@pytest.mark.parametrize("name, content, says", [
    ("README.md", b"# A title\n", "is not JSON .nor .toml or .yaml by its name., or is cut off: Expecting"),
    ("c.json", b'{"rate": 1,', "is not JSON, or is cut off: Expecting"), ("c.json", b" \n", "is empty"),
    ("c.json", b"\xff\xfe\x00", "decode.*must be UTF-8 text"),
    ("c.json", b'{"rate": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested deeper than 100 levels"),
    ("c.json", b" " * 2**20 + b"{}", "has more than 1,048,576 characters"),
    ("c.toml", b"rate = \n", "is not TOML, or is cut off"),
    ("c.toml", b"rate = 1\nrate = 2\n", "is not TOML"),
    ("c.toml", b"[run]\nrate = 1\n", "unknown flags:\n  run: a table; write"),
    ("c.yaml", b"rate: [1\n", "is not YAML"),
    ("c.yaml", b"rate: 1\nrate: 2\n", "rate is given more than once"),
    ("c.yaml", b"- rate\n", "must be one mapping"), ("c.yaml", b"[" * 20_000, "is nested too deep"),
    ("c.yaml", b"rate: !!python/name:os.system\n", "is not YAML"),
    ("c.yaml", b"count: 2026-01-05 10:00:00\n", "--count 2026-01-05T10:00:00: must be a whole number"),
    ("c.yaml", b"rate: 1\n--name: 2024-99-01\n", "--name 2024-99-01: cannot be read .month must be in 1..12"),
    ("c.yaml", b"files: [a, 2024-01-01 25:00:00]",
     r"--files \[a, 2024-01-01 25:00:00\]: cannot be read .hour"),
    ("c.yaml", b"fast: !!bool x", "--fast !!bool x: cannot be read"),
    ("c.yaml", b"name: !!timestamp x", "--name !!timestamp x: cannot be read"),
    ("c.yaml", b"count: " + BOMB, r"--count \[\[\"x\"\], .{180,220}: must be a whole number"),
    ("c.yaml", b"? " + BOMB + b"\n: 1\n", "in which every flag is text"),
    ("c.json", b'{"config": "d.json"}', "unknown flags:\n  config: a file of flags cannot name another one"),
    ("folder", None, "is a folder; give a file"), ("nowhere", "", "no such file")])
def test_a_config_that_cannot_be_read_is_one_line(tmp_path, name, content, says):
    file = tmp_path / name
    if content is None:
        file.mkdir()
    elif content:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"--config {file}: .*{says}") as caught:
        given_flags(Some, ["--config", str(file)], "some.py", "")
    if "unknown" not in says:
        assert "\n" not in str(caught.value)


def test_yaml_without_pyyaml_says_what_else_will_do(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("rate: 1")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ValueError, match="pip install pyyaml; or write it as JSON or TOML"):
        given_flags(Some, ["--config", str(tmp_path / "c.yaml")], "some.py", "")


def test_deleting_and_resuming_are_never_read_from_a_file(tmp_path, capsys):
    """A saved run_config.json of a run that was started with --overwrite would delete what it repeats."""
    config = train.Config(model="m", train_data=["t.jsonl"], lr=0.5, overwrite=True, resume="never",
                          output_dir="o", date="2026-01-05")
    (tmp_path / "run_config.json").write_text(json.dumps(vars(config)))
    again = train.parse_args(["--config", str(tmp_path / "run_config.json")])
    assert (again.overwrite, again.resume, again.lr) == (False, "auto", 0.5)
    warned = re.findall(r"run_config.json: (--\S+) counts on the command line only", capsys.readouterr().err)
    assert warned == ["--overwrite", "--resume"]
    asked = train.parse_args(["--config", str(tmp_path / "run_config.json"), "--overwrite"])
    assert asked.overwrite


def test_a_model_whose_path_has_no_name_is_not_taken_for_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model in (".", "./", tmp_path):
        config = train.parse_args(flags(model=model, train_data="t.jsonl"))
        assert config.model == str(model) and config.train_data == ["t.jsonl"]
        assert config.output_dir == f"runs/{tmp_path.name}-im"
    assert train.parse_args(flags(model="/", train_data="t.jsonl")).output_dir == "runs/model-im"
    for name in ("model", "output-dir", "cache-dir", "resume", "template", "train-data"):
        with pytest.raises(ValueError, match=f"--{name} "):     # an unset variable of a shell
            train.parse_args([*flags(model="m", train_data="t.jsonl"), f"--{name}", ""])


def test_flags_that_would_do_nothing_are_refused():
    base = dict(model="m", train_data="t.jsonl")
    for more, says in ((dict(eval_every=5), "--eval-every 5: must be 0 without --eval-data"),
                       (dict(eval_generate=5), "--eval-generate 5: must be 0 without --eval-data"),
                       (dict(eval_data=["x.jsonl", "./x.jsonl"]), "--eval-data .*given twice")):
        with pytest.raises(ValueError, match=says):
            train.parse_args(flags(**base, **more))


def test_every_flag_of_a_run_survives_its_config_file(tmp_path):
    """All that run_config.json holds, with each flag at another value than its default."""
    other = {}
    for f in fields(train.Config):
        default = getattr(train.Config(), f.name)
        choices = f.metadata["choices"]
        other[f.name] = (next(c for c in choices if c != default) if choices else not default
                         if f.type in (bool, bool | None) else ["prompt=a", "input=b"] if f.type == list[str]
                         else "text" if f.type is str else 0.25 if f.type in (float, float | None) else 3)
    kept = {name: value for name, value in other.items()
            if name not in ("overwrite", "resume", "device", "eval_generate")}
    kept["mix"] = ["prompt=a=1", "input=b=0.5"]
    (tmp_path / "run_config.json").write_text(json.dumps(kept))
    again = vars(train.parse_args(["--config", str(tmp_path / "run_config.json")]))
    assert {name: again[name] for name in kept} == kept


def test_flags_config_file_and_their_errors(tmp_path):
    config = train.parse_args(arguments(tmp_path, "x", lr="1", clip_grad_norm="0", neftune_alpha="1e-4"))
    assert config.lr == 1.0 and config.neftune_alpha == 1e-4 and config.loss == "im" and config.epochs == 2
    saved = {**vars(config), "loss": "it", "seed": 7, "date": "2026-01-05"}
    (tmp_path / "c.json").write_text(json.dumps(saved))
    again = train.parse_args(["--config", str(tmp_path / "c.json"), "--seed", "9"])
    assert again.loss == "it" and again.seed == 9 and again.lr == 1.0
    embedded = train.parse_args([])
    assert Path(embedded.model).is_dir() and embedded.loss == "im" and embedded.eval_generate == 1000
    assert train.parse_args(["--shard"]).eval_generate == 0
    for argv, says in ((["--lr", "0"], "--lr 0: must be"), (["--batch-size", "0"], "--batch-size 0"),
                       (["--bach-size", "1"], "unrecognized"), (["--batch", "1"], "unrecognized"),
                       (["--loss", "rl"], "--loss"), (["--epochs", "x"], "--epochs"),
                       (["--beta2", "1"], "--beta2"), (["--train-data", "x"], "--model"),
                       (["--config", "nowhere"], "--config nowhere"),
                       (["--config", "a", "--config=b"], "--config is given more than once; write all flags"),
                       (["--config", ""], '--config "": is empty'), (["--config="], '--config "": is empty'),
                       (["--lr", "-1e-5"], "--lr -1e-5: must be a finite number above 0"),
                       (["--lr", "-.5"], "--lr -.5: must be"), (["--lr", "-inf"], "--lr -inf: must be"),
                       (["--seed", "-1E3"], "--seed -1E3: must be a whole"), (["--lr", "-x"], "expected one"),
                       (["--max-length", "1"], "--max-length 1"),
                       (["--shard", "--eval-generate", "5"], "--eval-generate 5: must be 0 with --shard")):
        with pytest.raises(ValueError, match=says):
            train.parse_args(argv)


def test_a_mix_is_files_with_shares_and_takes_the_place_of_train_data(tmp_path):
    config = train.parse_args(flags(model="m", mix=["a=b.jsonl=3", "c.jsonl=1e0"], date="2026-01-05"))
    assert config.train_data == ["a=b.jsonl", "c.jsonl"]
    assert train.parse_mix(config.mix) == (config.train_data, [0.75, 0.25])
    # run_config.json repeats the run
    (tmp_path / "run_config.json").write_text(json.dumps(vars(config)))
    assert vars(train.parse_args(["--config", str(tmp_path / "run_config.json")])) == vars(config)
    for mix, says in ((["a.jsonl"], "--mix a.jsonl: must be FILE=SHARE"),
                      (["a=1", "b=0"], "--mix b=0: must be FILE=SHARE with a share above 0 and below 1,0"),
                      (["a=-1"], "--mix a=-1: must"), (["a=nan"], "--mix a=nan"), (["a=inf"], "--mix a=inf"),
                      (["=1"], "--mix =1: must be"), (["a=1", "./a=2"], "--mix a=1 ./a=2: .* given twice")):
        with pytest.raises(ValueError, match=says):
            train.parse_args(flags(model="m", mix=mix))
    # On the command line, one takes the place of the other in the file.
    again = train.parse_args(["--config", str(tmp_path / "run_config.json"), "--train-data", "t.jsonl"])
    assert (again.train_data, again.mix) == (["t.jsonl"], [])
    again = train.parse_args(["--config", str(tmp_path / "run_config.json"), "--mix", "x.jsonl=1"])
    assert (again.train_data, again.mix) == (["x.jsonl"], ["x.jsonl=1"])
    with pytest.raises(ValueError, match="--train-data t.jsonl: --mix names the files to train on"):
        train.parse_args(flags(model="m", mix="a.jsonl=1", train_data="t.jsonl"))
    with pytest.raises(ValueError, match="--mix is given but no --model"):
        train.parse_args(flags(mix="a.jsonl=1"))


def test_a_path_may_begin_with_the_home_folder_wherever_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flags.json").write_text(json.dumps({"eval_data": ["~/e", "a~/b"], "output_dir": "~/r"}))
    config = train.parse_args(["--model=~/m", "--train-data=~/t.jsonl", "--config=~/flags.json"])
    assert (config.model, config.output_dir) == (f"{tmp_path}/m", f"{tmp_path}/r")
    assert config.train_data == [f"{tmp_path}/t.jsonl"] and config.eval_data == [f"{tmp_path}/e", "a~/b"]
    parser = Parser()
    parser.add_argument("--json")
    assert parser.parse_args(["--json=~/x.json"]).json == f"{tmp_path}/x.json"


def test_the_share_that_is_held_out_is_something_to_evaluate_on():
    base = dict(model="m", train_data="t.jsonl")
    assert train.parse_args(flags(**base, eval_fraction=0.1, eval_every=5)).evaluates
    for value in (1, -0.1, "x"):
        with pytest.raises(ValueError, match=f"--eval-fraction {value}: must be a finite number, 0 or more "
                                             "and below 1"):
            train.parse_args(flags(**base, eval_fraction=value))


def test_a_whole_number_may_be_written_with_a_point():
    assert train.parse_args(["--epochs", "3.0"]).epochs == 3
    for text in ("3.5", "3.0.0", ".0", "true"):
        with pytest.raises(ValueError, match=f"--epochs {text}: must be a whole number"):
            train.parse_args(["--epochs", text])
