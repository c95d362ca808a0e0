"""Arguments of `--method fisher`."""

import json
from dataclasses import dataclass, field, fields
from typing import Any

from hf_ft_ext.arguments import Gradients, MethodTrainingArguments
from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.criteria import CRITERIA, NEEDS_TOTALS
from hf_ft_ext.fisher.criteria import DEFAULT as DEFAULT_CRITERION
from hf_ft_ext.fisher.losses import EXPECTED, LABELS, TRUE

MODES = SELECT, SINGLE, RANDOM, MASK = ("select", "single", "random", "mask")
DEFAULT_EXAMPLES = {SELECT: 64, MASK: 1024}
DEFAULT_KEEP_RATIO = 0.005
DEFAULT_MASK = "label-square"
HEAD = "head"

# FISH masks: name -> which labels, which power of the gradient
SCORED = {
    "label-square": (TRUE, 2),
    "label-absolute": (TRUE, 1),
    "expect-square": (EXPECTED, 2),
    "expect-absolute": (EXPECTED, 1),
}
RANDOM_MASK, BIAS_MASK = "random", "bias"
MASKS = (*SCORED, RANDOM_MASK, BIAS_MASK)

# What each argument is about, where it is not about all modes.
_ONLY_IN = {
    "adapter_plan": (SELECT,),
    "fisher_candidates": (SELECT, SINGLE, RANDOM),
    "fisher_candidate_settings": (SELECT, SINGLE, RANDOM),
    "fisher_criterion": (SELECT,),
    "fisher_budget": (SELECT, RANDOM),
    "fisher_examples": (SELECT, MASK),
    "fisher_batch_size": (SELECT, MASK),
    "fisher_labels": (SELECT,),
    "fisher_power": (SELECT,),
    "fisher_learning_rates": (SELECT, SINGLE, RANDOM),
    "fisher_mask": (MASK,),
    "fisher_keep_ratio": (MASK,),
}
_SETTLED_BY_PLAN = (
    "fisher_candidates", "fisher_candidate_settings", "fisher_criterion", "fisher_budget", "fisher_examples",
    "fisher_batch_size", "fisher_labels", "fisher_power",
)  # fmt: skip

# What an adapter plan depends on.
PLAN_SETTINGS = ("fisher_mode", "adapter_plan", *_SETTLED_BY_PLAN, "seed")


@dataclass
class FisherTrainingArguments(MethodTrainingArguments):
    """`transformers.TrainingArguments` plus what FishPAL and FISH masks need.

    Raises:
        InputError: a value out of range, or two values that contradict each other.
    """

    fisher_mode: str = field(
        default=SELECT,
        metadata={
            "help": "select: a pre-pass picks each layer's adapter (FishPAL). single: one candidate in all layers. "
            "random: a candidate at random in each layer. mask: chosen entries of the model's weights (FISH).",
            "choices": MODES,
        },
    )
    adapter_plan: str | None = field(
        default=None,
        metadata={"help": "A plan to train instead of a pre-pass: the adapter_plan.json of a run, edited or not."},
    )
    fisher_candidates: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the adapters to choose from: prefix, bottleneck, lora, any method of peft that can be "
            "limited to layers, or names of fisher_candidate_settings; none = the first three and the latter."
        },
    )
    fisher_candidate_settings: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Peft settings by name, such as {"lora": {"r": 4}, "wide": {"peft_type": "LORA", "r": 32}}.'
        },
    )
    fisher_criterion: str | None = field(
        default=None,
        metadata={
            "help": "How modules are scored. thesis: mean squared gradient, times a factor per kind. mean: without "
            "factors. decrease: expected decrease of the loss by a step of unit length. agreement: how far the "
            f"gradients of different examples point the same way. none = {DEFAULT_CRITERION}, which is ours, not the "
            "thesis's.",
            "choices": tuple(CRITERIA),
        },
    )
    fisher_budget: int | None = field(
        default=None,
        metadata={"help": "Parameters that the adapters together may add at inference; layers may then get none."},
    )
    fisher_examples: int | None = field(
        default=None,
        metadata={
            "help": f"Training examples of the pre-pass; none = {DEFAULT_EXAMPLES[SELECT]} to choose adapters, "
            f"{DEFAULT_EXAMPLES[MASK]} for a mask."
        },
    )
    fisher_batch_size: int = field(
        default=8, metadata={"help": "Examples per pass of the pre-pass; the numbers do not depend on it."}
    )
    fisher_labels: str = field(
        default=TRUE,
        metadata={
            "help": "true: gradients of the loss with the true label. expected: over the model's own distribution of "
            "labels; only with fisher_criterion mean or thesis.",
            "choices": LABELS,
        },
    )
    fisher_power: int = field(
        default=2, metadata={"help": "2: squared gradients. 1: absolute ones.", "choices": (1, 2)}
    )
    fisher_learning_rates: dict | str | None = field(
        default=None,
        metadata={
            "help": f"Learning rates by candidate, and `{HEAD}` for the classifier (JSON on the command line), such "
            'as {"prefix": 2e-4}; whoever is not named takes learning_rate.'
        },
    )
    fisher_mask: str | None = field(
        default=None,
        metadata={
            "help": f"Which entries a mask keeps: those of the largest Fisher information by true labels or over the "
            f"model's own, of squared or absolute gradients; random ones; or all biases. none = {DEFAULT_MASK}.",
            "choices": MASKS,
        },
    )
    fisher_keep_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of all parameters that train with a mask, the classifier among them, in (0, 1); none = "
            f"{DEFAULT_KEEP_RATIO}."
        },
    )
    # FishPAL's rate on GLUE; transformers' 5e-5 is meant for training all weights.
    learning_rate: float = field(default=5e-4, metadata={"help": "Initial learning rate of the optimizer."})

    def validate(self) -> None:
        for name in ("fisher_candidate_settings", "fisher_learning_rates"):
            setattr(self, name, _mapping(name, getattr(self, name)))
        for name, known in (
            ("fisher_mode", MODES),
            ("fisher_criterion", (None, *CRITERIA)),
            ("fisher_labels", LABELS),
            ("fisher_power", (1, 2)),
            ("fisher_mask", (None, *MASKS)),
        ):
            if getattr(self, name) not in known:
                shown = ", ".join(str(value) for value in known if value is not None)
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; choose from: {shown}")
        for name in ("fisher_examples", "fisher_budget", "fisher_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} is too few; pass 1 or more, or leave it out")
        if self.fisher_keep_ratio is not None and not 0 < self.fisher_keep_ratio < 1:
            raise InputError(f"fisher_keep_ratio={self.fisher_keep_ratio} is no share in (0, 1); pass 0.005, say")
        rates = self.fisher_learning_rates
        for name, rate in rates.items() if isinstance(rates, dict) else ():
            if isinstance(rate, bool) or not isinstance(rate, int | float) or rate < 0:
                raise InputError(f"fisher_learning_rates: {name!r} has the rate {rate!r}; pass a number from 0 on")
        self._check_together(self._changed())

    def _changed(self) -> list[str]:
        defaults = {f.name: f.default for f in fields(FisherTrainingArguments)}
        return [name for name in _ONLY_IN if getattr(self, name) != defaults[name]]

    def _check_together(self, given: list[str]) -> None:
        """Refuse what was set and has no meaning beside the rest."""
        for name in given:
            if self.fisher_mode not in _ONLY_IN[name]:
                raise InputError(
                    f"{name}={getattr(self, name)} is about fisher_mode={' or '.join(_ONLY_IN[name])}, not "
                    f"{self.fisher_mode}; leave one of them out"
                )
            if self.adapter_plan is not None and name in _SETTLED_BY_PLAN:
                raise InputError(
                    f"adapter_plan settles what {name}={getattr(self, name)} is about; leave one of them out"
                )
        if self.fisher_mode == SINGLE and len(self.fisher_candidates or ()) != 1:
            raise InputError(
                f"fisher_mode=single trains one candidate in all layers, and fisher_candidates is "
                f"{self.fisher_candidates}; name one, such as lora"
            )
        criterion = self.fisher_criterion or DEFAULT_CRITERION
        if self.fisher_power != 2 and criterion in NEEDS_TOTALS:
            raise InputError(
                f"fisher_power={self.fisher_power} is not for fisher_criterion={criterion}, which needs squared "
                "gradients; take fisher_criterion=mean or thesis, or leave it out"
            )
        selects = self.fisher_mode == SELECT and self.adapter_plan is None
        if selects and self.fisher_labels != TRUE and criterion in NEEDS_TOTALS:
            raise InputError(
                f"fisher_labels={self.fisher_labels} is not for fisher_criterion={criterion}, which compares "
                "gradients of examples: over the model's own labels their mean is zero, and scores would be rounding "
                "noise; take fisher_criterion=mean or thesis, or leave fisher_labels out"
            )
        if self.fisher_mode == MASK and self.mask not in SCORED:
            for name in ("fisher_examples", "fisher_batch_size"):
                if name in given:
                    raise InputError(f"fisher_mask={self.mask} looks at no gradients; leave {name} out")
        if self.fisher_mode == MASK and self.mask == "bias" and "fisher_keep_ratio" in given:
            raise InputError("fisher_mask=bias trains all biases, however many; leave fisher_keep_ratio out")

    def check_given(self, given: dict[str, Any]) -> None:
        super().check_given(given)
        self._check_together([name for name in _ONLY_IN if name in given])

    @property
    def gradients(self) -> Gradients:
        return Gradients.WEIGHTS if self.fisher_mode == MASK else Gradients.ADAPTERS

    @property
    def mask(self) -> str:
        """The mask of `fisher_mode=mask`."""
        return self.fisher_mask or DEFAULT_MASK

    @property
    def examples(self) -> int:
        """Training examples of the pre-pass."""
        return self.fisher_examples or DEFAULT_EXAMPLES[MASK if self.fisher_mode == MASK else SELECT]

    @property
    def keep_ratio(self) -> float:
        """Share of all parameters that a mask trains."""
        return DEFAULT_KEEP_RATIO if self.fisher_keep_ratio is None else self.fisher_keep_ratio


def _mapping(name: str, value: dict | str | None) -> dict | None:
    """A mapping, which the command line gives as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(f"{name}={value!r} is not valid JSON ({error}); pass a mapping") from error
    if value is not None and not isinstance(value, dict):
        raise InputError(f'{name}={value!r} is no mapping from names; pass one, such as {{"lora": ...}}')
    return value
