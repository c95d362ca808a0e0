"""Build the optimizer from the arguments, and refuse unsupported combinations."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.arguments import GradientlessTrainingArguments
from hf_ft_ext.gradientless.optimizers.activity import ActivityPerturbation
from hf_ft_ext.gradientless.optimizers.direct_search import DirectSearch
from hf_ft_ext.gradientless.optimizers.exchange import DATA
from hf_ft_ext.gradientless.optimizers.nodes import NEXT_LAYER, NodePerturbation
from hf_ft_ext.gradientless.optimizers.perturbation.directions import Directions, compute_type
from hf_ft_ext.gradientless.optimizers.perturbation.update_rules import ADAM, BUFFER, MOMENTUM
from hf_ft_ext.gradientless.optimizers.selection import ALL
from hf_ft_ext.gradientless.optimizers.spsa import SPSA
from hf_ft_ext.gradientless.scoring.objectives import F1, MATTHEWS, Objective
from hf_ft_ext.gradientless.search_arguments import ACTIVITY, ADAM_BASELINE, GLD, NODE, SPSA_METHOD
from hf_ft_ext.training.checks import refuse_label_names
from hf_ft_ext.training.weights.sharding import refuse_sharding

logger = logging.getLogger(__name__)


def build_optimizer(
    args: GradientlessTrainingArguments,
    model: nn.Module,
    searched: dict[str, nn.Parameter],
    masks_by_name: Mapping[str, torch.Tensor] | None = None,
    decayed: Collection[str] | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer that `args` describe, over the parameters `searched`.

    Args:
        masks_by_name: entries of a searched parameter that may change (bool, by name); a parameter without a mask
            may change everywhere.
        decayed: names of the parameters that get weight decay; `None` = all. GLD penalizes the norm of all.

    Raises:
        InputError: a value that does not fit the parameters.
    """
    kept: set[str] = set()  # without decay; they are last, as the numbers of the parameters follow the groups
    if decayed is not None and args.weight_decay and args.search_method != GLD:
        kept = set(searched) - set(decayed)
    searched = {name: searched[name] for name in sorted(searched, key=kept.__contains__)}
    shared = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "seed": args.seed}
    parameters = list(searched.values())
    groups: list[dict[str, Any]] = []
    for names, settings in ((set(searched) - kept, {}), (kept, {"weight_decay": 0.0})):
        if names:
            groups.append({"params": [p for name, p in searched.items() if name in names], **settings})
    masks = None
    if masks_by_name is not None:
        if unknown := [name for name in masks_by_name if name not in searched]:
            raise InputError(f"masks: {unknown[0]} is not searched; leave it out, or change search_target")
        masks = [masks_by_name.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in searched.items()]
    if args.search_method == GLD:
        size = args.search_sampling_size
        largest = sum(p.numel() for p in parameters) if args.search_pool else max(p.numel() for p in parameters)
        if args.search_selection == ALL:
            size = None
        elif size is None:
            hidden = getattr(getattr(model, "config", None), "hidden_size", None)
            hidden = hidden or max(max(p.shape) for p in parameters if p.ndim)
            size = min(2 * hidden, largest)
        return DirectSearch(
            parameters,
            num_candidates=args.search_candidates,
            options=args.search_options,
            selection=args.search_selection,
            sampling_size=size,
            sampling_steps=args.search_sampling_steps,
            antithetic=args.search_antithetic,
            pool=args.search_pool,
            block=args.search_block,
            max_evaluations=args.max_evaluations_per_step,
            **shared,
        )
    if args.search_method == ADAM_BASELINE:
        from hf_ft_ext.training.head_adam import HeadAdam  # imported here: only the baseline needs it

        del shared["seed"]
        return HeadAdam(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, **shared)
    rule = {
        "num_directions": args.search_directions,
        "update": args.search_update,
        "momentum": args.search_momentum,
        "betas": (args.adam_beta1, args.adam_beta2),
        "adam_eps": args.adam_epsilon,
        **({} if args.search_eps is None else {"eps": args.search_eps}),
        **shared,
    }
    if args.search_method in (NODE, ACTIVITY):
        if args.search_method == NODE:
            directions = args.search_node_directions or NEXT_LAYER
            optimizer = NodePerturbation(groups, directions=directions, **rule)
        else:
            optimizer = ActivityPerturbation(groups, model, **rule)
        if (needed := optimizer.evaluations_per_step()) > args.max_evaluations_per_step:
            raise InputError(
                f"a step would need {needed:,} evaluations, more than max_evaluations_per_step="
                f"{args.max_evaluations_per_step:,}; use fewer search_directions, or raise max_evaluations_per_step"
            )
        return optimizer
    if args.search_carry and not any(p.element_size() == 2 and p.ndim > 1 for p in parameters):
        logger.warning(
            "search_carry is not used: it keeps rounding errors of 16-bit matrices, and none is searched here "
            "(--dtype bfloat16 loads the weights in 16 bits)."
        )
    return SPSA(
        groups,
        model,
        block=args.search_block,
        max_evaluations=args.max_evaluations_per_step,
        direction=args.search_direction,
        rank=args.search_rank,
        renew=args.search_renew,
        small=args.search_small,
        masks=masks,
        estimate=args.search_estimate,
        moments=args.search_moments,
        carry=args.search_carry,
        candidates_per_forward=args.search_candidates_per_forward,
        **rule,
    )


def buffers_of(args: GradientlessTrainingArguments, parameter: torch.Tensor) -> tuple[int, int]:
    """Bytes of the gradient and of the optimizer state that the search keeps for a parameter."""
    size = parameter.numel() * parameter.element_size()
    if args.search_method == ADAM_BASELINE:
        return size, 2 * size
    if args.search_method == GLD:
        return 0, 0
    entry = compute_type(parameter.dtype).itemsize
    moments: dict[str | None, int] = {ADAM: 2, MOMENTUM: 1}
    state = parameter.numel() * entry * moments.get(args.search_update, 0)
    if args.search_method == SPSA_METHOD and args.search_update == MOMENTUM and args.search_moments != BUFFER:
        directions = Directions(args.search_direction, args.search_block, args.search_rank, args.search_renew)
        if directions.rank is not None and directions.has_factors(parameter.shape) and directions.right_stays():
            state = len(parameter) * directions.rank * entry  # the left factor
        elif parameter.ndim > 1:
            state = 0  # recomputed from seeds
    if parameter.element_size() == 2 and (parameter.ndim < 2 or args.search_carry):  # the kept rounding error
        state += parameter.numel() * (4 if parameter.ndim < 2 else 2)
    estimates = args.search_method in (NODE, ACTIVITY)
    return parameter.numel() * entry if estimates else 0, state


def refuse_unsupported(args: GradientlessTrainingArguments, objective: Objective | None, masks_given: bool) -> None:
    """Refuse combinations of arguments, objective and masks that the search does not support.

    Raises:
        InputError: such a combination was passed.
    """
    if masks_given and args.search_method != SPSA_METHOD:
        raise InputError(f"masks apply to search_method=spsa, not to {args.search_method}; leave them out")
    if masks_given and args.search_masks is not None:
        raise InputError("masks and search_masks both select the entries to change; leave one of them out")
    if masks_given and args.search_trajectory:
        raise InputError("search_trajectory stores seeds, and masks cannot be recomputed from a seed; leave it out")
    if args.search_method == ADAM_BASELINE and args.world_size > 1:
        raise InputError("search_method=adam is a baseline for one process; start one process")
    if args.search_method in (NODE, ACTIVITY):
        method = args.search_method
        if objective is not None:
            raise InputError(
                f"objective returns one value per batch, and search_method={method} needs the loss of each row; leave "
                "objective out, or pass search_method=spsa or gld"
            )
        if args.world_size > 1 and method == NODE:
            raise InputError(
                "search_method=node estimates a gradient for each row, and exchanging these between processes is not "
                "supported; start one process, or use search_method=activity or spsa"
            )
    refuse_sharding(args, "a search")
    refuse_label_names(args)
    if objective is not None and args.search_objective != "loss":
        raise InputError(
            f"objective and search_objective={args.search_objective} were both passed; leave one of them out"
        )
    named = args.search_objective in (F1, MATTHEWS)
    if args.world_size > 1 and args.candidate_parallel == DATA and (named or objective is not None):
        what = "the objective" if objective is not None else f"search_objective={args.search_objective}"
        raise InputError(
            f"{what} of a batch is not the mean over its parts, and each process has one part; pass "
            "--candidate_parallel candidates"
        )
