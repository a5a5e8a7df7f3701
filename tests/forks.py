"""Programs for tests without the seconds that a new process takes to import torch: they are forked from one
server process that has imported train.py already, and run as `python ARGV` or `torchrun ARGV` would run them.

Several ranks are started, watched and restarted by torchrun's own agent; only the way it starts a process
differs. A command may be told to import the repository anew, as it would where it is started by itself. What
differs before that is tested by test_start.py and test_program.py, which start every program as a user does.
"""
import contextlib
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).resolve().parent.parent


class Ended(BaseException):
    """os._exit() was called."""


@contextlib.contextmanager
def server() -> Iterator[multiprocessing.context.ForkServerContext]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "forks"])
    # The server, which the first of all runs starts, looks for what it imports on its own sys.path.
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        yield context


def run(argv: list[str], ranks: int = 1, restarts: int = 0, cwd: Path = ROOT, timeout: int = 180,
        fresh: bool = False, **env: str) -> subprocess.CompletedProcess:
    """argv: what stands behind `python` or `torchrun`: ["-c", CODE, ...], ["-m", MODULE, ...] or
    [FILE, ...]. timeout: seconds until a process is killed. fresh: whether modules of the repository are
    imported anew. What was printed is text, as of subprocess.run, without the agent's own lines."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    with tempfile.TemporaryDirectory() as folder, server() as context:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        for file in outputs:
            file.touch()
        given = argv, env, str(cwd), list(map(str, outputs)), timeout, fresh or cwd != ROOT
        if ranks > 1:
            status = run_ranks(given, ranks, restarts)
        else:
            process = context.Process(target=program, args=given)
            process.start()
            process.join()
            status = process.exitcode
        return subprocess.CompletedProcess(argv, status, *(file.read_text() for file in outputs))


def run_ranks(given: tuple, ranks: int, restarts: int) -> int:
    """torchrun --standalone --nproc-per-node RANKS --max-restarts RESTARTS, in this process."""
    # The agent shows the traceback of how it learnt that a process it forked has ended.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=ranks, max_restarts=restarts,
                          run_id=Path(given[3][0]).parent.name, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", start_method="forkserver")
    handlers = {number: signal.getsignal(number) for number in (
        signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    try:
        elastic_launch(config, one_of_ranks)(*given)
    except ChildFailedError:
        return 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def program(argv: list[str], env: dict[str, str], cwd: str, outputs: list[str], timeout: int, fresh: bool
            ) -> None:
    """python ARGV in this process, which has the server's environment, folder and files, and gets its own."""
    signal.alarm(timeout)
    os.environ.update(env)
    os.chdir(cwd)
    for number, file in enumerate(outputs, 1):
        target = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    if fresh:
        # Also a copy of the trainer has modules of its own, to be imported instead of the server's.
        files = [*Path(cwd).glob("*.py"), *Path(cwd).glob("*/*.py")]
        own = {file.relative_to(cwd).parts[0].removesuffix(".py") for file in files}
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
    torch.set_num_threads(1)    # OMP_NUM_THREADS was read long ago
    # A module that the server has imported runs a second time as __main__, of which runpy warns.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    if argv[0] == "-c":
        sys.argv, sys.path[:0] = ["-c", *argv[2:]], [cwd]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.argv, sys.path[:0] = argv[1:], [cwd]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = argv, [str(Path(argv[0]).parent)]
        runpy.run_path(argv[0], run_name="__main__")


def one_of_ranks(*given: object) -> None:
    """The agent waits for a rank that is done to return, and knows of one that failed by its exit status."""
    def end(status: int) -> None:
        raise Ended(status)

    os._exit, exit_now = end, os._exit
    try:
        program(*given)
    except (Ended, SystemExit) as ended:
        if ended.args and ended.args[0]:
            sys.exit(ended.args[0])
    finally:
        os._exit = exit_now
