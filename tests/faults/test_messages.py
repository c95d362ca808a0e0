"""What several processes write when some of them fail: every message once, with the process that it came from."""

import logging
import os
import re
import signal
import tempfile
import time

import pytest
from kills import kill
from processes import Ended, launch_two
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from workload import Workload

from hf_ft_ext.errors import InputError
from hf_ft_ext.launch import processes, run
from hf_ft_ext.training.finite import StopAtNaN

LOST = RuntimeError("[../pair.cc:534] Connection closed by peer [127.0.0.1]:42")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "_JOINT_REPORT_SECONDS", 0.6)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def ends(act):
    """A fault: in place of the run there is `act`, an error or a function."""

    def fake(*arguments) -> None:
        if isinstance(act, BaseException):
            raise act
        if act is not None:
            act()

    def install() -> None:
        run.run_method = fake

    return install


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def lose_the_connection() -> None:
    time.sleep(0.2)
    raise LOST


def written(ended: list[Ended]) -> str:
    return "".join(re.sub(r"(?m)^  .*\n", "", one.err) for one in ended)  # without the lines of a stack


@pytest.mark.parametrize(
    ("first", "second", "status", "message"),
    [
        (InputError("no such column"), InputError("no such column"), (2, 2), r"error: no such column\n"),
        (None, InputError("no rows"), (0, 2), r"error \(process 1 of 2\): no rows\n"),
        (InputError("a"), InputError("b"), (2, 2),
         r"error \(process 0 of 2\): a\nerror \(process 1 of 2\): b\n"),
        (None, KeyError("boom"), (0, 1),
         r"unexpected error \(process 1 of 2\): \nTraceback \(most recent call last\):\nKeyError: 'boom'\n"),
        (KeyError("x 1"), KeyError("x 2"), (1, 1),  # the same place in the code
         r"unexpected error: \nTraceback \(most recent call last\):\nKeyError: 'x [12]'\n"),
        (lose_the_connection, InputError("no rows"), (1, 2), r"error \(process 1 of 2\): no rows\n"),
        (lose_the_connection, kill, (1, None),
         r"error \(process 0 of 2\): lost the connection to another process \(Connection closed by peer\), .*\n"),
        (None, terminate, (0, 143), r"stopped by SIGTERM \(process 1 of 2\): there is no checkpoint .*\n"),
        (terminate, terminate, (143, 143), r"stopped by SIGTERM: there is no checkpoint .*\n"),
        (lambda: (time.sleep(0.5), terminate()), InputError("no rows"), (143, 2),
         r"error \(process 1 of 2\): no rows\n"),
    ],
)  # fmt: skip
def test_a_message_is_written_once_with_its_process(tmp_path, first, second, status, message):
    (tmp_path / "run").mkdir()
    ended = launch_two([], tmp_path / "run", (ends(first), ends(second)), main=run.command)
    assert tuple(one.status for one in ended) == status
    assert re.fullmatch(message, written(ended)), written(ended)


def test_torchruns_summary_holds_the_message(tmp_path):
    (tmp_path / "run").mkdir()
    files = [str(tmp_path / f"{rank}.json") for rank in (0, 1)]

    def with_file(rank: int, act):
        def install() -> None:
            os.environ["TORCHELASTIC_ERROR_FILE"] = files[rank]
            ends(act)()

        return install

    faults = with_file(0, lose_the_connection), with_file(1, InputError("no rows"))
    launch_two([], tmp_path / "run", faults, main=run.command)
    assert ProcessFailure(1, 1, 2, files[1]).message == "no rows"
    assert not os.path.exists(files[0])


def test_warnings_of_all_processes_are_written_once(tmp_path):
    def warn(own: str, wait: float):
        def act() -> None:
            logger = logging.getLogger("hf_ft_ext.somewhere")
            logger.info("for information")
            logger.warning("of all")
            if own:
                logger.warning(own)
            logging.getLogger("some.package").warning("of a library")
            time.sleep(wait)  # a run ends with a barrier

        return ends(act)

    (tmp_path / "run").mkdir()
    ended = launch_two([], tmp_path / "run", (warn("", 0), warn("of one", 0.5)), main=run.command)
    assert [one.status for one in ended] == [0, 0]
    assert ended[0].err == "for information\nof all\nof a library\n"
    assert ended[1].err == "process 1 of 2: of one\n"


def test_a_second_run_of_the_same_shell_reports_again(tmp_path):
    """Started by hand, it may have the same variables as the one before."""

    def install() -> None:
        os.environ["MASTER_PORT"] = str(os.getppid())
        ends(InputError("a"))()

    (tmp_path / "run").mkdir()
    for _ in range(2):
        ended = launch_two([], tmp_path / "run", (install, install), main=run.command)
        assert written(ended) == "error: a\n"
        (folder,) = (tmp_path / "temporary").glob("hf_ft_ext-messages-*")
        os.utime(folder, (time.time() - 10,) * 2)


def test_one_process_per_machine_names_itself(monkeypatch, capsys):
    for name, value in {
        "RANK": 3,
        "WORLD_SIZE": 4,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_PORT": "x",
    }.items():
        monkeypatch.setenv(name, str(value))
    processes.report("error", "no rows")
    assert capsys.readouterr().err.startswith("error (process 3 of 4): no rows")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["refuses", "is killed"])
def test_a_process_that_fails_in_training_is_named(fault_root, tmp_path, how):
    def install() -> None:
        finite_loss = StopAtNaN.finite_loss

        def fail(self, loss):
            if self.state.global_step < 1:
                return finite_loss(self, loss)
            if how == "is killed":
                kill()
            return finite_loss(self, loss * float("nan"))

        StopAtNaN.finite_loss = fail

    (tmp_path / "run").mkdir()
    argv = Workload("full", fault_root).argv
    ended = launch_two(argv, tmp_path / "run", (None, install), main=run.command)
    lines = [line for line in written(ended).splitlines() if line.startswith(("error", "unexpected", "Traceback"))]
    expected = {
        "refuses": r"error \(process 1 of 2\): the loss is nan in step 2: lower --learning_rate",
        "is killed": r"error \(process 0 of 2\): lost the connection to another process",
    }
    assert len(lines) == 1 and re.match(expected[how], lines[0]), lines
