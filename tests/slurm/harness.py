"""What tests on the real Slurm share."""

from __future__ import annotations

import os
import subprocess
from typing import Any


def slurm(testbed: Any, *command: str) -> str:
    """Standard output of a Slurm command on the testbed. Raises CalledProcessError."""
    return subprocess.run(command, env={**os.environ, **testbed.env()}, capture_output=True, text=True, check=True).stdout


def preempt(testbed: Any, seconds: float = 2) -> None:
    """An urgent job takes the nodes of everything that runs now."""
    hosts = [host for host in slurm(testbed, "squeue", "--noheader", "--states=running", "--format=%N").split() if host]
    assert hosts, "nothing runs"
    options = ["--partition=urgent", f"--nodelist={','.join(hosts)}", "--exclusive", "--time=1", "--output=/dev/null"]
    slurm(testbed, "sbatch", *options, f"--wrap=sleep {seconds}")
