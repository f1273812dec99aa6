"""Processes that Lightning starts."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("grace", "code"), [(0, -signal.SIGKILL), (3600, 7)])
def test_other_processes_have_time_to_report_a_process_that_has_ended(grace: int, code: int):
    script = textwrap.dedent(f"""
        import os, subprocess, sys, threading, time, types
        from lightning.pytorch.strategies.launchers import subprocess_script
        from gm_mlic.training import trainer

        def sleep(seconds):
            observed.set()
            time.sleep(seconds)

        observed, trainer._GRACE, trainer.time = threading.Event(), {grace}, types.SimpleNamespace(sleep=sleep)
        ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
        subprocess_script._launch_process_observer([ended])
        observed.wait()
        time.sleep(3600 - {grace})
        os._exit(7)
    """)
    assert subprocess.run([sys.executable, "-c", script]).returncode == code
