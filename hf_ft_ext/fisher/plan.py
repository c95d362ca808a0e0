"""`AdapterPlan`: the adapter of each layer, with scores. Stored as JSON that a user can read and edit."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import TaskType
from torch import nn

from hf_ft_ext.adapters.mixture.config import LayerMixtureConfig
from hf_ft_ext.errors import InputError, did_you_mean
from hf_ft_ext.files import tensor_hash, write_json
from hf_ft_ext.fisher.candidates import layers_of
from hf_ft_ext.models.peft import task_type_of
from hf_ft_ext.structure.heads import names_in_head

PLAN_FILE = "adapter_plan.json"
_FORMAT = "hf_ft_ext adapter plan 1"
SAME_AS_THE_MODEL = "same as the model"
_SHAPE = ("model_type", "layers", "hidden_size")


@dataclass
class AdapterPlan:
    """The adapter of each layer.

    Attributes:
        choice: layer -> name of a candidate, or `None`.
        candidates: name -> peft settings with `peft_type`.
        scores: layer -> candidate -> score; empty if the plan was made without scores.
        parameters: layer -> candidate -> number of parameters that it adds at inference.
        criterion, settings: how the scores were computed.
        model: `model_type`, `layers`, `hidden_size`, and `weights`, a hash; missing entries are not checked.
        data: a hash of the examples, and their number.
    """

    choice: dict[int, str | None]
    candidates: dict[str, dict[str, Any]]
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    parameters: dict[int, dict[str, int]] = field(default_factory=dict)
    criterion: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON to a file, or as `adapter_plan.json` into a folder."""
        path = Path(path)
        path = path / PLAN_FILE if path.is_dir() else path
        write_json(path, {"format": _FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "AdapterPlan":
        """Read a plan from a file, or from `adapter_plan.json` in a folder.

        Raises:
            InputError: the file is missing, is not a valid plan, or chooses an unknown candidate.
        """
        path = Path(path).expanduser()
        path = path / PLAN_FILE if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"adapter plan {str(path)!r} is not a file; pass the {PLAN_FILE} of a run")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"adapter plan {path} is not valid JSON: {error}") from error
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise InputError(f'{path} is not an adapter plan of this version; it needs "format": "{_FORMAT}"')
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(
                f"adapter plan {path} has an unknown entry {unknown[0]!r}{did_you_mean(unknown[0], known)}; it may "
                f"have: {', '.join(sorted(known))}"
            )
        if missing := [name for name in ("choice", "candidates") if not isinstance(values.get(name), dict)]:
            raise InputError(f"adapter plan {path} has no mapping {missing[0]!r}; add it")
        if wrong := [name for name, value in values.items() if name != "criterion" and not isinstance(value, dict)]:
            raise InputError(
                f"adapter plan {path}: {wrong[0]} is not a mapping; make a new plan (leave adapter_plan out)"
            )
        if wrong := [name for name, settings in values["candidates"].items() if not isinstance(settings, dict)]:
            raise InputError(f"adapter plan {path}: the settings of candidate {wrong[0]!r} must be a mapping")
        for name in ("choice", "scores", "parameters"):
            values[name] = {_layer(path, key): value for key, value in values.get(name, {}).items()}
        for layer, name in values["choice"].items():
            if name is not None and (not isinstance(name, str) or name not in values["candidates"]):
                raise InputError(
                    f"adapter plan {path}: the choice for layer {layer} is {name!r}"
                    f"{did_you_mean(str(name), values['candidates'])}; the candidates are: "
                    f"{', '.join(values['candidates']) or 'none'}"
                )
        return cls(**values)

    def check_model(self, model: nn.Module) -> None:
        """Raise an `InputError` if the plan was made for another model type, or names layers that the model lacks."""
        own = model_fingerprint(model)
        for key in _SHAPE:
            if self.model.get(key) is not None and self.model[key] != own[key]:
                raise InputError(
                    f"the adapter plan is for a model with {key}={self.model[key]!r}, but this one has {own[key]!r}; "
                    "make a plan for this model (leave adapter_plan out)"
                )
        layers = layers_of(model)
        if unknown := [layer for layer in self.choice if layer not in layers]:
            raise InputError(
                f"the adapter plan names layer {unknown[0]}, but the model has layers {layers[0]} to {layers[-1]}; "
                "remove that layer from the plan"
            )
        if not any(self.choice.values()):
            raise InputError("the adapter plan chooses no adapter for any layer; name a candidate for at least one")

    def same_weights(self, model: nn.Module) -> bool:
        """Whether the plan was made for the model's weights; true if the plan does not name any."""
        return self.model.get("weights") in (None, model_fingerprint(model)["weights"])

    def config(
        self, modules_to_save: list[str] | None = None, task_type: str | None = SAME_AS_THE_MODEL
    ) -> LayerMixtureConfig:
        """The peft configuration of the chosen adapters only.

        Args:
            modules_to_save: modules that train in full and are saved with the adapters.
            task_type: peft's task type; default: that of the model for which the plan was made, or `SEQ_CLS` if the
                plan does not name one.
        """
        if task_type == SAME_AS_THE_MODEL:
            task_type = self.model.get("task_type", TaskType.SEQ_CLS.value)
        used = {name for name in self.choice.values() if name is not None}
        return LayerMixtureConfig(
            task_type=task_type,
            kinds={name: settings for name, settings in self.candidates.items() if name in used},
            layers={str(layer): name for layer, name in sorted(self.choice.items()) if name is not None},
            modules_to_save=modules_to_save,
        )

    @property
    def added(self) -> int | None:
        """Number of parameters that the chosen adapters add at inference, or `None` if the plan lacks it."""
        chosen = [(layer, name) for layer, name in self.choice.items() if name is not None]
        if any(name not in self.parameters.get(layer, {}) for layer, name in chosen):
            return None
        return sum(self.parameters[layer][name] for layer, name in chosen)

    def table(self) -> str:
        """One line per layer: its scores, with the choice marked by an asterisk."""
        names = list(self.candidates)
        lines = []
        for layer, choice in sorted(self.choice.items()):
            scores = self.scores.get(layer, {})
            cells = [f"{name} {scores[name]:.3g}{'*' if name == choice else ''}" for name in names if name in scores]
            lines.append(f"layer {layer}: {', '.join(cells) if cells else choice or 'none'}"
                         f"{'' if choice or not cells else ' (none)'}")  # fmt: skip
        return "\n".join(lines)


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """The entries of a plan that identify its model: type, size, and a hash of the encoder's weights."""
    config = getattr(model, "config", None)
    named = dict(model.named_parameters())
    prefix, head = f"{getattr(model, 'base_model_prefix', '')}.", names_in_head(model, named)
    encoder = [name for name in named if name.startswith(prefix)] or [name for name in named if name not in head]
    digest = hashlib.sha256()
    for name in sorted(encoder):
        digest.update(f"{name} {tensor_hash(named[name])}".encode())
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "layers": getattr(config, "num_hidden_layers", 0),
        "hidden_size": getattr(config, "hidden_size", 0),
        "weights": digest.hexdigest(),
        "task_type": getattr(task_type_of(model), "value", None),
    }


def _layer(path: Path, key: str) -> int:
    if not str(key).isdigit():
        raise InputError(f"adapter plan {path}: {key!r} is not a layer index; layers are numbered from 0")
    return int(key)
