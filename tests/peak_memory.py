"""Peak memory of code that runs in a process of its own."""

import subprocess
import sys

MEASURE = """
import pathlib, resource, sys
import numpy as np
def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # the other figure is at least what the parent process had
        (line,) = [one for one in status.read_text().splitlines() if "VmHWM" in one]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
"""


def measured(code, *arguments):
    """Run code in a new process and return the values that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(number) for number in done.stdout.split()]
