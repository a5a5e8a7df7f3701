"""Threads shared among ranks, CUDA's memory, whether torch.compile works."""
import os
import subprocess
import sys

import pytest
import torch

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


def test_a_gpus_peaks_are_those_since_the_last_reset(monkeypatch):
    """With stand-ins for CUDA's counters."""
    peaks, device = {"allocated": 5 * 2**20, "reserved": 8 * 2**20}, torch.device("cuda")
    for name in peaks:
        monkeypatch.setattr(torch.cuda, f"max_memory_{name}", lambda device, name=name: peaks[name])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats",
                        lambda device: peaks.update(allocated=2**20, reserved=3 * 2**20))
    assert (machine.peak_memory_mb(device), machine.peak_reserved_mb(device)) == (5, 8)
    machine.reset_peak(device)
    assert (machine.peak_memory_mb(device), machine.peak_reserved_mb(device)) == (1, 3)
    machine.reset_peak(torch.device("cpu"))
    assert machine.peak_reserved_mb(torch.device("cpu")) is None


@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
                                   {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}])
def test_cudas_segments_grow_unless_the_user_says_otherwise(given, monkeypatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: None)
    machine.keep_freed_memory()
    expected = given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {name: os.environ[name] for name in names if name in os.environ} == expected


def test_why_torch_compile_fails_is_told_in_a_line(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert machine.compile_fault(cpu) == ""

    def fails(function):
        raise RuntimeError("no triton\nand more")
    monkeypatch.setattr(torch, "compile", fails)
    assert machine.compile_fault(cpu) == "RuntimeError: no triton"


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="this system does not say who waits")
def test_a_busy_machine_is_the_reason_that_is_given(monkeypatch):
    """More busy processes than cores, then none, by the counters of a quiet machine."""
    monkeypatch.setattr(machine, "WATCHED", 0.5)
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 1)
    code = "while True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2 * os.cpu_count())]
    try:
        crowding, until = machine.Crowding(), machine.time.monotonic() + 1.5
        while machine.time.monotonic() < until:
            pass
        text = crowding.warning()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert text.startswith("warning: slowed down by other processes")
    assert max(map(len, text.split("\n"))) < 80
    assert crowding.warning() == ""     # too soon to judge again
    monkeypatch.setattr(machine, "seconds_without_core", lambda: 0.0)
    monkeypatch.setattr(machine, "WATCHED", 0.0)
    assert machine.Crowding().warning() == ""
