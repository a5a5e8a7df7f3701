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


@pytest.mark.parametrize("cuda, device", [(False, "cpu"), (False, "auto"), (True, "cpu"), (True, "auto"),
                                          (True, "cuda"), (True, torch.device("cuda", 1))])
@pytest.mark.parametrize("cpu_has, cuda_has", [(True, False), (False, True)])
def test_auto_is_bf16_where_the_device_has_instructions_for_it(cuda, device, cpu_has, cuda_has, monkeypatch):
    """Without them a step takes ten times as long as in fp32, on a CPU as on an old GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or cuda_has)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu_has)
    fast = cuda_has if cuda and device != "cpu" else cpu_has
    assert machine.resolve_dtype("auto", device) == ("bf16" if fast else "fp32")
    assert machine.resolve_dtype("bf16", device) == "bf16" and machine.resolve_dtype("fp32", device) == "fp32"
    with pytest.raises(ValueError, match="--dtype fp16: must be auto, bf16 or fp32"):
        machine.resolve_dtype("fp16", device)


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


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system does not say what is in use")
def test_freed_memory_can_be_returned():
    """In a process of its own, as glibc keeps 400 MB in small blocks below one that is in use."""
    code = """
from runtime import machine
import torch
machine.keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [torch.ones(2**14) for _ in range(6400)]
del blocks[:-1]
before = resident()
machine.return_freed_memory()
print(before - resident())
"""
    returned = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(returned) > 300e6


def test_why_torch_compile_fails_is_told_in_a_line(monkeypatch):
    cpu = torch.device("cpu")
    # What PyTorch does with TORCHDYNAMO_DISABLE=1.
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert machine.compile_fault(cpu) == "it is switched off in the environment"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
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


def cpu_seconds(pauses: int = 50) -> float:
    """What pauses of 2 ms cost this process, each of them after an operation on two threads."""
    x = torch.zeros(2 * 2**15)
    x.add_(1)
    before = machine.time.process_time()
    for _ in range(pauses):
        x.add_(1)
        machine.time.sleep(0.002)
    return machine.time.process_time() - before


@pytest.mark.skipif(sys.platform != "linux", reason="another OpenMP")
def test_threads_that_wait_use_no_core_while_the_machine_is_crowded_and_spin_again_afterwards(tmp_path):
    """In a process of its own, whose threads are its own."""
    code = """if True:
        import os, sys, time, torch
        from runtime import machine
        from tests.test_machine import cpu_seconds
        torch.set_num_threads(os.cpu_count())
        cores_lacked = [0.0]
        machine.LOOK, began = 0.05, time.monotonic()
        machine.seconds_without_core = lambda: cores_lacked[0] * (time.monotonic() - began)
        machine.sleep_while_crowded()
        used = []
        for share in (0.0, 0.9, 0.0):
            cores_lacked[0], began = share * torch.get_num_threads(), time.monotonic()
            time.sleep(0.5)
            used.append(cpu_seconds())
        print(*used)
    """
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("OMP_", "GOMP_"))} | {"PYTHONPATH": "."}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                             env=environment).stdout
    quiet, crowded, again = map(float, printed.split())
    assert crowded < 0.3 * min(quiet, again)
