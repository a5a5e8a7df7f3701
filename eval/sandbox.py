"""Run a Python program that nobody has read, so that the worst it can do is fail.

    run_python("print('hi')", seconds=5, megabytes=512)  ->  Outcome(status=0, output="hi\\n", reason="")

Linux only. The program gets namespaces of its own (user, processes, mounts, network, IPC; made by util-
linux's `unshare`), so it sees no process but itself and no network; every file system is read-only but for an
empty temporary one, where it starts; it cannot make processes or threads (seccomp), and has limits on memory,
CPU time, files and output. When time is up or it ends, whatever is left of it is killed with its namespace.
"""
import ctypes
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass

OUTPUT_BYTES = 2**16    # of its output that is kept
# fork, vfork, clone and clone3, by machine: seccomp's name of the architecture and the calls' numbers
CALLS = {"x86_64": (0xC000003E, (56, 57, 58, 435)), "aarch64": (0xC00000B7, (220, 435))}


@dataclass
class Outcome:
    """status: exit status, None if it was killed; output: the end of what it printed, stdout and stderr;
    reason: why it was stopped, "" if it ended by itself."""
    status: int | None
    output: str
    reason: str


def run_python(program: str, seconds: float, megabytes: int) -> Outcome:
    """Run `program` in a new interpreter (-I: without site packages of the user, environment or folder) for
    at most so many seconds and so much memory. RuntimeError if this system cannot isolate it."""
    if sys.platform != "linux" or not shutil.which("unshare") or platform.machine() not in CALLS:
        raise RuntimeError("needs Linux on x86_64 or aarch64 with util-linux's unshare")
    command = ["unshare", "--user", "--map-root-user", "--pid", "--net", "--mount", "--ipc", "--fork",
               "--kill-child", "--mount-proc", sys.executable, "-I", os.path.abspath(__file__), str(seconds),
               str(megabytes)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen([*command, folder], stdin=subprocess.PIPE, stdout=output, stderr=output,
                                   env={"PATH": "/usr/bin:/bin"}, start_new_session=True)
        reason = ""
        try:
            process.communicate(program.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            reason = f"not done after {seconds:g} s"
        finally:    # --kill-child: the namespace's first process goes with unshare, and all others with it
            for kill in (process.kill, lambda: os.killpg(process.pid, signal.SIGKILL)):
                try:
                    kill()
                except ProcessLookupError:
                    pass
            process.wait()
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - OUTPUT_BYTES))
        text = output.read().decode(errors="replace")
    if process.returncode == NOT_ISOLATED:
        raise RuntimeError(f"the program could not be isolated: {text.strip().splitlines()[-1]}")
    if not reason and process.returncode < 0:
        reason = f"killed by {signal.Signals(-process.returncode).name}"
    return Outcome(None if reason else process.returncode, text, reason)


# ---------------------------------------------------------------- inside

NOT_ISOLATED = 113
libc = ctypes.CDLL(None, use_errno=True)


def must(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def close_file_systems(folder: str) -> None:
    """All that is mounted becomes read-only; an empty file system in memory appears at folder."""
    private, recursive = 1 << 18, 1 << 14
    must(libc.mount(None, b"/", None, private | recursive, None), "mount")
    # struct mount_attr: set, clear, propagation, user namespace
    read_only = struct.pack("QQQQ", 1, 0, 0, 0)
    at_fdcwd, at_recursive, mount_setattr = -100, 0x8000, 442
    must(libc.syscall(mount_setattr, at_fdcwd, b"/", at_recursive, read_only, len(read_only)),
         "mount_setattr")
    must(libc.mount(b"none", folder.encode(), b"tmpfs", 0, b"size=64m,nr_inodes=4096"), "mount")
    os.chdir(folder)


def give_up_rights() -> None:
    """No capabilities, none to be gained by running another program, no new processes."""
    set_no_new_privs, drop_bound, set_seccomp, filter_mode = 38, 24, 22, 2
    must(libc.prctl(set_no_new_privs, 1, 0, 0, 0), "no_new_privs")
    for capability in range(64):
        libc.prctl(drop_bound, capability, 0, 0, 0)     # fails for those that this kernel has not
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    must(libc.capset(header, none), "capset")
    architecture, calls = CALLS[platform.machine()]
    load, jump_equal, give = 0x20, 0x15, 0x06           # BPF; 4 bytes at 4: architecture, at 0: the call
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000    # refuse: EPERM
    steps = [(load, 0, 0, 4), (jump_equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    for i, call in enumerate(calls):
        steps.append((jump_equal, len(calls) - i, 0, call))
    steps += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code))
    must(libc.prctl(set_seccomp, filter_mode, program, 0, 0), "seccomp")


def inside(seconds: float, megabytes: int, folder: str) -> None:
    import resource
    program = sys.stdin.buffer.read()
    try:
        close_file_systems(folder)
        for name, limit in (("AS", megabytes * 2**20), ("CPU", int(seconds) + 1), ("FSIZE", 2**24),
                            ("NOFILE", 64), ("CORE", 0)):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
        give_up_rights()
    except OSError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(NOT_ISOLATED)
    sys.argv = ["program"]
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    inside(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
