"""Threads shared among ranks."""
from runtime import machine


def test_ranks_share_the_cores(monkeypatch):
    given = []
    monkeypatch.setattr(machine.torch, "set_num_threads", given.append)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for ranks, threads in (("1", "1"), ("4", "1"), ("4", "2")):     # torchrun's 1 is nobody's choice
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        machine.share_threads()
    assert given == [3]
