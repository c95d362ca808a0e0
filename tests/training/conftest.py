"""Fixtures of the trainers' tests."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections():
    """What is imported by now is left out of garbage collections, of which each training run makes several."""
    gc.freeze()
    yield
    gc.unfreeze()
