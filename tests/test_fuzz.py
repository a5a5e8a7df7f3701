"""A few malformed inputs of each kind, always the same ones; `python tests/fuzz.py` feeds more."""
import pytest

import fuzz


@pytest.mark.parametrize("kind", sorted(fuzz.DRIVES))
def test_malformed_input_is_accepted_or_refused_in_one_line(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("runtime.jinja.SECONDS", 0.3)
    tally = fuzz.hunt(kind, 60, tmp_path, number=0)
    assert not tally.faults
    assert tally.accepted and tally.refused, "the inputs are all of one sort"


def test_a_fault_is_found(tmp_path, monkeypatch):
    """An input's error of another kind, an error without the file's name, and one that takes too long."""
    for error, says in ((KeyError("x"), "KeyError in"), (ValueError("without a name"), "no name in")):
        def read(case: object, out: fuzz.Path, error: Exception = error):
            yield [str(out)]
            raise error
        monkeypatch.setitem(fuzz.DRIVES, "broken", (fuzz.st.just(1), read))
        [fault] = fuzz.hunt("broken", 3, tmp_path, number=0).faults
        assert fault.startswith(says)
    monkeypatch.setattr(fuzz, "DEADLINE", -1)
    assert list(fuzz.hunt("environment", 3, tmp_path, number=0).faults) == ["too slow"]
