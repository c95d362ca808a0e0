"""The helper that runs commands: what comes back, and the stacks of a command that does not end."""

import sys
import time

import psutil
import pytest
from processes import finished

WAITING = """
import subprocess, sys, time

def waits_for_ever():
    print("begun", flush=True)
    time.sleep(60)

if len(sys.argv) > 1:
    waits_for_ever()
else:
    subprocess.run([sys.executable, __file__, "inner"], start_new_session=True)
"""


def test_output_and_status_come_back(tmp_path):
    done = finished([sys.executable, "-c", "import os; print(os.getcwd()); raise SystemExit('no')"], 60, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, f"{tmp_path}\n", "no\n")
    done = finished([sys.executable, "-c", "import os; print(os.environ['SAID'])"], 60, env={"SAID": "this"})
    assert done.returncode == 0 and done.stdout == "this\n"


def test_what_does_not_end_is_ended_and_says_where_it_was(tmp_path):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="did not end within 5 s\nbegun") as failure:
        finished([sys.executable, str(script)], 5)
    assert "in waits_for_ever" in str(failure.value) and time.monotonic() - start < 30
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(script) in (p.info["cmdline"] or ())]
