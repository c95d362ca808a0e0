"""A process of several ends with its status, its output and its exit handlers, without the interpreter's teardown."""

import sys

from processes import finished

PROGRAM = """
import atexit, sys, threading, time
from hf_ft_ext.launch.stopping import end_process, keep_alive

class Torn:
    def __del__(self):
        print("torn down", flush=True)

def late():
    time.sleep(0.3)
    print("thread done")

keep_alive(Torn())
atexit.register(print, "exit handler")
threading.Thread(target=late).start()
print("output", end=" ")
if sys.argv[1:]:
    sys.exit(3)
end_process(3)
"""


def test_exit_handlers_and_threads_finish_but_the_interpreter_is_not_torn_down(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = finished([sys.executable, str(script)], 60)
    assert (done.returncode, done.stdout) == (3, "output thread done\nexit handler\n"), done.stderr
    usual = finished([sys.executable, str(script), "usual"], 60)  # the order that the interpreter keeps
    assert (usual.returncode, usual.stdout) == (3, done.stdout + "torn down\n"), usual.stderr
