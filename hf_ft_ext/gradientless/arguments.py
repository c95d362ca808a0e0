"""Arguments of `--method gradientless`."""

from dataclasses import dataclass, field

from hf_ft_ext.arguments import Gradients
from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.argument_checks import check_together, check_values
from hf_ft_ext.gradientless.no_gradients import refuse_gradients
from hf_ft_ext.gradientless.optimizers.perturbation.estimates import ONE_SIDED, POPULATION
from hf_ft_ext.gradientless.optimizers.perturbation.update_rules import ADAM, RMS, SIGN
from hf_ft_ext.gradientless.scoring.objectives import F1
from hf_ft_ext.gradientless.search_arguments import (
    ACTIVITY,
    ADAM_BASELINE,
    ADAPTER,
    ALL,
    GLD,
    HEAD,
    NODE,
    SPSA_METHOD,
    SearchArguments,
)

# GLD: the radius of the thesis's plain setting. Node and activity perturbation: a usual rate of Adam. Adam: torch's.
_RATES = {GLD: 5e-3, NODE: 1e-4, ACTIVITY: 1e-4, ADAM_BASELINE: 1e-3}
# SPSA, step proportional to the slope: MeZO's rates for all weights and for LoRA; slopes of a head alone are about a
# thousand times smaller.
_SLOPE_RATES = {HEAD: 1e-2, ADAPTER: 1e-4, ALL: 1e-6}
# SPSA, step of a fixed length (normalised slopes, sign, Adam): the rate is about the change of one entry.
_LENGTH_RATES = {HEAD: 1e-3, ADAPTER: 1e-4, ALL: 1e-5}


@dataclass
class GradientlessTrainingArguments(SearchArguments):
    """`transformers.TrainingArguments` plus the settings of a search without gradients.

    `learning_rate` is the largest radius of GLD or the learning rate of SPSA; `lr_scheduler_type` is its schedule.
    `weight_decay` is the weight of the norm in GLD's objective or SPSA's decoupled weight decay.

    Raises:
        InputError: a value out of range, or an option that the chosen search does not use.
    """

    learning_rate: float | None = field(
        default=None,
        metadata={"help": f"Largest radius or learning rate; none = {_RATES[GLD]} (gld), {_RATES[NODE]} (node, "
                  f"activity), {_RATES[ADAM_BASELINE]} (adam); for spsa by search target: {_SLOPE_RATES[HEAD]} "
                  f"(head), {_SLOPE_RATES[ADAPTER]} (adapter), {_SLOPE_RATES[ALL]} (else). spsa with one-sided, "
                  f"population, sign, adam or rms: {_LENGTH_RATES[HEAD]}, {_LENGTH_RATES[ADAPTER]}, "
                  f"{_LENGTH_RATES[ALL]}."},
    )  # fmt: skip
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the radius or learning rate."})
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Not supported: a search has no gradient. Leave at 0."}
    )

    def validate(self) -> None:
        super().validate()
        self._set_defaults()
        self._set_rate(self._searched_kind())
        check_values(self)
        check_together(self)
        refuse_gradients(self)

    @property
    def gradients(self) -> Gradients:
        return Gradients.WEIGHTS if self.search_method == ADAM_BASELINE else Gradients.NONE

    def _set_defaults(self) -> None:
        """Set the defaults that depend on the method.

        A value that this set before counts as not passed: a trial of a hyperparameter search may change the method.
        """
        before = getattr(self, "_defaults_set", {})
        for name, value in self.method_defaults().items():
            if getattr(self, name) is None or getattr(self, name) == before.get(name):
                setattr(self, name, value)
                before = {**before, name: value}
        self._defaults_set = before

    def _searched_kind(self) -> str:
        if self.search_peft is not None:
            return ADAPTER
        return HEAD if self.search_target in (None, HEAD) and self.search_masks is None else ALL

    def set_rate_for_adapter(self) -> None:
        """Use the default rate for adapters: the trainer calls this when the model is a PEFT model."""
        self._set_rate(ADAPTER)

    def _set_rate(self, kind: str) -> None:
        """Set the default learning rate of the search method, unless the user passed one.

        Args:
            kind: what is searched: `HEAD`, `ADAPTER` or `ALL`.
        """
        if self.learning_rate is not None and self.learning_rate != getattr(self, "_rate_set", None):
            return
        if self.search_method == SPSA_METHOD:
            normalised = self.search_estimate in (ONE_SIDED, POPULATION) or self.search_update in (SIGN, ADAM, RMS)
            rate = (_LENGTH_RATES if normalised else _SLOPE_RATES)[kind]
        else:
            rate = _RATES.get(self.search_method, 0.0)
        self.learning_rate = self._rate_set = rate

    def take_positive_label(self, name: str | None) -> bool:
        """Set the positive class of `search_objective=f1` unless the user passed one; return whether f1 is used."""
        if self.search_objective != F1:
            return False
        if self.search_positive_label is None:
            self.search_positive_label = name
        return True

    def check_given(self, given: dict) -> None:
        if "optim" in given:
            raise InputError(
                f"optim={given['optim']!r} needs gradients; leave it out: search_method selects the optimizer"
            )
        super().check_given(given)
