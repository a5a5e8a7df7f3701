"""What eval/sandbox.py runs inside the sandbox: limits itself, then runs the sources that it is sent.

    python inside_sandbox.py CPU_SECONDS MEGABYTES      with a socket to run_python as standard input
"""
import json
import os
import resource
import socket
import sys
import types

# bytes that the program may print; it has no other file to write to
OUTPUT_LIMIT = 2**24


def main() -> None:
    channel = socket.socket(fileno=os.dup(0))
    # Standard input becomes a pipe that has ended: a program must not print what it finds there.
    reader, writer = os.pipe()
    os.close(writer)
    os.dup2(reader, 0)
    os.close(reader)
    cpu_seconds, megabytes = map(int, sys.argv[1:])
    for name, limit in (("AS", megabytes * 2**20), ("CPU", cpu_seconds), ("FSIZE", OUTPUT_LIMIT),
                        ("NOFILE", 64), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    channel.sendall(b"+")
    size = int.from_bytes(channel.recv(8, socket.MSG_WAITALL), "big")
    sources = json.loads(channel.recv(size, socket.MSG_WAITALL))
    sys.argv = ["program"]
    # A module of its own, since some of the standard library looks up the module that a class is in.
    module = sys.modules["program"] = types.ModuleType("program")
    # Compiled one by one: an open string or bracket at the end of a program swallows nothing of its test.
    for source in sources:
        exec(compile(source, "program", "exec"), module.__dict__)
    # The token has waited in the socket until now.
    channel.sendall(channel.recv(32, socket.MSG_WAITALL))


main()
