"""Entering our tuners in peft's tables, without importing peft before somebody else does.

`import hf_ft_ext` is all that a process needs before `PeftModel.from_pretrained`: if peft is there already, the tuners
are entered at once; if not, as soon as it has been imported.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


def register_adapters() -> None:
    """Enter our adapter types in peft's tables from type to configuration, tuner and prefix; once is enough.

    From then on `AutoPeftModelForSequenceClassification` reads the configuration beside an adapter, too.
    """
    from hf_ft_ext.adapters.auto import read_configuration_beside_adapters
    from hf_ft_ext.adapters.table import enter

    enter()
    read_configuration_beside_adapters()


def register_when_peft_is_there() -> None:
    """Call `register_adapters` now, or right after peft's first import."""
    peft = sys.modules.get("peft")
    if peft is not None and not getattr(peft.__spec__, "_initializing", False):
        register_adapters()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Finds peft as the others do, and has the registration run after it."""

    def find_spec(self, fullname: str, path=None, target: ModuleType | None = None):
        if fullname != "peft":
            return None
        # Others may only ask whether peft is there, so this finder stays until it has been imported.
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader, finder: _AfterPeft):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_loader"], name)  # resources, source and the like

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # as if we had not been here
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        register_adapters()
