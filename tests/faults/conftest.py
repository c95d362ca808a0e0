"""The undamaged model and data of all fault tests, and unbroken runs to compare with."""

import pytest
from outcomes import Unbroken
from workload import Workload, prepare


@pytest.fixture(scope="session")
def fault_root(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("faults") / "shared")


@pytest.fixture(scope="session")
def unbroken(fault_root):
    """A function from a method's name (and a name and words for variants) to its unbroken run, made once."""
    made = {}

    def get(method: str, name: str = "", more: tuple[str, ...] = ()) -> Unbroken:
        if (method, name) not in made:
            made[method, name] = Unbroken(Workload(method, fault_root, more), fault_root.parent / f"{method}{name}")
        return made[method, name]

    return get
