"""Arguments of `--method gradientless`."""

import re
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch

from hf_ft_ext.arguments import Gradients, MethodTrainingArguments
from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.no_gradients import refuse_gradients
from hf_ft_ext.gradientless.optimizers.direct_search import DEFAULT_BUDGET
from hf_ft_ext.gradientless.optimizers.directions import GAUSSIAN, KINDS, Directions
from hf_ft_ext.gradientless.optimizers.estimates import ESTIMATES, FORWARD, ONE_SIDED, POPULATION, TWO_SIDED, Estimate
from hf_ft_ext.gradientless.optimizers.exchange import DATA, MODES
from hf_ft_ext.gradientless.optimizers.nodes import NodePerturbation
from hf_ft_ext.gradientless.optimizers.options import parse_options
from hf_ft_ext.gradientless.optimizers.selection import ALL as ALL_ENTRIES
from hf_ft_ext.gradientless.optimizers.selection import FISHER, RANDOM, SELECTIONS
from hf_ft_ext.gradientless.optimizers.spsa import check_replay
from hf_ft_ext.gradientless.optimizers.updates import ADAM, MOMENTS, MOMENTUM, RMS, RULES, SGD, SIGN, Update
from hf_ft_ext.gradientless.scoring.objectives import F1, LOSS, OBJECTIVES

METHODS = GLD, SPSA_METHOD, NODE, ADAM_BASELINE = ("gld", "spsa", "node", "adam")
FISHER_FORMS = DIVERGENCE, GRADIENT = ("divergence", "gradient")
HEAD, ALL, TRAINABLE, ADAPTER = "head", "all", "trainable", "adapter"
# GLD: the thesis's plain radius. Node perturbation: Adam's on such heads. Adam: torch's.
_RATES = {GLD: 5e-3, NODE: 1e-4, ADAM_BASELINE: 1e-3}
# SPSA: MeZO's for all weights and for LoRA; a head's slopes are a thousand times smaller.
_SLOPE_RATES = {HEAD: 1e-2, ADAPTER: 1e-4, ALL: 1e-6}
# Where the step's length does not depend on the slopes: the rate is about the change of an entry.
_LENGTH_RATES = {HEAD: 1e-3, ADAPTER: 1e-4, ALL: 1e-5}
# Which search looks at an argument; set for another one, it is an error.
_ONLY = {
    **dict.fromkeys(
        ("search_candidates", "search_options", "search_selection", "search_sampling_size", "search_sampling_steps",
         "search_antithetic", "search_pool"),
        GLD,
    ),
    **dict.fromkeys(
        ("search_direction", "search_rank", "search_renew", "search_small", "search_estimate", "search_moments",
         "search_carry", "search_candidates_per_forward", "search_trajectory"),
        SPSA_METHOD,
    ),
}  # fmt: skip
_SHARED_BY_SPSA_AND_NODE = ("search_eps", "search_directions", "search_update", "search_momentum")


@dataclass
class GradientlessTrainingArguments(MethodTrainingArguments):
    """`transformers.TrainingArguments` plus the settings of a search without gradients.

    `learning_rate` is the largest radius of GLD and the rate of SPSA, `lr_scheduler_type` its schedule, `weight_decay`
    the weight of the norm in GLD's objective and SPSA's decoupled decay.

    Raises:
        InputError: a value out of range, or one that the chosen search does not look at.
    """

    search_method: str = field(
        default=GLD,
        metadata={
            "help": "gld: direct search. spsa: simultaneous perturbation (MeZO and its successors, see "
            "search_direction, search_estimate, search_update). node: node perturbation of a head on cached features. "
            "adam: Adam by gradients of the head, on the same features, to compare with.",
            "choices": METHODS,
        },
    )
    search_target: str | None = field(
        default=None,
        metadata={
            "help": "What is searched: head, all, trainable (what requires a gradient), or a regular expression "
            "searched in parameter names; none = the head, or the trainable parameters of a PEFT model."
        },
    )
    search_candidates: int = field(default=5, metadata={"help": "GLD: candidates per start (K), radius halved each."})
    search_options: str = field(
        default="1x1",
        metadata={
            "help": "GLD: none = the best candidate moves the tensor at once; 3x2 = 3 options per level, 2 levels, "
            "kept until a later batch confirms one. Cost: options ** levels * (candidates + 1) evaluations a tensor."
        },
    )
    search_selection: str = field(
        default=RANDOM,
        metadata={
            "help": "GLD: which entries of a large tensor candidates change: all, random, magnitude (the largest) or "
            "fisher (see search_fisher).",
            "choices": SELECTIONS,
        },
    )
    search_sampling_size: int | None = field(
        default=None,
        metadata={"help": "GLD: entries per tensor that candidates change; none = twice the hidden size."},
    )
    search_sampling_steps: int = field(
        default=1, metadata={"help": "GLD: steps after which these entries are chosen anew."}
    )
    search_fisher: str | None = field(
        default=None,
        metadata={
            "help": "Importance for search_selection=fisher: divergence (of the logits when an entry is perturbed, as "
            "published) or gradient (mean square of each row's gradient, by backward passes through the head); none = "
            "divergence.",
            "choices": FISHER_FORMS,
        },
    )
    search_antithetic: bool = field(
        default=False, metadata={"help": "GLD: candidates in pairs of opposite direction, with half as many radii."}
    )
    search_pool: bool = field(
        default=False, metadata={"help": "GLD: one pool of entries over all searched tensors, not tensor by tensor."}
    )
    search_block: int = field(
        default=1,
        metadata={
            "help": "GLD (with search_selection all) and SPSA: consecutive entries of a tensor that move alike. With "
            "the size of an attention head and the vectors of ia3, one number per head is searched."
        },
    )
    search_eps: float | None = field(
        default=None,
        metadata={"help": "SPSA, node: size of the perturbation, above 0; none = 0.001 (spsa), 0.01 (node)."},
    )
    search_directions: int | None = field(
        default=None,
        metadata={
            "help": "SPSA, node: directions a step, their mean is taken; none = 1 (two-sided, forward), 8 (one-sided, "
            "population), 4 (node)."
        },
    )
    search_direction: str = field(
        default=GAUSSIAN,
        metadata={
            "help": "SPSA: gaussian; rademacher (+1 and -1); lozo, subzero (low-rank matrices, added to outputs: "
            "no weight is copied); rademacher-outer (rank one, of +1 and -1).",
            "choices": KINDS,
        },
    )
    search_rank: int | None = field(
        default=None, metadata={"help": "SPSA: rank of lozo (none = 2) and subzero (none = 32)."}
    )
    search_renew: int | None = field(
        default=None,
        metadata={
            "help": "SPSA: steps after which lozo's V (none = 50) or subzero's U and V (none = 1000) are drawn."
        },
    )
    search_small: float | None = field(
        default=None,
        metadata={
            "help": "SPSA: move only the entries of each tensor that are among this share of smallest magnitude "
            "(Sparse-MeZO: 0.25); none = all."
        },
    )
    search_estimate: str = field(
        default=TWO_SIDED,
        metadata={
            "help": "SPSA: two-sided (MeZO); one-sided, divided by the losses' deviation (FZOO); population: z-scores "
            "(evolution strategies); forward: derivatives by forward-mode differentiation, a control.",
            "choices": ESTIMATES,
        },
    )
    search_update: str | None = field(
        default=None,
        metadata={
            "help": "SPSA, node: sgd, sign, momentum, adam (adam_beta1, adam_beta2, adam_epsilon); SPSA: rms (divided "
            "by the root of the slopes' mean square), conservative (the best of minus, stay, plus); none = sgd "
            "(spsa), adam (node).",
            "choices": RULES,
        },
    )
    search_momentum: float = field(
        default=0.9, metadata={"help": "SPSA, node: factor of search_update=momentum, in [0, 1)."}
    )
    search_moments: str | None = field(
        default=None,
        metadata={
            "help": "SPSA: momentum is made anew from seeds and slopes (replay: slow, no memory) or kept as large as "
            "the weights (buffer); none = replay; adam always has buffers.",
            "choices": MOMENTS,
        },
    )
    search_carry: bool = field(
        default=False,
        metadata={
            "help": "SPSA: with 16-bit weights, keep what rounding leaves out for the next step: 2 bytes a weight "
            "more, and no noise of rounding."
        },
    )
    search_candidates_per_forward: int = field(
        default=1,
        metadata={"help": "SPSA: perturbed models that run as one forward pass over the repeated batch."},
    )
    search_trajectory: bool = field(
        default=False,
        metadata={
            "help": "SPSA: leave trajectory.safetensors (seed and slopes, 5 bytes a step) beside the saved model; "
            "apply_trajectory repeats the run from it."
        },
    )
    search_objective: str = field(
        default=LOSS,
        metadata={
            "help": "What is minimised: loss, or one minus accuracy, f1 or matthews, which need no derivative.",
            "choices": OBJECTIVES,
        },
    )
    search_positive_label: str | None = field(
        default=None,
        metadata={
            "help": "search_objective=f1: name of the class that it is about; none = that of the task or "
            "`positive_label`, or what the names of the two classes show."
        },
    )
    search_dropout: bool = field(
        default=False,
        metadata={
            "help": "Leave dropout on, with one mask for all candidates of a step. Every candidate then runs the "
            "whole model."
        },
    )
    search_peft: str | None = field(
        default=None,
        metadata={"help": "Search the parameters of a peft method (lora, ia3, vera, ln_tuning, ...) and the head."},
    )
    search_peft_config: dict | str | None = field(
        default_factory=dict,
        metadata={"help": 'Settings of search_peft, as JSON: {"r": 1, "target_modules": ["query"]}.'},
    )
    max_evaluations_per_step: int = field(
        default=DEFAULT_BUDGET, metadata={"help": "Refuse a search that needs more evaluations than this in a step."}
    )
    candidate_parallel: str = field(
        default=DATA,
        metadata={
            "help": "Several processes. data: each scores all candidates on its part of the batch. candidates: each "
            "scores its share of the candidates on the whole batch. Only numbers cross.",
            "choices": MODES,
        },
    )
    feature_cache_gb: float = field(
        default=4.0,
        metadata={
            "help": "With a frozen encoder, what the head reads is computed once if it takes no more than this many "
            "GB on disk, else in every step; 0 = in every step."
        },
    )
    feature_cache_dir: str | None = field(
        default=None, metadata={"help": "Where features are kept; none = beside the Hub's cache."}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": f"Largest radius or learning rate; none = {_RATES[GLD]} (gld), {_RATES[NODE]} (node), "
                  f"{_RATES[ADAM_BASELINE]} (adam), and for spsa, by what is searched, {_SLOPE_RATES[HEAD]} (head), "
                  f"{_SLOPE_RATES[ADAPTER]} (adapter), {_SLOPE_RATES[ALL]} (else); where the step's length does not "
                  f"depend on slopes {_LENGTH_RATES[HEAD]}, {_LENGTH_RATES[ADAPTER]}, {_LENGTH_RATES[ALL]}."},
    )  # fmt: skip
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the radius or learning rate."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "There is no gradient to clip: leave it at 0."})

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*MethodTrainingArguments._VALID_DICT_FIELDS, "search_peft_config"]

    json_fields: ClassVar[tuple[str, ...]] = ("search_peft_config",)

    def validate(self) -> None:
        self._set_defaults()
        self._set_rate(self._searched_kind())
        self._check_values()
        self._check_together()
        refuse_gradients(self)

    @property
    def gradients(self) -> Gradients:
        return Gradients.WEIGHTS if self.search_method == ADAM_BASELINE else Gradients.NONE

    def _set_defaults(self) -> None:
        """What depends on the method, where nothing was passed; another method, as a trial may set it, has another."""
        before = getattr(self, "_defaults_set", {})
        for name, value in self._method_defaults().items():
            if getattr(self, name) is None or getattr(self, name) == before.get(name):
                setattr(self, name, value)
                before = {**before, name: value}
        self._defaults_set = before

    def _method_defaults(self) -> dict[str, float | int | str]:
        node, several = self.search_method == NODE, self.search_estimate in (ONE_SIDED, POPULATION)
        return {
            "search_eps": 1e-2 if node else 1e-3,
            "search_directions": 4 if node else 8 if several else 1,
            "search_update": ADAM if node else SGD,
        }

    def _searched_kind(self) -> str:
        if self.search_peft is not None:
            return ADAPTER
        return HEAD if self.search_target in (None, HEAD) else ALL

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

    def _check_values(self) -> None:
        for name, known in (
            ("search_method", METHODS),
            ("search_selection", SELECTIONS),
            ("search_fisher", (None, *FISHER_FORMS)),
            ("search_update", RULES),
            ("search_direction", KINDS),
            ("search_estimate", ESTIMATES),
            ("search_moments", (None, *MOMENTS)),
            ("search_objective", OBJECTIVES),
            ("candidate_parallel", MODES),
        ):
            if getattr(self, name) not in known:
                choices = ", ".join(filter(None, known))
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; choose from: {choices}")
        for name in (
            "search_candidates",
            "search_sampling_steps",
            "search_block",
            "search_directions",
            "search_candidates_per_forward",
            "max_evaluations_per_step",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} leaves nothing to compare; pass 1 or more")
        if self.search_sampling_size is not None and self.search_sampling_size < 1:
            raise InputError(
                f"search_sampling_size={self.search_sampling_size} leaves nothing to search; pass 1 or more"
            )
        for name in ("learning_rate", "weight_decay", "feature_cache_gb"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}={getattr(self, name)} is below 0; pass 0 or more")
        parse_options(self.search_options)
        if self.search_target not in (None, HEAD, ALL, TRAINABLE):
            try:
                re.compile(self.search_target)
            except re.error as error:
                raise InputError(f"search_target={self.search_target!r} is no regular expression: {error}") from None

    def _check_together(self) -> None:
        defaults = {f.name: f.default for f in fields(GradientlessTrainingArguments)}
        for name, method in _ONLY.items():
            if self.search_method != method and getattr(self, name) != defaults[name]:
                raise InputError(
                    f"{name}={getattr(self, name)} is about search_method={method}, not {self.search_method}; leave "
                    "one of them out"
                )
        if self.search_method in (GLD, ADAM_BASELINE):
            own_defaults = {**defaults, **self._method_defaults()}
            for name in _SHARED_BY_SPSA_AND_NODE:
                given = getattr(self, name)
                if given != own_defaults[name]:
                    raise InputError(
                        f"{name}={given} is about search_method=spsa or node, not {self.search_method}; leave one of "
                        "them out"
                    )
        if self.search_method in (SPSA_METHOD, NODE):
            self._check_matrix()
        if self.search_momentum != defaults["search_momentum"] and self.search_update != MOMENTUM:
            raise InputError(f"search_momentum={self.search_momentum} needs search_update=momentum; leave it out")
        adam = self.search_update in (ADAM, RMS) or self.search_method == ADAM_BASELINE
        own = {f.name: f.default for f in fields(MethodTrainingArguments)}
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if getattr(self, name) != own[name] and not adam:
                raise InputError(f"{name}={getattr(self, name)} needs search_update=adam or rms; leave it out")
        if self.search_fisher is not None and self.search_selection != FISHER:
            raise InputError(f"search_fisher={self.search_fisher} needs search_selection=fisher; leave it out")
        if self.search_selection == ALL_ENTRIES and self.search_sampling_size is not None:
            raise InputError(
                f"search_selection=all takes every entry; leave search_sampling_size={self.search_sampling_size} out"
            )
        if self.search_block > 1 and self.search_method in (ADAM_BASELINE, NODE):
            why = "adam draws none" if self.search_method == ADAM_BASELINE else "node draws it for outputs"
            raise InputError(f"search_block={self.search_block} is about noise, and {why}; leave it out")
        if self.search_block > 1 and self.search_method == GLD and self.search_selection != ALL_ENTRIES:
            raise InputError(
                f"search_block={self.search_block} ties neighbours, and search_selection={self.search_selection} "
                "tears them apart; pass --search_selection all"
            )
        if self.search_peft_config and self.search_peft is None:
            raise InputError("search_peft_config needs search_peft; name a peft method, such as lora")
        if self.search_positive_label is not None and self.search_objective != F1:
            raise InputError(
                f"search_positive_label={self.search_positive_label!r} is about search_objective=f1, not "
                f"{self.search_objective}; leave one of them out"
            )
        if self.search_method == NODE and (self.search_objective != LOSS or self.search_dropout):
            raise InputError("search_method=node needs the loss of each row with dropout off; leave the objective out")
        if self.search_method == ADAM_BASELINE and (self.search_objective != LOSS or self.search_dropout):
            raise InputError(
                "search_method=adam needs the loss's derivative with dropout off; leave the objective out"
            )

    def _check_matrix(self) -> None:
        """Direction, estimate and update together, as the optimizer itself checks them."""
        betas = (self.adam_beta1, self.adam_beta2)
        try:
            if self.search_method == NODE:
                NodePerturbation([torch.zeros(1)], update=self.search_update, momentum=self.search_momentum,
                                 betas=betas, eps=self.search_eps, num_directions=self.search_directions)  # fmt: skip
                return
            directions = Directions(
                self.search_direction, self.search_block, self.search_rank, self.search_renew, None, self.search_small
            )
            Estimate(self.search_estimate, self.search_eps, self.search_directions)
            rule = Update(self.search_update, self.search_momentum, betas, self.adam_epsilon, self.search_moments)
            check_replay(directions, rule)
        except InputError as error:
            raise InputError(f"search_{str(error).replace('num_directions', 'directions')}") from None
        if self.search_estimate == FORWARD and self.search_objective != LOSS:
            raise InputError(
                f"search_estimate=forward differentiates, and search_objective={self.search_objective} has no "
                "derivative; use two-sided"
            )
        if self.search_candidates_per_forward > 1 and self.search_dropout:
            raise InputError(
                "search_dropout draws one mask for all candidates, which cannot be rows of one forward pass; leave "
                "search_candidates_per_forward out"
            )

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
