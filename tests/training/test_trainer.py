"""Processes that Lightning starts."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("grace", "code"), [(0, -signal.SIGKILL), (60, 0)])
def test_other_processes_have_time_to_report_a_process_that_has_ended(grace: int, code: int):
    script = textwrap.dedent(f"""
        import subprocess, sys, time
        from lightning.fabric.strategies.launchers import subprocess_script
        from gm_mlic.training import trainer

        trainer._GRACE = {grace}
        ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
        subprocess_script._launch_process_observer([ended])
        time.sleep(20)  # Lightning looks every 5 seconds
    """)
    assert subprocess.run([sys.executable, "-c", script]).returncode == code
