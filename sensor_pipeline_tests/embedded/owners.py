"""A Python process that starts something and is then killed without any chance to clean up."""

from __future__ import annotations

import subprocess
import sys


def run_and_kill(code: str) -> None:
    """Run code that starts what it starts; kill the process with SIGKILL once the code has run."""
    script = f"{code}\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"
    result = subprocess.run([sys.executable, "-c", script], check=False)
    assert result.returncode == -9
