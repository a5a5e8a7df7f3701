"""Programs that mean harm: each must fail or be stopped, and leave the machine as it was.

Each is written so that it does little harm even if the sandbox is broken: no signal to all processes, no file
written or mode changed where it would last."""
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from eval import sandbox
from eval.sandbox import run_python
from isolation import isolated

ROOT = Path(__file__).resolve().parent.parent


def run(program: str, seconds: float = 5, megabytes: int = 128):
    return run_python([program], seconds, megabytes)


def printed(program: str, seconds: float = 5) -> str:
    """What a harmless program prints."""
    done = run(program, seconds)
    assert done.finished, done
    return done.output.strip()


@isolated
def test_a_harmless_program_finishes_and_its_output_comes_back():
    assert run("import math\nprint(math.pi)") == (True, "", "3.141592653589793\n")


@isolated
@pytest.mark.parametrize("program, reason", [
    ("assert 1 == 2, 'no'", "AssertionError: no"), ("x = (", "SyntaxError: '(' was never closed"),
    ("raise SystemExit", "exit status 0"), ("import sys; sys.exit(7)", "exit status 7"),
    ("import os; os._exit(0)", "exit status 0"), ("import os; os._exit(113)", "exit status 113"),
    ("import os; os.killpg(0, 9)", "exit status 137"),
    ("import ctypes; ctypes.string_at(0)", "exit status 139"), ("'\ud800'", "UnicodeEncodeError"),
    ("import os; os.closerange(0, 64)", "exit status"),
    ("import os; os.execv('/usr/bin/true', ['true'])", "exit status 0"),
    ("print('+' * 100); print(input())", "EOFError: EOF when reading a line"),
])
def test_one_that_leaves_before_its_end_has_failed_whatever_its_status_and_output(program, reason):
    done = run(program)
    assert not done.finished and reason in done.reason


@isolated
def test_a_program_that_is_cut_off_swallows_nothing_of_its_test():
    assert not run_python(['x = """', 'assert False  # """'], 5, 128).finished


@isolated
@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)",
                                     "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
                                     "import os, signal; os.killpg(0, signal.SIGSTOP)",
                                     "while True: print('x' * 10**6)"])
def test_one_that_never_ends_is_stopped_in_time(program):
    began = time.monotonic()
    done = run(program, seconds=1)
    assert not done.finished and time.monotonic() - began < 4 and len(done.output) <= 2**16


@isolated
@pytest.mark.parametrize("how", ["os.fork()", "import subprocess; subprocess.run(['true'])",
                                 "import threading; threading.Thread(target=print).start()",
                                 "import multiprocessing as m; m.Process(target=print).start()"])
def test_it_cannot_make_processes_or_threads(how):
    done = run(f"import os\n{how}\nprint('made')")
    assert not done.finished and "made" not in done.output


# Ways to hold 400 MB or more, three times what is allowed, in files below the limit of a file's size.
MEMORY = {
    "malloc": "x = bytearray(2**29)",
    "many small pieces": "x = [bytearray(2**20) for i in range(512)]",
    "a shared mapping": "x = mmap.mmap(-1, 2**29)\nfor i in range(0, 2**29, 4096): x[i] = 1",
    "memfd": "for i in range(50): assert os.write(os.memfd_create('x'), bytes(2**23)) == 2**23",
    "SysV": """
libc.shmat.restype = ctypes.c_void_p
for i in range(16):
    part = libc.shmget(0, ctypes.c_size_t(2**25), 0o1600)
    assert part >= 0
    at = ctypes.c_void_p(libc.shmat(part, None, 0))
    ctypes.memset(at, 1, 2**25)
    libc.shmdt(at)""",
    "/tmp": "for i in range(50): open(f'/tmp/{i}', 'wb').write(bytes(2**23))",
    "/dev/shm": "for i in range(50): open(f'/dev/shm/{i}', 'wb').write(bytes(2**23))",
    "files without content": "for i in range(9): open(f'{i}', 'w')",
    "a new file system": "assert libc.unshare(0x10020000) == 0",
    "pages in a pipe": """
class Piece(ctypes.Structure):
    _fields_ = [('address', ctypes.c_void_p), ('size', ctypes.c_size_t)]
buffer = ctypes.create_string_buffer(8)
assert libc.vmsplice(os.pipe()[1], ctypes.byref(Piece(ctypes.addressof(buffer), 8)), 1, 0) == 8""",
}


@isolated
@pytest.mark.parametrize("kind", MEMORY)
def test_the_memory_limit_holds_for(kind):
    done = run(f"import ctypes, mmap, os\nlibc = ctypes.CDLL(None)\n{MEMORY[kind]}", seconds=10)
    assert not done.finished and "not done after" not in done.reason


@isolated
def test_it_cannot_write_more_than_its_share_of_output():
    assert printed("""
import os
size = 0
try:
    while True:
        size += os.write(1, b'x' * 2**20)
except OSError:
    os.ftruncate(1, 0)
    os.lseek(1, 0, os.SEEK_SET)
    print(size)
""") == str(2**24)


@isolated
def test_all_that_it_finds_is_the_interpreter_and_it_can_write_nowhere():
    found = printed("""
import os
for folder in ('/tmp', '/run', '/home', '/dev', '/root'):
    print(folder, os.listdir(folder))
print(*os.listdir('/'))
for folder, _, _ in os.walk('/'):
    if os.access(folder, os.W_OK):
        print('could write in', folder)
""", seconds=120).splitlines()
    interpreter = Path(sys.base_prefix).parts[1:]
    for line in found[:5]:
        folder = line.split()[0]
        assert line == f"{folder} {[interpreter[1]] if folder[1:] == interpreter[0] else []}"
    assert set(found[5].split()) <= {"tmp", "run", "home", "dev", "root", "usr", "bin", "lib", "lib64", "etc",
                                     "inside_sandbox.py", interpreter[0]}
    assert len(found) == 6


@isolated
def test_files_sockets_and_fifos_outside_cannot_be_reached(tmp_path):
    victim, fifo, path = tmp_path / "victim", tmp_path / "fifo", tmp_path / "socket"
    victim.write_text("mine")
    os.mkfifo(fifo)
    os.chmod(tmp_path, 0o777)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        for harm in (f"os.remove({str(victim)!r})", f"open({str(victim)!r})", f"os.stat({str(fifo)!r})",
                     f"os.chmod({str(victim)!r}, 0)", f"os.stat({str(path)!r})",
                     "os.chmod('/dev/null', 0o666)", "os.mknod('/tmp/x', 0o20666, os.makedev(1, 3))",
                     "os.chmod('/usr', 0o755)"):
            done = run(f"import os\n{harm}")
            assert not done.finished and "Error" in done.reason, harm
    assert victim.read_text() == "mine"


@isolated
def test_it_has_no_capabilities_and_cannot_get_any():
    # capget's version 3: header, then (effective, permitted, inheritable) twice; prctl 39: no_new_privs
    assert printed("""
import ctypes, struct
libc = ctypes.CDLL(None)
data = ctypes.create_string_buffer(b'x' * 24, 24)
assert libc.capget(struct.pack('Ii', 0x20080522, 0), data) == 0
print(any(data.raw), libc.prctl(39, 0, 0, 0, 0), libc.unshare(0x10000000),
      libc.mount(None, b'/', None, 32 | 4096, None), libc.umount2(b'/', 2))
""") == "False 1 -1 -1 -1"


@isolated
def test_it_sees_no_process_outside():
    # signal 0 only asks whether a signal could be sent: a broken sandbox must not cost us our processes
    assert printed(f"""
import os
print(os.path.exists('/proc'), os.getpid())
os.kill(os.getpid(), 0)
for pid in ({os.getpid()}, {os.getppid()}):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        print('none')
""").splitlines() == ["False 2", "none", "none"]


@isolated
def test_the_memory_of_bwraps_own_process_cannot_be_used():
    attach = 16
    assert printed(f"""
import ctypes
libc = ctypes.CDLL(None)
print(libc.ptrace({attach}, 1, None, None), libc.process_vm_writev(1, None, 0, None, 0, 0))
""") == "-1 -1"


@isolated
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for harm in (f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)",
                     "socket.socket(socket.AF_VSOCK)", "socket.socket(socket.AF_UNIX)"):
            done = run(f"import socket\n{harm}")
            assert not done.finished and "PermissionError" in done.reason, harm


@isolated
def test_the_network_is_one_of_its_own_even_without_the_filter(monkeypatch):
    monkeypatch.setattr(sandbox, "REFUSED", {})
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = run(f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)")
    assert not done.finished and "Error" in done.reason


@isolated
def test_nothing_of_the_environment_is_seen_and_no_file_descriptor_is_inherited(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "abc")
    with tempfile.TemporaryFile() as file:
        os.set_inheritable(file.fileno(), True)
        inherited = printed("""
import os, stat
print(dict(os.environ))
for descriptor in range(64):
    try:
        kind = os.fstat(descriptor).st_mode
        print(descriptor, 'FIFO' if stat.S_ISFIFO(kind) else 'socket' if stat.S_ISSOCK(kind) else 'file')
    except OSError:
        pass
""").splitlines()
    assert "abc" not in inherited[0]
    # standard input, both outputs (one file), and the socket that the token waits in
    assert sorted(line.split()[1] for line in inherited[1:]) == ["FIFO", "file", "file", "socket"]


def processes(mark: str) -> list[str]:
    """Ids of running processes whose command line has it."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [file.parent.name] if mark.encode() in file.read_bytes() else []
        except OSError:
            continue
    return found


@isolated
@pytest.mark.parametrize("delay", [0, 0.01, 0.02, 0.03, 0.5])
def test_nothing_is_left_of_it_when_the_evaluation_is_killed(delay):
    # limits that no other process has
    seconds, megabytes = 3600, 1000 + os.getpid() % 10000 + int(delay * 100)
    mark = f"/inside_sandbox.py\0{seconds + 1}\0{megabytes}\0"
    script = f"""
from eval.sandbox import run_python
run_python(['import time; time.sleep({seconds})'], {seconds}, {megabytes})"""
    evaluation = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not processes(mark):
        assert time.monotonic() < deadline and evaluation.poll() is None
    time.sleep(delay)
    evaluation.kill()
    evaluation.wait()
    while processes(mark):
        assert time.monotonic() < deadline, "it is still running"
        time.sleep(0.01)


@isolated
def test_a_user_without_rights_can_run_programs():
    python = shutil.which("python3", path="/usr/bin")
    if os.getuid() or not python:
        pytest.skip("these tests run as root, or there is no interpreter that every user can run")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name in ("sandbox.py", "inside_sandbox.py"):
            shutil.copy(ROOT / "eval" / name, folder)
        script = "import os, sandbox; print(os.getuid(), sandbox.run_python(['print(1)'], 5, 128))"
        done = subprocess.run([python, "-c", script], cwd=folder, user=65534, group=65534, extra_groups=[],
                              capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.stdout == "65534 Outcome(finished=True, reason='', output='1\\n')\n", done.stderr


@pytest.mark.parametrize("bwrap", [None, "#!/bin/sh\necho 'bwrap: No permissions' >&2; exit 1"])
def test_without_bwrap_or_namespaces_the_error_says_what_to_install(tmp_path, monkeypatch, bwrap):
    if bwrap:
        (tmp_path / "bwrap").write_text(bwrap)
        (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    says = "bwrap: No permissions" if bwrap else "no bwrap"
    with pytest.raises(ValueError, match=f"apt-get install bubblewrap.*{says}"):
        run("pass")
