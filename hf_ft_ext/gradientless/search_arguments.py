"""The settings of a search, as `--method gradientless` takes them, and the names of their choices."""

from dataclasses import dataclass, field
from typing import ClassVar

from hf_ft_ext.arguments import MethodTrainingArguments
from hf_ft_ext.gradientless.optimizers.direct_search import DEFAULT_BUDGET
from hf_ft_ext.gradientless.optimizers.exchange import DATA, MODES
from hf_ft_ext.gradientless.optimizers.nodes import NODE_DIRECTIONS
from hf_ft_ext.gradientless.optimizers.perturbation.directions import GAUSSIAN, KINDS
from hf_ft_ext.gradientless.optimizers.perturbation.estimates import ESTIMATES, ONE_SIDED, POPULATION, TWO_SIDED
from hf_ft_ext.gradientless.optimizers.perturbation.updates import ADAM, MOMENTS, RULES, SGD
from hf_ft_ext.gradientless.optimizers.selection import RANDOM, SELECTIONS
from hf_ft_ext.gradientless.scoring.objectives import LOSS, OBJECTIVES

METHODS = GLD, SPSA_METHOD, NODE, ADAM_BASELINE = ("gld", "spsa", "node", "adam")
FISHER_FORMS = DIVERGENCE, GRADIENT = ("divergence", "gradient")
HEAD, ALL, TRAINABLE, ADAPTER = "head", "all", "trainable", "adapter"


@dataclass
class SearchArguments(MethodTrainingArguments):
    """Settings of a search without gradients, not yet checked."""

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
    search_node_directions: str | None = field(
        default=None,
        metadata={
            "help": "Node: next-layer (directions in the span of the rows of the next linear layer) or signs (+1 and "
            "-1 at random); none = next-layer.",
            "choices": NODE_DIRECTIONS,
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
    search_masks: str | None = field(
        default=None,
        metadata={
            "help": "SPSA: folder of a finished run of --method fisher --fisher_mode mask. The entries that it chose "
            "move, and the tensors that it trained in full (the classifier); nothing else."
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

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*MethodTrainingArguments._VALID_DICT_FIELDS, "search_peft_config"]

    json_fields: ClassVar[tuple[str, ...]] = ("search_peft_config",)

    def method_defaults(self) -> dict[str, float | int | str]:
        """Values of arguments whose default depends on the search."""
        node, several = self.search_method == NODE, self.search_estimate in (ONE_SIDED, POPULATION)
        return {
            "search_eps": 1e-2 if node else 1e-3,
            "search_directions": 4 if node else 8 if several else 1,
            "search_update": ADAM if node else SGD,
        }
