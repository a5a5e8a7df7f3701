"""Programs that mean harm: each must fail or be stopped, and leave the machine as it was."""
import os
import subprocess
import sys
import time

import pytest

from eval.sandbox import run_python
from isolation import isolated

pytestmark = isolated


def run(program: str, seconds: float = 5, megabytes: int = 512):
    return run_python(program, seconds, megabytes)


def test_a_harmless_program_runs_in_an_empty_folder_it_can_write_to():
    done = run("import os, math\nprint(os.listdir('.'), math.pi)\n"
               "open('x', 'w').write('1')\nprint(open('x').read())")
    assert (done.status, done.output, done.reason) == (0, f"[] {3.141592653589793}\n1\n", "")


def test_errors_and_exit_statuses_come_back():
    done = run("assert 1 == 2, 'no'")
    assert done.status == 1 and "AssertionError: no" in done.output
    assert run("import sys; sys.exit(7)").status == 7


def test_one_that_never_ends_is_stopped_in_time():
    began = time.monotonic()
    assert run("while True: pass", seconds=1).reason == "not done after 1 s"
    assert run("import time; time.sleep(60)", seconds=1).status is None
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("how", ["os.fork()", "import subprocess; subprocess.run(['true'])",
                                 "import threading; threading.Thread(target=print).start()",
                                 "import multiprocessing as m; m.Process(target=print).start()"])
def test_it_cannot_make_processes_or_threads(how):
    done = run(f"import os\n{how}\nprint('made')")
    assert done.status != 0 and "made" not in done.output


def test_memory_is_limited():
    done = run("x = []\nwhile True: x.append(bytearray(2**24))", megabytes=256)
    assert done.status != 0 and "MemoryError" in done.output


def test_it_cannot_delete_or_change_files(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    os.chmod(tmp_path, 0o777)
    for harm in (f"os.remove({str(victim)!r})", f"open({str(victim)!r}, 'w')",
                 f"shutil.rmtree({str(tmp_path)!r})", f"os.chmod({str(victim)!r}, 0)",
                 f"os.rename({str(victim)!r}, 'x')"):
        done = run(f"import os, shutil\n{harm}")
        assert done.status == 1 and "OSError" in done.output, harm
    assert victim.read_text() == "mine"


def test_it_cannot_make_the_file_systems_writable_again(tmp_path):
    program = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
remount, bind = 32, 4096
print(libc.mount(None, b"/", None, remount | bind, None), libc.umount2(os.getcwd().encode(), 2))
print(libc.unshare(0x10000000 | 0x20000), libc.mount(None, b"/", None, remount | bind, None))
open({str(tmp_path / "x")!r}, "w")
"""
    done = run(program)
    assert done.status == 1 and not (tmp_path / "x").exists() and done.output.startswith("-1 -1")


def test_it_sees_and_kills_nothing_outside():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        done = run(f"""
import os, signal
print([x for x in os.listdir('/proc') if x.isdigit()])
for pid in ({os.getpid()}, {bystander.pid}, -1):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError as error:
        print(error)
""")
        assert bystander.poll() is None
        bystander.communicate(b"\n")
    assert bystander.returncode == 0 and done.output.splitlines()[0] == "['1']"


def test_one_that_kills_what_started_it_has_failed():
    done = run("import os, signal\nos.kill(0, signal.SIGKILL)\nprint('passed')")
    assert done.status is None and done.reason == "killed by SIGKILL"


def test_there_is_no_network():
    import socket
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = run(f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)")
    assert done.status == 1 and "Error" in done.output


def test_a_flood_of_output_and_of_files_ends():
    done = run("while True: print('x' * 10**6)", seconds=3)
    assert done.status != 0 and len(done.output) <= 2**16
    assert run("open('big', 'wb').write(bytes(2**26))").status != 0


def test_nothing_of_the_environment_is_seen(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "abc")
    assert "abc" not in run("import os; print(dict(os.environ))").output
