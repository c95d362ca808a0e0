"""Any combination of arguments works, or ends in one of our errors before the first step."""

import pytest
from argument_runs import check_run
from argument_strategies import commands
from hypothesis import HealthCheck, given, settings
from workload import METHODS

SETTINGS = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("method", METHODS)
def test_it_works_or_says_why_not(method, fault_root):
    @settings(SETTINGS, max_examples=6)
    @given(commands(method))
    def run(words):
        check_run(method, fault_root, words)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_single_arguments(method, fault_root):
    @settings(SETTINGS, max_examples=12)
    @given(commands(method, most=1))
    def run(words):
        check_run(method, fault_root, words)

    run()
