"""Any combination of arguments works, or ends in one of our errors before the first step."""

import os

import pytest
from argument_runs import check_run
from argument_strategies import commands
from hypothesis import HealthCheck, given, settings
from workload import METHODS

EXAMPLES = int(os.environ.get("ARGUMENT_EXAMPLES", "6"))  # of each method; `make faults` tries more
SETTINGS = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("method", METHODS)
def test_it_works_or_says_why_not(method, fault_root):
    @settings(SETTINGS, max_examples=EXAMPLES)
    @given(commands(method))
    def run(words):
        check_run(method, fault_root, words)

    run()
