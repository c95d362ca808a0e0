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

# Argument -> the modes that it applies to; arguments that are not listed apply to all modes.
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
_FIXED_BY_PLAN = (
    "fisher_candidates", "fisher_candidate_settings", "fisher_criterion", "fisher_budget", "fisher_examples",
    "fisher_batch_size", "fisher_labels", "fisher_power",
)  # fmt: skip

# The arguments that an adapter plan depends on.
PLAN_SETTINGS = ("fisher_mode", "adapter_plan", *_FIXED_BY_PLAN, "seed")

# The arguments whose result a checkpoint holds: its adapter plan, or the entries of its mask.
SETTLED = ("fisher_mode", "adapter_plan", *_FIXED_BY_PLAN, "fisher_mask", "fisher_keep_ratio")


@dataclass
class FisherTrainingArguments(MethodTrainingArguments):
    """`transformers.TrainingArguments` plus the settings of FishPAL and FISH masks.

    Raises:
        InputError: a value out of range, or two values that contradict each other.
    """

    fisher_mode: str = field(
        default=SELECT,
        metadata={
            "help": "select: a pre-pass selects an adapter for each layer (FishPAL). single: one candidate in all "
            "layers. random: a random candidate in each layer. mask: selected entries of the model's weights (FISH).",
            "choices": MODES,
        },
    )
    adapter_plan: str | None = field(
        default=None,
        metadata={"help": "Adapter plan to use instead of a pre-pass: the adapter_plan.json of a run, edited or not."},
    )
    fisher_candidates: list[str] | None = field(
        default=None,
        metadata={
            "help": "Adapters to choose from: prefix, bottleneck, lora, any method of peft that can be limited to "
            "layers, or names of fisher_candidate_settings; none = the first three and those of "
            "fisher_candidate_settings."
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
            "help": "Score of a module. thesis: mean squared gradient, times a factor per kind of adapter. mean: the "
            "same without factors. decrease: expected decrease of the loss by a step of unit length. agreement: how "
            f"well the gradients of different examples align. none = {DEFAULT_CRITERION}, which is this package's, "
            "not the thesis's.",
            "choices": tuple(CRITERIA),
        },
    )
    fisher_budget: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of parameters that all adapters together add at inference; some layers may then "
            "have no adapter."
        },
    )
    fisher_examples: int | None = field(
        default=None,
        metadata={
            "help": f"Training examples in the pre-pass; none = {DEFAULT_EXAMPLES[SELECT]} to select adapters, "
            f"{DEFAULT_EXAMPLES[MASK]} for a mask."
        },
    )
    fisher_batch_size: int = field(
        default=8,
        metadata={"help": "Batch size of the pre-pass. It affects memory and time, but not the scores."},
    )
    fisher_labels: str = field(
        default=TRUE,
        metadata={
            "help": "true: gradients of the loss with the true label. expected: expectation over the model's own "
            "distribution of labels; only with fisher_criterion mean or thesis.",
            "choices": LABELS,
        },
    )
    fisher_power: int = field(
        default=2, metadata={"help": "2: squared gradients. 1: absolute gradients.", "choices": (1, 2)}
    )
    fisher_learning_rates: dict | str | None = field(
        default=None,
        metadata={
            "help": f"Learning rates by candidate, and `{HEAD}` for the classifier (JSON on the command line), such "
            'as {"prefix": 2e-4}; all others have learning_rate.'
        },
    )
    fisher_mask: str | None = field(
        default=None,
        metadata={
            "help": "Entries that train with a mask: those with the largest Fisher information (label-: true labels, "
            "expect-: the model's own distribution; of squared or absolute gradients), random entries, or all biases. "
            f"none = {DEFAULT_MASK}.",
            "choices": MASKS,
        },
    )
    fisher_keep_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of all parameters that train with a mask, including the classifier, in (0, 1); none = "
            f"{DEFAULT_KEEP_RATIO}."
        },
    )
    # FishPAL's rate on GLUE; transformers' 5e-5 is meant for training all weights.
    learning_rate: float = field(default=5e-4, metadata={"help": "Initial learning rate of the optimizer."})

    def validate(self) -> None:
        for name in ("fisher_candidate_settings", "fisher_learning_rates"):
            setattr(self, name, _mapping(name, getattr(self, name)))
        if isinstance(self.fisher_candidates, str):
            self.fisher_candidates = [self.fisher_candidates]
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
                raise InputError(f"{name} must be 1 or more, got {value}; or leave it out")
        if self.fisher_keep_ratio is not None and not 0 < self.fisher_keep_ratio < 1:
            raise InputError(
                f"fisher_keep_ratio must be in (0, 1), got {self.fisher_keep_ratio}; pass a value such as 0.005"
            )
        rates = self.fisher_learning_rates
        for name, rate in rates.items() if isinstance(rates, dict) else ():
            if isinstance(rate, bool) or not isinstance(rate, int | float) or rate < 0:
                raise InputError(f"fisher_learning_rates: the rate of {name!r} must be 0 or more, got {rate!r}")
        self._check_together(self._changed())

    def _changed(self) -> list[str]:
        defaults = {f.name: f.default for f in fields(FisherTrainingArguments)}
        return [name for name in _ONLY_IN if getattr(self, name) != defaults[name]]

    def _check_together(self, given: list[str]) -> None:
        """Refuse arguments that do not apply with the others."""
        for name in given:
            if self.fisher_mode not in _ONLY_IN[name]:
                raise InputError(
                    f"{name}={getattr(self, name)} applies only to fisher_mode={' or '.join(_ONLY_IN[name])}, not "
                    f"{self.fisher_mode}; leave one of them out"
                )
            if self.adapter_plan is not None and name in _FIXED_BY_PLAN:
                raise InputError(
                    f"adapter_plan already determines what {name}={getattr(self, name)} sets; leave one of them out"
                )
        if self.fisher_mode == SINGLE and len(self.fisher_candidates or ()) != 1:
            raise InputError(
                f"fisher_mode=single trains one candidate in all layers, but fisher_candidates is "
                f"{self.fisher_candidates}; name one, such as lora"
            )
        criterion = self.fisher_criterion or DEFAULT_CRITERION
        if self.fisher_power != 2 and criterion in NEEDS_TOTALS:
            raise InputError(
                f"fisher_power={self.fisher_power} does not work with fisher_criterion={criterion}, which needs "
                "squared gradients; pass fisher_criterion=mean or thesis, or leave fisher_power out"
            )
        selects = self.fisher_mode == SELECT and self.adapter_plan is None
        if selects and self.fisher_labels != TRUE and criterion in NEEDS_TOTALS:
            raise InputError(
                f"fisher_labels={self.fisher_labels} does not work with fisher_criterion={criterion}, which uses mean "
                "gradients: in expectation over the model's own labels they are zero, so scores would be rounding "
                "noise; pass fisher_criterion=mean or thesis, or leave fisher_labels out"
            )
        if self.fisher_mode == MASK and self.mask not in SCORED:
            for name in ("fisher_examples", "fisher_batch_size"):
                if name in given:
                    raise InputError(f"fisher_mask={self.mask} does not use gradients; leave {name} out")
        if self.fisher_mode == MASK and self.mask == "bias" and "fisher_keep_ratio" in given:
            raise InputError("fisher_mask=bias trains all biases; leave fisher_keep_ratio out")

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
        """Number of training examples in the pre-pass."""
        return self.fisher_examples or DEFAULT_EXAMPLES[MASK if self.fisher_mode == MASK else SELECT]

    @property
    def keep_ratio(self) -> float:
        """Share of all parameters that a mask trains."""
        return DEFAULT_KEEP_RATIO if self.fisher_keep_ratio is None else self.fisher_keep_ratio


def _mapping(name: str, value: dict | str | None) -> dict | None:
    """Return `value` as a mapping, parsed from JSON if it is a string (from the command line)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(f"{name}={value!r} is not valid JSON ({error}); pass a mapping") from error
    if value is not None and not isinstance(value, dict):
        raise InputError(f'{name} must be a mapping from names, such as {{"lora": ...}}, got {value!r}')
    return value
