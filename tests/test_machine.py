"""Memory taken ahead, threads shared among ranks."""
import os
from pathlib import Path

import pytest

import machine


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_reserve_takes_memory_at_once_and_leaves_it_to_malloc():
    size = 2**27
    before = resident_bytes()
    reserve = machine.Reserve(size)
    reserve.thread.join()
    assert resident_bytes() - before > 0.9 * size - 2**23
    reserve.release()
    reserve.release()   # once is enough, twice does no harm
    machine.Reserve(0).release()


def test_ranks_share_the_cores(monkeypatch):
    given = []
    monkeypatch.setattr(machine.torch, "set_num_threads", given.append)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for ranks, threads in (("1", "1"), ("4", "1"), ("4", "2")):     # torchrun's 1 is nobody's choice
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        machine.share_threads()
    assert given == [3]
