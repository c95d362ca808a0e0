"""Former names of modules and classes: they work, with a warning, and lead to what has the name now."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

_PACKAGE = "hf_ft_ext"

# Former name -> new name, both relative to the package.
MOVED = {
    "adapters.table": "adapters",
    "argument_completion": "arguments.completion",
    "data.dialect": "data.files.dialect",
    "data.own_files": "data.files.own_files",
    "data.records": "data.files.records",
    "data.tables": "data.files.tables",
    "data.text_files": "data.files.text_files",
    "feature_cache": "features.cache",
    "feature_rows": "features.rows",
    "fisher.mask_names": "fisher.arguments",
    "gradientless.choices": "gradientless.search_arguments",
    "gradientless.freed_memory": "gradientless.optimizers.base",
    "gradientless.optimizers.directions": "gradientless.optimizers.perturbation.directions",
    "gradientless.optimizers.estimates": "gradientless.optimizers.perturbation.estimates",
    "gradientless.optimizers.head_adam": "training.head_adam",
    "gradientless.optimizers.moves": "gradientless.optimizers.perturbation.weight_updates",
    "gradientless.optimizers.owners": "gradientless.optimizers.perturbation.module_patch",
    "gradientless.optimizers.perturb": "gradientless.optimizers.perturbation.perturb",
    "gradientless.optimizers.perturbation.moves": "gradientless.optimizers.perturbation.weight_updates",
    "gradientless.optimizers.perturbation.owners": "gradientless.optimizers.perturbation.module_patch",
    "gradientless.optimizers.perturbation.updates": "gradientless.optimizers.perturbation.update_rules",
    "gradientless.optimizers.updates": "gradientless.optimizers.perturbation.update_rules",
    "linear_fit": "features.linear_fit",
    "linear_probe": "features.linear_probe",
    "peft_models": "models.peft",
    "prompts.defaults": "prompts.templates.defaults",
    "prompts.encode": "prompts.templates.encode",
    "prompts.losses": "prompts.model.losses",
    "prompts.template": "prompts.templates.template",
    "prompts.word_rows": "prompts.model.word_rows",
    "prompts.words": "prompts.templates.words",
    "sparse.delta": "sparse.saved.delta",
    "sparse.difference": "sparse.saved.difference",
    "sparse.export": "sparse.saved.export",
    "sparse.moments": "sparse.optimizer.moments",
    "sparse.pictures": "sparse.sparsity.pictures",
    "sparse.refresh": "sparse.optimizer.refresh",
    "sparse.sparsity_watch": "sparse.sparsity.watch",
    "sparse.support": "sparse.optimizer.support",
    "training.at_once": "training.solver_trainer",
    "training.at_once_arguments": "training.solver_arguments",
    "training.batches": "training.checks",
    "training.checkpoints": "training.saved.checkpoints",
    "training.delta_files": "training.saved.delta_files",
    "training.devices": "training.weights.devices",
    "training.files": "files",
    "training.language": "launch.language.trainers",
    "training.placement": "training.weights.placement",
    "training.plan": "training.runs.plan",
    "training.precision": "training.weights.precision",
    "training.privacy": "training.sharing.privacy",
    "training.quantized": "training.weights.quantized",
    "training.record": "training.runs.record",
    "training.resources": "training.runs.resources",
    "training.saving": "training.saved.saving",
    "training.sharding": "training.weights.sharding",
    "training.text": "training.sharing.text",
    "weight_options": "models.weight_options",
}


def serve_former_names() -> None:
    """Make imports of the names in `MOVED` work; repeated calls have no effect."""
    if not any(isinstance(finder, _FormerNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FormerNames())  # first, because other finders may find an older copy of the package


def former_classes(module: str, **classes: type) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose classes had other names.

    Args:
        module: its `__name__`.
        classes: the classes by their former names.
    """

    def find(name: str) -> type:
        if name not in classes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {classes[name].__name__}", FutureWarning, stacklevel=2)
        return classes[name]

    return find


class _FormerNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path=None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != _PACKAGE or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        former = module.__name__
        name = f"{_PACKAGE}.{MOVED[former.partition('.')[2]]}"
        warnings.warn(f"{former} has moved to {name}", DeprecationWarning, stacklevel=2)
        new = importlib.import_module(name)
        public = {key: value for key, value in vars(new).items() if not key.startswith("__")}
        module.__dict__.update(public, __doc__=new.__doc__, __getattr__=lambda key: getattr(new, key))
