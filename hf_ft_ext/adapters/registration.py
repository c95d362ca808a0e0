"""Register our tuners with peft, without importing peft before the user's code does.

After `import hf_ft_ext`, `PeftModel.from_pretrained` loads our adapters. If peft is imported already, the tuners are
registered at once, otherwise right after its first import. Registration never breaks either import: with an
incompatible version of peft, it warns, and our adapters are not available.

peft's own `register_peft_method` accepts members of peft's enum `PeftType` only, so other packages cannot use it.
"""

import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType


def register_adapters() -> None:
    """Add our adapter types to peft's mappings; calling it again has no effect.

    Also lets `AutoPeftModelForSequenceClassification` read the configuration beside an adapter.

    Raises:
        RuntimeError: peft has a method of the same name.
        ImportError, AttributeError: this version of peft lacks classes that our tuners build on.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from hf_ft_ext.adapters import AdapterType
    from hf_ft_ext.adapters.auto import read_configuration_beside_adapters
    from hf_ft_ext.adapters.bottleneck.config import BottleneckConfig
    from hf_ft_ext.adapters.bottleneck.model import BottleneckModel
    from hf_ft_ext.adapters.layer_prefix.config import LayerPrefixConfig
    from hf_ft_ext.adapters.layer_prefix.model import LayerPrefixModel
    from hf_ft_ext.adapters.mixture.config import LayerMixtureConfig
    from hf_ft_ext.adapters.mixture.model import LayerMixtureModel
    from hf_ft_ext.adapters.sparse_grad.config import SparseGradConfig
    from hf_ft_ext.adapters.sparse_grad.model import SparseGradModel

    for kind, config, tuner in (
        (AdapterType.BOTTLENECK, BottleneckConfig, BottleneckModel),
        (AdapterType.LAYER_PREFIX, LayerPrefixConfig, LayerPrefixModel),
        (AdapterType.LAYER_MIXTURE, LayerMixtureConfig, LayerMixtureModel),
        (AdapterType.SPARSE_GRAD, SparseGradConfig, SparseGradModel),
    ):
        known = PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(kind, config)
        if known is not config:
            raise RuntimeError(
                f"this version of peft has its own method {kind.value} ({known.__module__}); install an older peft or "
                "a newer hf_ft_ext"
            )
        PEFT_TYPE_TO_TUNER_MAPPING[kind] = tuner
        # A mixture's parameters have the prefixes of its kinds. Without an entry here, transformers tries all of them.
        if kind != AdapterType.LAYER_MIXTURE:
            PEFT_TYPE_TO_PREFIX_MAPPING[kind] = tuner.prefix
    read_configuration_beside_adapters()


def register_on_import_of_peft() -> None:
    """Register our adapters now if peft is imported, else right after its first import."""
    peft = sys.modules.get("peft")
    if peft is not None and not getattr(peft.__spec__, "_initializing", False):
        _register_or_warn()
    elif not any(isinstance(finder, _PeftImportHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftImportHook())


def _register_or_warn() -> None:
    try:
        register_adapters()
    except Exception as error:  # of any kind: the user's `import peft` must succeed
        version = getattr(sys.modules.get("peft"), "__version__", "unknown")
        warnings.warn(
            f"the adapters of hf_ft_ext are not available with peft {version} ({type(error).__name__}: {error}); "
            "install a version that hf_ft_ext's requirements allow: pip install 'peft>=0.21,<0.22'",
            stacklevel=2,
        )


class _PeftImportHook(importlib.abc.MetaPathFinder):
    """Finds peft by the other finders, and registers our adapters after its import."""

    def find_spec(self, fullname: str, path=None, target: ModuleType | None = None):
        if fullname != "peft":
            return None
        # A caller may only check whether peft is installed, so this finder stays until peft has been imported.
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader, finder: _PeftImportHook):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_loader"], name)  # resources, source, ...

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader  # leave no trace in the imported module
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register_or_warn()
