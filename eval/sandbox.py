"""Run a Python program that nobody has read, so that the worst it can do is fail.

    run_python(["print('hi')"], seconds=5, megabytes=512)
    -> Outcome(finished=True, reason="", output="hi\\n")

bwrap (package bubblewrap) isolates it, without root. The program finds Python's standard library and /usr,
both read-only, and otherwise empty folders: no file, socket, pipe or device of the machine, no /proc, no
network, no environment variables. It has no capabilities and can write nothing but its output. It ends when
its time is up, and when the process that started it is killed.

What namespaces do not limit, a filter of system calls refuses (REFUSED). A single process that cannot write
files holds memory only in its address space, so RLIMIT_AS limits all of it.
"""
import json
import os
import platform
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from typing import IO, NamedTuple

# bytes of the output that are read, from its end
OUTPUT_BYTES = 2**16
# what bwrap and the interpreter may take to start, on a busy machine
START_SECONDS = 60
NOT_ISOLATED = ("this system cannot isolate programs, so none was run. It takes Linux on x86_64 or aarch64, "
                "bwrap (apt-get install bubblewrap) and permission to create user namespaces")
# System calls that a program may not make: their numbers on x86_64 and on aarch64, which has no fork
REFUSED = {
    # a second process or thread; a user namespace, in which it would have capabilities again
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "unshare": (272, 97),
    # use of the memory of bwrap's own process, which has no limits
    "ptrace": (101, 117), "process_vm_writev": (311, 271),
    # memory outside its address space
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "vmsplice": (278, 75), "bpf": (321, 280),
    # what namespaces do not isolate: sockets to a virtual machine's host, the user's keys
    "socket": (41, 198), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    # system calls through a queue, which this filter would not see
    "io_uring_setup": (425, 425),
}
# by machine: its number in the Linux audit interface, its place in REFUSED
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


class Outcome(NamedTuple):
    """finished: the program came to its end; reason: why not, else ""; output: the end of what it printed."""
    finished: bool
    reason: str
    output: str


def system_call_filter() -> bytes:
    """REFUSED for bwrap's --seccomp: a BPF program, as in the kernel's seccomp_filter.rst."""
    architecture, place = MACHINES[platform.machine()]
    numbers = [both[place] for both in REFUSED.values() if both[place] is not None]
    load, if_equal, if_at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    # A step is an operation, how many steps to jump over if the comparison holds and if not, and a value.
    # The call's number is at byte 0 of what the filter is given, the architecture at byte 4.
    steps = [(load, 0, 0, 4), (if_equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    # Numbers from 2**30 are x86_64's second set of the same calls (x32).
    steps.append((if_at_least, len(numbers) + 1, 0, 2**30))
    steps += [(if_equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def start(bwrap: str, channel: socket.socket, output: IO[bytes], *limits: int) -> subprocess.Popen:
    """inside_sandbox.py with `limits` in the sandbox. `channel`, closed here, becomes its standard input."""
    python = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    inside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "inside_sandbox.py")
    empty = ("/tmp", "/run", "/home", "/root", "/dev")
    readable = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", f"{sys.base_prefix}/lib", python)
    # bwrap reads the filter from a pipe that holds all of it.
    reader, writer = os.pipe()
    os.write(writer, system_call_filter())
    os.close(writer)
    command = [bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session",
               "--cap-drop", "ALL",
               *(word for path in empty for word in ("--dir", path)),
               *(word for path in readable for word in ("--ro-bind-try", path, path)),
               "--ro-bind", inside, "/inside_sandbox.py", "--remount-ro", "/", "--chdir", "/tmp",
               "--seccomp", str(reader), python, "-I", "-S", "/inside_sandbox.py", *map(str, limits)]
    try:
        # In a session of its own, so that Ctrl-C ends the evaluation and fails no program.
        return subprocess.Popen(command, stdin=channel, stdout=output, stderr=output, pass_fds=[reader],
                                env={}, start_new_session=True)
    finally:
        os.close(reader)
        channel.close()


def run_python(sources: list[str], seconds: float, megabytes: int) -> Outcome:
    """Run `sources` one after the other in one module, for at most so many seconds and with so much memory.

    They have finished only if a random token came back, which their process reads after the last line of the
    last one, so leaving early or printing something proves nothing. A program that searches its own process
    for the socket with the token can still cheat: there are no secrets within one interpreter.
    ValueError, naming what to install, if this system cannot isolate it."""
    bwrap = shutil.which("bwrap")
    if platform.machine() not in MACHINES or not bwrap:
        raise ValueError(f"{NOT_ISOLATED} (here: {platform.machine()}, {bwrap or 'no bwrap'})")
    token, request = secrets.token_bytes(32), json.dumps(sources).encode()
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryFile() as output:
        process = start(bwrap, theirs, output, int(seconds) + 1, megabytes)
        started, reply, reason = b"", b"", ""
        try:
            # One byte says that the sources can be sent. By then bwrap's processes end with this one.
            ours.settimeout(START_SECONDS)
            started = ours.recv(1)
            if started:
                ours.sendall(len(request).to_bytes(8, "big") + request + token)
                process.wait(seconds)
                reply = ours.recv(len(token))
        except subprocess.TimeoutExpired:
            reason = f"not done after {seconds:g} s"
        except OSError:
            # bwrap did not start in time, or the program left the token unread
            pass
        finally:
            process.kill()
            process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - OUTPUT_BYTES))
        text = output.read().decode(errors="replace")
    last_line = (text.strip().splitlines() or [""])[-1][:200]
    if not started:
        raise ValueError(f"{NOT_ISOLATED} ({last_line or 'the sandbox did not start'})")
    if reply == token:
        return Outcome(True, "", text)
    return Outcome(False, reason or last_line or f"exit status {process.returncode}", text)
