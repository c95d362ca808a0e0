"""From arguments to the optimizer, and what a trainer refuses."""

import logging

from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.arguments import ADAM_BASELINE, GLD, GradientlessTrainingArguments
from hf_ft_ext.gradientless.optimizers.base import GradientFreeOptimizer
from hf_ft_ext.gradientless.optimizers.direct_search import DirectSearch
from hf_ft_ext.gradientless.optimizers.exchange import DATA
from hf_ft_ext.gradientless.optimizers.selection import ALL
from hf_ft_ext.gradientless.optimizers.spsa import SPSA
from hf_ft_ext.gradientless.scoring.objectives import F1, MATTHEWS, Objective
from hf_ft_ext.training.checks import refuse_label_names
from hf_ft_ext.training.sharding import refuse_sharding

logger = logging.getLogger(__name__)


def build_optimizer(
    args: GradientlessTrainingArguments, model: nn.Module, searched: dict[str, nn.Parameter]
) -> GradientFreeOptimizer:
    """The optimizer that `args` describe, over `searched`.

    Raises:
        InputError: a value that the parameters do not fit.
    """
    shared = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "seed": args.seed}
    parameters = list(searched.values())
    if args.search_method == GLD:
        size = args.search_sampling_size
        largest = sum(p.numel() for p in parameters) if args.search_pool else max(p.numel() for p in parameters)
        if args.search_selection == ALL:
            size = None
        elif size is None:
            hidden = getattr(model.config, "hidden_size", None) or max(max(p.shape) for p in parameters if p.ndim)
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
        from hf_ft_ext.full.head_adam import HeadAdam  # a baseline of another method: not loaded by any search

        betas, rates = (
            (args.adam_beta1, args.adam_beta2),
            {"lr": args.learning_rate, "weight_decay": args.weight_decay},
        )
        return HeadAdam(parameters, betas=betas, eps=args.adam_epsilon, **rates)
    return SPSA(
        parameters,
        model,
        eps=args.search_eps,
        num_directions=args.search_directions,
        block=args.search_block,
        update=args.search_update,
        momentum=args.search_momentum,
        betas=(args.adam_beta1, args.adam_beta2),
        adam_eps=args.adam_epsilon,
        max_evaluations=args.max_evaluations_per_step,
        **shared,
    )


def refuse_misfits(args: GradientlessTrainingArguments, objective: Objective | None) -> None:
    """Options that cannot be honoured are errors, not silence.

    Raises:
        InputError: one of them was passed.
    """
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
            f"{what} of a batch is no mean over its parts, and each process has one; pass --candidate_parallel "
            "candidates"
        )
