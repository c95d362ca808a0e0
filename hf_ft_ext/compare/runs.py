"""Run all runs of a comparison one after the other, and write the state of each to `comparison.json`."""

import logging
import shlex
import time

from hf_ft_ext.compare.process import DONE, FAILED, STOPPED, Outcome, find_run, log_of, run_or_find
from hf_ft_ext.compare.settings import Comparison, Variant
from hf_ft_ext.files import write_json
from hf_ft_ext.report.read import COMPARISON, NOT_STARTED
from hf_ft_ext.training.sharing.privacy import without_secrets

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 10  # part of the time limit that is reserved for the report
INTERRUPTED = 130


class _Interrupted(KeyboardInterrupt):
    """The comparison was interrupted while the run of a variant and a seed was in progress for some seconds."""

    def __init__(self, variant: str, seed: int, seconds: float):
        super().__init__()
        self.variant, self.seed, self.seconds = variant, seed, seconds


def run_all(comparison: Comparison, start: float) -> int:
    """Run every variant with every seed, write `comparison.json` after each, and return the exit status.

    All variants run with the first seed before any runs with the second, so that a time limit leaves results of each.
    If a run fails, the others still run. A run is not started if an earlier one of its variant took longer than the
    remaining time.

    Args:
        start: start of the comparison, by `time.monotonic`.
    """
    limit = None if comparison.max_minutes is None else 60 * comparison.max_minutes - _REPORT_SECONDS
    entries: dict[tuple[str, int], dict] = {
        (variant.name, seed): _entry(comparison, variant, seed)
        for seed in comparison.seeds
        for variant in comparison.variants
    }
    spent: dict[str, float] = {}
    try:
        for seed in comparison.seeds:
            for variant in comparison.variants:
                left = None if limit is None else limit - (time.monotonic() - start)
                outcome = _one(comparison, variant, seed, left, spent.get(variant.name, 0.0))
                if outcome.state == DONE and outcome.seconds:
                    spent[variant.name] = max(spent.get(variant.name, 0.0), outcome.seconds)
                entries[variant.name, seed] |= {
                    "state": outcome.state, "reason": outcome.reason, "seconds": round(outcome.seconds, 1),
                }  # fmt: skip
                _write(comparison, entries, time.monotonic() - start)
                logger.info("%s, seed %d: %s", variant.name, seed, outcome.reason or outcome.state)
    except KeyboardInterrupt as stop:
        if isinstance(stop, _Interrupted):
            entries[stop.variant, stop.seed] |= {
                "state": STOPPED, "reason": "the comparison was interrupted", "seconds": round(stop.seconds, 1),
            }  # fmt: skip
        logger.warning("interrupted: the report shows the finished runs; start the same command again to continue")
        _write(comparison, entries, time.monotonic() - start)
        return INTERRUPTED
    return int(any(entry["state"] == FAILED for entry in entries.values()))


def _one(comparison: Comparison, variant: Variant, seed: int, left: float | None, expected: float) -> Outcome:
    folder, words = comparison.folder(variant, seed), comparison.words(variant, seed)
    if (found := find_run(folder, words)) is not None:
        return Outcome(DONE, found)
    if left is not None and left <= expected:
        took = f"; this method took {expected:.0f} s before" if expected else ""
        return Outcome(NOT_STARTED, reason=f"only {max(left, 0):.0f} s of --max_minutes were left{took}")
    logger.info("%s, seed %d: started, output in %s", variant.name, seed, log_of(folder))
    start = time.monotonic()
    try:
        outcome = run_or_find(folder, words, left)
    except KeyboardInterrupt as error:
        raise _Interrupted(variant.name, seed, time.monotonic() - start) from error
    if outcome.state == STOPPED:
        return Outcome(STOPPED, reason=f"{outcome.reason}, at the end of --max_minutes", seconds=outcome.seconds)
    return outcome


def _entry(comparison: Comparison, variant: Variant, seed: int) -> dict:
    folder = comparison.folder(variant, seed)
    finished = find_run(folder, comparison.words(variant, seed)) is not None
    return {
        "variant": variant.name,
        "method": variant.method,
        "seed": seed,
        "folder": str(folder.relative_to(comparison.output_dir)),
        "log": str(log_of(folder).relative_to(comparison.output_dir)),
        "state": DONE if finished else NOT_STARTED,
        "reason": "" if finished else "the comparison was interrupted before",
        "seconds": 0.0,
        "command": shlex.join(["run_glue.py", *without_secrets(comparison.words(variant, seed))]),
        "left_out": variant.left_out,
    }


def _write(comparison: Comparison, entries: dict[tuple[str, int], dict], seconds: float) -> None:
    record = {
        "task": comparison.task,
        "max_minutes": comparison.max_minutes,
        "seconds": round(seconds, 1),
        "runs": list(entries.values()),
    }
    write_json(comparison.output_dir / COMPARISON, record)
