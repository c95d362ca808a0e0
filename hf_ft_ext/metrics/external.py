"""External metrics: a function of the user, or a metric of the `evaluate` library."""

import contextlib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.metrics.outputs import Outputs, probabilities
from hf_ft_ext.problem_types import CLASSIFICATION, MULTI_LABEL, REGRESSION

External = Callable[[Outputs], dict[str, float]]

# What a function of the user can get, by the names of its parameters.
_PARAMETERS: dict[str, Callable[[Outputs], Any]] = {
    **dict.fromkeys(("predictions", "y_pred", "preds"), lambda outputs: outputs.predictions),
    **dict.fromkeys(("references", "y_true", "labels"), lambda outputs: outputs.references),
    **dict.fromkeys(("probabilities", "y_prob", "y_proba"), lambda outputs: _probabilities(outputs)),
    "y_score": lambda outputs: _scores(outputs),
    "logits": lambda outputs: outputs.logits,
    "label_names": lambda outputs: list(outputs.names or ()),
}
_RESERVED = {"loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}


def user_metric(name: str) -> External:
    """Load the metric `module:function` or `file.py:function`; modules may be in the current folder.

    The function gets arguments by the names of its parameters: `predictions` (or `y_pred`), `references` (`y_true`),
    `probabilities`, `logits`, `label_names`. A function with a single parameter of another name is used as a
    `compute_metrics` and gets an `EvalPrediction`. It returns a number or a dictionary of numbers.

    Raises:
        InputError: there is no such module or function, or its parameters have other names.
    """
    module, _, attribute = name.rpartition(":")
    try:
        with _current_folder():
            function: Any = _module(module)
            for part in attribute.split("."):
                function = getattr(function, part)
    except AttributeError as error:
        raise InputError(f"metric '{name}': {module} has no {attribute}; check the name") from error
    except Exception as error:  # the user's module may raise anything
        raise InputError(
            f"metric '{name}' cannot be imported ({type(error).__name__}: {error}); correct the module or its name"
        ) from error
    if not callable(function):
        raise InputError(f"metric '{name}' is not a function but a {type(function).__name__}; pass module:function")
    return function_metric(function, name)


def function_metric(function: Callable, name: str | None = None) -> External:
    """As `user_metric`, for the function itself."""
    own_name: str = getattr(function, "__name__", type(function).__name__)
    shown = name or own_name
    wanted = _wanted(function, shown)
    key = getattr(function, "__name__", shown.rpartition(":")[2])

    def compute(outputs: Outputs) -> dict[str, float]:
        outputs = _with_valid_predictions(outputs)
        if wanted is None:
            result = function(EvalPrediction(predictions=outputs.logits, label_ids=outputs.references))
        else:
            result = function(**{parameter: _PARAMETERS[parameter](outputs) for parameter in wanted})
        return _numbers(result, shown, key)

    return compute


def evaluate_metric(name: str) -> External:
    """Load a metric of the `evaluate` library, by the path of its script or folder, or by its name.

    Raises:
        InputError: it cannot be loaded, for example without a network.
    """
    import evaluate

    try:
        metric = evaluate.load(str(Path(name).expanduser()) if "/" in name or name.startswith("~") else name)
    except Exception as error:  # of the Hub, the file system or the script
        raise InputError(
            f"unknown metric '{name}': it is not built in, and evaluate cannot load it ({first_line(error)}); without "
            "a network, pass the path of the metric's script"
        ) from error
    if not hasattr(metric, "compute"):
        raise InputError(f"metric '{name}' of evaluate is a {type(metric).__name__}, not a metric; pass another name")

    def compute(outputs: Outputs) -> dict[str, float]:
        if outputs.problem_type == MULTI_LABEL:
            raise InputError(
                f"metric '{name}' of evaluate takes one label per row, but this is multi-label; use a built-in one, "
                "such as f1_micro, or a function (module:function)"
            )
        outputs = _with_valid_predictions(outputs)
        features = metric.features[0] if isinstance(metric.features, list) else metric.features
        given: dict[str, Any] = {"references": outputs.references}
        if "prediction_scores" in features:
            given["prediction_scores"] = _scores(outputs)
        else:
            given["predictions"] = outputs.predictions
        return _numbers(metric.compute(**given), name, name.rpartition("/")[2].removesuffix(".py"))

    return compute


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Context manager in which modules of the current folder can be imported, as with `python -m`."""
    added = str(Path.cwd())
    sys.path.insert(0, added)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(added)


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).expanduser()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # known for every .py file, whether it exists or not
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _wanted(function: Callable, name: str) -> list[str] | None:
    """Parameters to pass by name; `None` = one `EvalPrediction`."""
    parameters = inspect.signature(function).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    needed = [p.name for p in required if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    positional = [p.name for p in required if p.kind is p.POSITIONAL_ONLY]
    unknown = [parameter for parameter in needed if parameter not in _PARAMETERS]
    if len(needed) + len(positional) == 1 and (unknown or positional):
        return None
    if unknown or positional or not needed:
        raise InputError(
            f"metric '{name}' has the parameters {', '.join(p.name for p in parameters)}; use only the names "
            f"{', '.join(_PARAMETERS)}, or a single parameter, which gets an EvalPrediction"
        )
    optional = ("probabilities", "label_names")
    return needed + [p.name for p in parameters if p.name in optional and p.name not in needed]


def _probabilities(outputs: Outputs) -> np.ndarray | None:
    if outputs.problem_type == REGRESSION:
        return None
    return probabilities(outputs.logits, outputs.problem_type)


def _scores(outputs: Outputs) -> np.ndarray | None:
    """Probabilities; for two classes only those of class 1, as scikit-learn expects them."""
    found = _probabilities(outputs)
    if found is None or outputs.problem_type == MULTI_LABEL or found.shape[1] > 2:
        return found
    return found[:, 1]


def _with_valid_predictions(outputs: Outputs) -> Outputs:
    """Give rows without a prediction (-1) a wrong class, as other libraries do not support class -1."""
    missing = outputs.predictions == -1
    if outputs.problem_type != CLASSIFICATION or not missing.any():
        return outputs
    predictions = outputs.predictions.copy()
    predictions[missing] = (outputs.references[missing] + 1) % outputs.margins.shape[1]
    return Outputs(**{**vars(outputs), "predictions": predictions})


def _numbers(result: Any, name: str, key: str) -> dict[str, float]:
    values = result if isinstance(result, Mapping) else {key: result}
    found = {}
    for label, value in values.items():
        value = value.item() if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1 else value
        if not isinstance(value, numbers.Real):
            raise InputError(
                f"metric '{name}' returned {type(value).__name__} for {label!r}; it must return a number, or a "
                "dictionary of numbers"
            )
        if label in _RESERVED:
            raise InputError(f"metric '{name}' returned the key {label!r}, which Trainer itself uses; rename it")
        found[str(label)] = float(value)
    if not found:
        raise InputError(f"metric '{name}' returned nothing; it must return a number, or a dictionary of numbers")
    return found
