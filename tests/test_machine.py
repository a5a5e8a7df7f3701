"""Memory taken ahead, threads shared among ranks."""
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import machine


RESERVE = """
import os
from pathlib import Path
import machine

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

size = 2**27
before = resident_bytes()
reserve = machine.Reserve(size)
reserve.thread.join()
assert resident_bytes() - before > 0.9 * size - 2**23
reserve.release()
reserve.release()   # once is enough, twice does no harm
machine.Reserve(0).release()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from Linux's /proc")
def test_reserve_takes_memory_at_once_and_leaves_it_to_malloc():
    """In a process of its own: in this one malloc may have as much left from other tests."""
    root = Path(machine.__file__).parent
    done = subprocess.run([sys.executable, "-c", RESERVE], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ranks_share_the_cores(monkeypatch):
    given = []
    monkeypatch.setattr(machine.torch, "set_num_threads", given.append)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for ranks, threads in (("1", "1"), ("4", "1"), ("4", "2")):     # torchrun's 1 is nobody's choice
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        machine.share_threads()
    assert given == [3]
