"""Fields of `GradientlessTrainingArguments` and the names of their choices."""

from dataclasses import dataclass, field
from typing import ClassVar

from hf_ft_ext.arguments import FeatureCacheArguments
from hf_ft_ext.gradientless.optimizers.direct_search import DEFAULT_BUDGET
from hf_ft_ext.gradientless.optimizers.exchange import DATA, MODES
from hf_ft_ext.gradientless.optimizers.nodes import NODE_DIRECTIONS
from hf_ft_ext.gradientless.optimizers.perturbation.directions import GAUSSIAN, KINDS
from hf_ft_ext.gradientless.optimizers.perturbation.estimates import ESTIMATES, ONE_SIDED, POPULATION, TWO_SIDED
from hf_ft_ext.gradientless.optimizers.perturbation.update_rules import ADAM, MOMENTS, RULES, SGD
from hf_ft_ext.gradientless.optimizers.selection import RANDOM, SELECTIONS
from hf_ft_ext.gradientless.scoring.objectives import LOSS, OBJECTIVES

METHODS = GLD, SPSA_METHOD, NODE, ACTIVITY, ADAM_BASELINE = ("gld", "spsa", "node", "activity", "adam")
FISHER_FORMS = DIVERGENCE, GRADIENT = ("divergence", "gradient")
HEAD, ALL, TRAINABLE, ADAPTER = "head", "all", "trainable", "adapter"


@dataclass
class SearchArguments(FeatureCacheArguments):
    """Fields of `GradientlessTrainingArguments`, without defaults by method and without checks."""

    search_method: str = field(
        default=GLD,
        metadata={
            "help": "gld: direct search. spsa: simultaneous perturbation (MeZO and its successors, see "
            "search_direction, search_estimate, search_update). node: node perturbation of a head on cached features. "
            "activity: noise on the outputs of all searched layers, with a slope for each row. adam: baseline: the "
            "head trained by gradients with Adam, on the same features.",
            "choices": METHODS,
        },
    )
    search_target: str | None = field(
        default=None,
        metadata={
            "help": "Parameters to search: head, all, trainable (those that require gradients), or a regular "
            "expression that matches parameter names; none = the head, or the trainable parameters of a PEFT model. "
            "head and all leave out frozen parameters, unless all of them are frozen."
        },
    )
    search_candidates: int = field(
        default=5,
        metadata={"help": "GLD: candidates per starting point (K); each has half the radius of the one before."},
    )
    search_options: str = field(
        default="1x1",
        metadata={
            "help": "GLD: none = accept the best candidate at once; 3x2 = a tree of 2 levels with 3 options per "
            "level, kept until a later batch confirms one. Cost: options ** levels * (candidates + 1) evaluations "
            "per tensor, with several levels one more where it moves."
        },
    )
    search_selection: str = field(
        default=RANDOM,
        metadata={
            "help": "GLD: entries of a large tensor that candidates change: all, random, magnitude (the largest), or "
            "fisher (the most important, see search_fisher).",
            "choices": SELECTIONS,
        },
    )
    search_sampling_size: int | None = field(
        default=None,
        metadata={"help": "GLD: number of entries per tensor that candidates change; none = twice the hidden size."},
    )
    search_sampling_steps: int = field(
        default=1, metadata={"help": "GLD: select these entries again every so many steps."}
    )
    search_fisher: str | None = field(
        default=None,
        metadata={
            "help": "Importance for search_selection=fisher: divergence (between the logits before and after an entry "
            "is perturbed, as in the thesis) or gradient (mean squared gradient over the rows, by backward passes "
            "through the head); none = divergence.",
            "choices": FISHER_FORMS,
        },
    )
    search_antithetic: bool = field(
        default=False, metadata={"help": "GLD: draw candidates in antithetic pairs (+z, -z), with half as many radii."}
    )
    search_pool: bool = field(
        default=False,
        metadata={"help": "GLD: search all tensors together, as one flat vector, instead of one tensor at a time."},
    )
    search_block: int = field(
        default=1,
        metadata={
            "help": "GLD (with search_selection=all) and SPSA: number of consecutive entries of a tensor that change "
            "by the same amount. Example: with ia3 and the size of an attention head, one parameter per head is "
            "searched."
        },
    )
    search_eps: float | None = field(
        default=None,
        metadata={
            "help": "SPSA, node, activity: size of the perturbation, above 0; none = 0.001, for node 0.01, for "
            "activity on 16-bit outputs 1/32."
        },
    )
    search_directions: int | None = field(
        default=None,
        metadata={
            "help": "SPSA, node, activity: directions per step, averaged; none = 1 (activity; spsa: two-sided, "
            "forward), 8 (one-sided, population), 4 (node). node: a layer uses at most as many as it has outputs, and "
            "with next-layer at most as many as the next layer has: 2 with two classes."
        },
    )
    search_direction: str = field(
        default=GAUSSIAN,
        metadata={
            "help": "SPSA: gaussian; rademacher (entries +1 and -1); lozo, subzero (low-rank matrices; their effect "
            "is added to layer outputs, so no weight is copied); rademacher-outer (rank one, entries +1 and -1).",
            "choices": KINDS,
        },
    )
    search_node_directions: str | None = field(
        default=None,
        metadata={
            "help": "Node: next-layer (directions in the row space of the next linear layer) or signs (random +1 and "
            "-1); none = next-layer.",
            "choices": NODE_DIRECTIONS,
        },
    )
    search_rank: int | None = field(
        default=None, metadata={"help": "SPSA: rank of lozo (none = 2) and subzero (none = 32)."}
    )
    search_renew: int | None = field(
        default=None,
        metadata={
            "help": "SPSA: draw lozo's V (none = 50) or subzero's U and V (none = 1000) again every so many steps."
        },
    )
    search_small: float | None = field(
        default=None,
        metadata={
            "help": "SPSA: change only the entries of smallest magnitude, this fraction of each tensor "
            "(Sparse-MeZO: 0.25); none = all entries."
        },
    )
    search_masks: str | None = field(
        default=None,
        metadata={
            "help": "SPSA: folder of a finished run of --method fisher --fisher_mode mask. The search changes the "
            "entries that this run selected and the tensors that it trained in full (the classifier), nothing else."
        },
    )
    search_estimate: str = field(
        default=TWO_SIDED,
        metadata={
            "help": "SPSA: two-sided (MeZO); one-sided: divided by the standard deviation of the losses (FZOO); "
            "population: z-scores (evolution strategies); forward: exact directional derivatives by forward-mode "
            "differentiation, as a control.",
            "choices": ESTIMATES,
        },
    )
    search_update: str | None = field(
        default=None,
        metadata={
            "help": "SPSA, node, activity: sgd, sign, momentum, adam (adam_beta1, adam_beta2, adam_epsilon). SPSA "
            "only: rms (step divided by the root mean square of the slopes), conservative (best of step, no step, "
            "opposite step). none = sgd (spsa), adam (node, activity).",
            "choices": RULES,
        },
    )
    search_momentum: float = field(
        default=0.9, metadata={"help": "SPSA, node, activity: factor of search_update=momentum, in [0, 1)."}
    )
    search_moments: str | None = field(
        default=None,
        metadata={
            "help": "SPSA: replay = recompute momentum from stored seeds and slopes (slow, no memory); buffer = keep "
            "it in a buffer of the weights' size; none = replay. adam always uses buffers.",
            "choices": MOMENTS,
        },
    )
    search_carry: bool = field(
        default=False,
        metadata={
            "help": "SPSA with 16-bit weights: keep the rounding error for the next step instead of rounding "
            "stochastically. Costs 2 more bytes per weight."
        },
    )
    search_candidates_per_forward: int = field(
        default=1,
        metadata={"help": "SPSA: number of perturbed models that run as one forward pass over the repeated batch."},
    )
    search_trajectory: bool = field(
        default=False,
        metadata={
            "help": "SPSA: save trajectory.safetensors (seed and slopes, 5 bytes per step) with the model; "
            "apply_trajectory repeats the run from it."
        },
    )
    search_objective: str = field(
        default=LOSS,
        metadata={
            "help": "Objective to minimise: loss, or 1 - accuracy, 1 - f1, 1 - matthews (no derivative is needed).",
            "choices": OBJECTIVES,
        },
    )
    search_positive_label: str | None = field(
        default=None,
        metadata={
            "help": "search_objective=f1: name of the positive class; none = that of the task or of "
            "`positive_label`, else inferred from the names of the two classes."
        },
    )
    search_dropout: bool = field(
        default=False,
        metadata={
            "help": "Keep dropout on, with the same mask for all candidates of a step. Every candidate then runs the "
            "whole model."
        },
    )
    search_peft: str | None = field(
        default=None,
        metadata={
            "help": "Add a peft method (lora, ia3, vera, ln_tuning, ...) and search its parameters and the head."
        },
    )
    search_peft_config: dict | str | None = field(
        default_factory=dict,
        metadata={"help": 'Settings of search_peft, as JSON: {"r": 1, "target_modules": ["query"]}.'},
    )
    max_evaluations_per_step: int = field(
        default=DEFAULT_BUDGET, metadata={"help": "Refuse a search that needs more evaluations than this per step."}
    )
    candidate_parallel: str = field(
        default=DATA,
        metadata={
            "help": "With several processes. data: each process evaluates all candidates on its part of the batch. "
            "candidates: each evaluates its share of the candidates on the whole batch. Processes exchange scalars; "
            "activity also sums its estimates of the gradient over them.",
            "choices": MODES,
        },
    )
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*FeatureCacheArguments._VALID_DICT_FIELDS, "search_peft_config"]

    json_fields: ClassVar[tuple[str, ...]] = ("search_peft_config",)

    def method_defaults(self) -> dict[str, float | int | str | None]:
        """Defaults that depend on the search method."""
        node, activity = self.search_method == NODE, self.search_method == ACTIVITY
        several = self.search_estimate in (ONE_SIDED, POPULATION)
        return {
            "search_eps": 1e-2 if node else None if activity else 1e-3,
            "search_directions": 4 if node else 8 if several else 1,
            "search_update": ADAM if node or activity else SGD,
        }
