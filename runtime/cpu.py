"""Which CPU this is. Imports no torch, so that programs which only start others stay small."""
import os
import platform
import re
from pathlib import Path


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_field(name: str) -> str:
    """What Linux says of its first CPU, such as its "model name" or its "flags"; "" elsewhere."""
    info = Path("/proc/cpuinfo")
    found = re.search(rf"^{name}\s*: (.*)", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1] if found else ""


def cpu_name() -> str:
    return cpu_field("model name") or platform.processor() or platform.machine()
