"""All runs of a comparison, one after the other, and `comparison.json`: what became of each."""

import logging
import shlex
import time

from hf_ft_ext.compare.process import DONE, FAILED, STOPPED, Outcome, find_run, log_of, run_or_find
from hf_ft_ext.compare.settings import Comparison, Variant
from hf_ft_ext.files import write_json
from hf_ft_ext.report.read import COMPARISON, NOT_STARTED
from hf_ft_ext.training.sharing.privacy import without_secrets

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 10  # kept back of the time limit for the report
INTERRUPTED = 130


def run_all(comparison: Comparison, start: float) -> int:
    """Run every variant with every seed, write `comparison.json` after each, and return the exit status.

    All variants have their first seed before one has its second, so that a time limit leaves something of each. A
    run that fails does not keep the others from running; a run is not started if one of its variant took longer than
    what is left of the time.

    Args:
        start: when the comparison began, by `time.monotonic`.
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
    except KeyboardInterrupt:
        logger.warning("interrupted: the report shows what was finished; the same command continues")
        _write(comparison, entries, time.monotonic() - start)
        return INTERRUPTED
    return int(any(entry["state"] == FAILED for entry in entries.values()))


def _one(comparison: Comparison, variant: Variant, seed: int, left: float | None, expected: float) -> Outcome:
    folder, words = comparison.folder(variant, seed), comparison.words(variant, seed)
    if (found := find_run(folder, words)) is not None:
        return Outcome(DONE, found)
    if left is not None and left <= expected:
        took = f"; this method took {expected:.0f} s before" if expected else ""
        return Outcome(NOT_STARTED, reason=f"{max(left, 0):.0f} s were left of --max_minutes{took}")
    logger.info("%s, seed %d: started, output in %s", variant.name, seed, log_of(folder))
    outcome = run_or_find(folder, words, left)
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
