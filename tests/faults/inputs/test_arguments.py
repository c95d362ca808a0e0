"""Any combination of arguments works, or ends in one of our errors before the first step."""

import os

import pytest
from argument_runs import check_run

from hf_ft_ext.methods import METHODS

EXAMPLES = int(os.environ.get("ARGUMENT_EXAMPLES", "4"))  # of each method; `make faults` tries more


@pytest.mark.parametrize("method", METHODS)
def test_random_arguments_work_or_are_refused_with_a_reason(method, fault_root):
    from argument_strategies import commands  # here: hypothesis takes a second, in each process that collects tests
    from hypothesis import HealthCheck, given, settings

    always = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

    @settings(always, max_examples=EXAMPLES)
    @given(commands(method))
    def run(words):
        check_run(method, fault_root, words)

    run()
