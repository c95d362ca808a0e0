"""The command line of the comparison."""

import importlib.util
import logging
import signal
import sys
import time

from hf_ft_ext.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return its exit status.

    0 = no run failed (the time limit may have skipped some), 1 = one did, 2 = bad input, 130 = interrupted.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_ft_ext.compare").setLevel(logging.INFO)
    start = time.monotonic()
    from hf_ft_ext.training.weights.devices import seeing_one_device

    try:
        with seeing_one_device():  # the arguments are checked in this process, as if in a run
            return _compare(sys.argv[1:] if argv is None else argv, start)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _compare(argv: list[str], start: float) -> int:
    from hf_ft_ext.compare.settings import read_comparison
    from hf_ft_ext.training.sharing.text import shell_command

    comparison = read_comparison(argv)
    if comparison.dry_run:
        for seed in comparison.seeds:
            for variant in comparison.variants:
                print(shell_command(["run_glue.py", *comparison.words(variant, seed)]))
        return 0
    if importlib.util.find_spec("matplotlib") is None:  # checked before hours of training
        raise InputError('the report\'s pictures need matplotlib: pip install "hf_ft_ext[pictures]"')

    from hf_ft_ext.compare.runs import run_all
    from hf_ft_ext.report.build import write_report

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        outcome = run_all(comparison, start)
    finally:
        signal.signal(signal.SIGTERM, before)
    report = write_report([comparison.output_dir], comparison.output_dir)
    print(report.summary())
    return outcome


def _interrupt(number, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
