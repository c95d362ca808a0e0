"""Arguments of `--method gradientless`."""

from dataclasses import dataclass, field

from hf_ft_ext.arguments import Gradients
from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.argument_checks import check_together, check_values
from hf_ft_ext.gradientless.no_gradients import refuse_gradients
from hf_ft_ext.gradientless.optimizers.perturbation.estimates import ONE_SIDED, POPULATION
from hf_ft_ext.gradientless.optimizers.perturbation.updates import ADAM, RMS, SIGN
from hf_ft_ext.gradientless.scoring.objectives import F1
from hf_ft_ext.gradientless.search_arguments import (
    ADAM_BASELINE,
    ADAPTER,
    ALL,
    GLD,
    HEAD,
    NODE,
    SPSA_METHOD,
    SearchArguments,
)

# GLD: the thesis's plain radius. Node perturbation: Adam's on such heads. Adam: torch's.
_RATES = {GLD: 5e-3, NODE: 1e-4, ADAM_BASELINE: 1e-3}
# SPSA: MeZO's for all weights and for LoRA; a head's slopes are a thousand times smaller.
_SLOPE_RATES = {HEAD: 1e-2, ADAPTER: 1e-4, ALL: 1e-6}
# Where the step's length does not depend on the slopes: the rate is about the change of an entry.
_LENGTH_RATES = {HEAD: 1e-3, ADAPTER: 1e-4, ALL: 1e-5}


@dataclass
class GradientlessTrainingArguments(SearchArguments):
    """`transformers.TrainingArguments` plus the settings of a search without gradients.

    `learning_rate` is the largest radius of GLD and the rate of SPSA, `lr_scheduler_type` its schedule, `weight_decay`
    the weight of the norm in GLD's objective and SPSA's decoupled decay.

    Raises:
        InputError: a value out of range, or one that the chosen search does not look at.
    """

    learning_rate: float | None = field(
        default=None,
        metadata={"help": f"Largest radius or learning rate; none = {_RATES[GLD]} (gld), {_RATES[NODE]} (node), "
                  f"{_RATES[ADAM_BASELINE]} (adam), and for spsa, by what is searched, {_SLOPE_RATES[HEAD]} (head), "
                  f"{_SLOPE_RATES[ADAPTER]} (adapter), {_SLOPE_RATES[ALL]} (else); where the step's length does not "
                  f"depend on slopes {_LENGTH_RATES[HEAD]}, {_LENGTH_RATES[ADAPTER]}, {_LENGTH_RATES[ALL]}."},
    )  # fmt: skip
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the radius or learning rate."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "There is no gradient to clip: leave it at 0."})

    def validate(self) -> None:
        self._set_defaults()
        self._set_rate(self._searched_kind())
        check_values(self)
        check_together(self)
        refuse_gradients(self)

    @property
    def gradients(self) -> Gradients:
        return Gradients.WEIGHTS if self.search_method == ADAM_BASELINE else Gradients.NONE

    def _set_defaults(self) -> None:
        """What depends on the method, where nothing was passed; another method, as a trial may set it, has another."""
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
        """The default rate where a model with adapters was passed, which the arguments do not know."""
        self._set_rate(ADAPTER)

    def _set_rate(self, kind: str) -> None:
        """The search's own rate where none was passed; another search, as a trial may set it, has another."""
        if self.learning_rate is not None and self.learning_rate != getattr(self, "_rate_set", None):
            return
        if self.search_method == SPSA_METHOD:
            by_length = self.search_estimate in (ONE_SIDED, POPULATION) or self.search_update in (SIGN, ADAM, RMS)
            rate = (_LENGTH_RATES if by_length else _SLOPE_RATES)[kind]
        else:
            rate = _RATES.get(self.search_method, 0.0)
        self.learning_rate = self._rate_set = rate

    def take_positive_label(self, name: str | None) -> bool:
        """The class that `search_objective=f1` is about, unless the user named another one."""
        if self.search_objective != F1:
            return False
        if self.search_positive_label is None:
            self.search_positive_label = name
        return True

    def check_given(self, given: dict) -> None:
        if "optim" in given:
            raise InputError(
                f"optim={given['optim']!r} needs gradients; leave it out: search_method says how weights move"
            )
        super().check_given(given)
