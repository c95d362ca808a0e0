"""Checks of `GradientlessTrainingArguments`: values out of range, and options that contradict each other."""

import re
from dataclasses import fields

import torch

from hf_ft_ext.arguments import MethodTrainingArguments
from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.exchange import MODES
from hf_ft_ext.gradientless.optimizers.nodes import NODE_DIRECTIONS, NodePerturbation
from hf_ft_ext.gradientless.optimizers.options import parse_options
from hf_ft_ext.gradientless.optimizers.perturbation.directions import KINDS, Directions
from hf_ft_ext.gradientless.optimizers.perturbation.estimates import ESTIMATES, FORWARD, Estimate
from hf_ft_ext.gradientless.optimizers.perturbation.update_rules import ADAM, MOMENTS, MOMENTUM, RMS, RULES, UpdateRule
from hf_ft_ext.gradientless.optimizers.perturbation.weight_updates import check_replay
from hf_ft_ext.gradientless.optimizers.selection import ALL as ALL_ENTRIES
from hf_ft_ext.gradientless.optimizers.selection import FISHER, SELECTIONS
from hf_ft_ext.gradientless.scoring.objectives import F1, LOSS, OBJECTIVES
from hf_ft_ext.gradientless.search_arguments import (
    ACTIVITY,
    ADAM_BASELINE,
    ALL,
    FISHER_FORMS,
    GLD,
    HEAD,
    METHODS,
    NODE,
    SPSA_METHOD,
    TRAINABLE,
    SearchArguments,
)

# Arguments that only one search method uses: setting one with another method is an error.
_METHOD_OF_ARGUMENT = {
    **dict.fromkeys(
        ("search_candidates", "search_options", "search_selection", "search_sampling_size", "search_sampling_steps",
         "search_antithetic", "search_pool"),
        GLD,
    ),
    **dict.fromkeys(
        ("search_direction", "search_rank", "search_renew", "search_small", "search_masks", "search_estimate",
         "search_moments", "search_carry", "search_candidates_per_forward", "search_trajectory"),
        SPSA_METHOD,
    ),
    "search_node_directions": NODE,
}  # fmt: skip
_ESTIMATE_ARGUMENTS = ("search_eps", "search_directions", "search_update", "search_momentum")


def check_values(args: SearchArguments) -> None:
    """Raise an `InputError` for a value out of range."""
    for name, known in (
        ("search_method", METHODS),
        ("search_selection", SELECTIONS),
        ("search_fisher", (None, *FISHER_FORMS)),
        ("search_update", RULES),
        ("search_direction", KINDS),
        ("search_estimate", ESTIMATES),
        ("search_moments", (None, *MOMENTS)),
        ("search_node_directions", (None, *NODE_DIRECTIONS)),
        ("search_objective", OBJECTIVES),
        ("candidate_parallel", MODES),
    ):
        if getattr(args, name) not in known:
            choices = ", ".join(filter(None, known))
            raise InputError(f"{name}={getattr(args, name)!r} is unknown; choose from: {choices}")
    for name in (
        "search_candidates",
        "search_sampling_steps",
        "search_block",
        "search_directions",
        "search_candidates_per_forward",
        "max_evaluations_per_step",
    ):
        if getattr(args, name) < 1:
            raise InputError(f"{name} must be 1 or more, got {getattr(args, name)}")
    if args.search_sampling_size is not None and args.search_sampling_size < 1:
        raise InputError(f"search_sampling_size must be 1 or more, got {args.search_sampling_size}")
    for name in ("learning_rate", "weight_decay"):
        if not getattr(args, name) >= 0:
            raise InputError(f"{name} must be 0 or more, got {getattr(args, name)}")
    parse_options(args.search_options)
    if args.search_target not in (None, HEAD, ALL, TRAINABLE):
        try:
            re.compile(args.search_target)
        except re.error as error:
            raise InputError(f"search_target={args.search_target!r} is not a regular expression: {error}") from None


def check_together(args: SearchArguments) -> None:
    """Raise an `InputError` for an option that the chosen search does not use, or that contradicts another one."""
    defaults = {f.name: f.default for f in fields(args)}
    for name, method in _METHOD_OF_ARGUMENT.items():
        if args.search_method != method and getattr(args, name) != defaults[name]:
            raise InputError(
                f"{name}={getattr(args, name)} applies to search_method={method}, not to {args.search_method}; leave "
                "one of them out"
            )
    if args.search_method in (GLD, ADAM_BASELINE):
        own_defaults = {**defaults, **args.method_defaults()}
        for name in _ESTIMATE_ARGUMENTS:
            given = getattr(args, name)
            if given != own_defaults[name]:
                raise InputError(
                    f"{name}={given} applies to search_method=spsa, node or activity, not to "
                    f"{args.search_method}; leave one of them out"
                )
    if args.search_method in (SPSA_METHOD, NODE, ACTIVITY):
        _check_matrix(args)
    if args.search_momentum != defaults["search_momentum"] and args.search_update != MOMENTUM:
        raise InputError(f"search_momentum={args.search_momentum} needs search_update=momentum; leave it out")
    adam = args.search_update == ADAM or args.search_method == ADAM_BASELINE
    own = {f.name: f.default for f in fields(MethodTrainingArguments)}
    # rms has one running mean, that of the squared slopes
    for name, rules in (("adam_beta1", "adam"), ("adam_beta2", "adam or rms"), ("adam_epsilon", "adam or rms")):
        if getattr(args, name) != own[name] and not adam and not (args.search_update == RMS and RMS in rules):
            raise InputError(f"{name}={getattr(args, name)} needs search_update={rules}; leave it out")
    if args.search_fisher is not None and args.search_selection != FISHER:
        raise InputError(f"search_fisher={args.search_fisher} needs search_selection=fisher; leave it out")
    if args.search_selection == ALL_ENTRIES and args.search_sampling_size is not None:
        raise InputError(
            f"search_selection=all changes every entry; leave search_sampling_size={args.search_sampling_size} out"
        )
    if args.search_selection == ALL_ENTRIES and args.search_sampling_steps != defaults["search_sampling_steps"]:
        raise InputError(
            f"search_sampling_steps={args.search_sampling_steps} says how often entries are selected, and "
            "search_selection=all selects none; leave one of them out"
        )
    if args.label_smoothing_factor and args.search_objective != LOSS:
        raise InputError(
            f"label_smoothing_factor={args.label_smoothing_factor} changes the loss, which search_objective="
            f"{args.search_objective} does not read; leave one of them out"
        )
    if args.neftune_noise_alpha and not args.search_dropout:
        raise InputError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise in training mode, and a search compares "
            "candidates in evaluation mode; pass search_dropout too, or leave it out"
        )
    if args.search_block > 1 and args.search_method in (ADAM_BASELINE, NODE, ACTIVITY):
        adam = args.search_method == ADAM_BASELINE
        why = "adam draws none" if adam else f"{args.search_method} perturbs outputs instead"
        raise InputError(
            f"search_block={args.search_block} groups entries of a weight perturbation, and {why}; leave it out"
        )
    if args.search_block > 1 and args.search_method == GLD and args.search_selection != ALL_ENTRIES:
        raise InputError(
            f"search_block={args.search_block} changes consecutive entries together, and search_selection="
            f"{args.search_selection} selects single ones; pass --search_selection all"
        )
    if args.search_peft_config and args.search_peft is None:
        raise InputError("search_peft_config needs search_peft; pass a peft method, such as search_peft=lora")
    if args.search_positive_label is not None and args.search_objective != F1:
        raise InputError(
            f"search_positive_label={args.search_positive_label!r} applies to search_objective=f1, not to "
            f"{args.search_objective}; leave one of them out"
        )
    if args.search_method in (NODE, ACTIVITY) and (args.search_objective != LOSS or args.search_dropout):
        raise InputError(
            f"search_method={args.search_method} needs the loss of each row with dropout off; leave search_objective "
            "and search_dropout out"
        )
    if args.search_method == ADAM_BASELINE and (args.search_objective != LOSS or args.search_dropout):
        raise InputError(
            "search_method=adam needs the derivative of the loss with dropout off; leave search_objective and "
            "search_dropout out"
        )


def _check_matrix(args: SearchArguments) -> None:
    """Check direction, estimate and update together, by the optimizer's own checks."""
    betas, count, update = (args.adam_beta1, args.adam_beta2), args.search_directions, args.search_update
    assert count is not None and update is not None  # set to the method's defaults
    eps = 1.0 if args.search_eps is None else args.search_eps
    try:
        if args.search_method in (NODE, ACTIVITY):
            NodePerturbation([torch.zeros(1)], update=update, momentum=args.search_momentum,
                             betas=betas, eps=eps, num_directions=count)  # fmt: skip
            return
        directions = Directions(
            args.search_direction,
            args.search_block,
            args.search_rank,
            args.search_renew,
            None if args.search_masks is None else (),
            args.search_small,
        )
        Estimate(args.search_estimate, eps, count)
        rule = UpdateRule(update, args.search_momentum, betas, args.adam_epsilon, args.search_moments)
        check_replay(directions, rule)
    except InputError as error:
        raise InputError(f"search_{str(error).replace('num_directions', 'directions')}") from None
    if args.search_masks is not None:
        for name in ("search_target", "search_peft"):
            if getattr(args, name) is not None:
                raise InputError(
                    f"{name}={getattr(args, name)} and search_masks both select what is searched; leave one of them "
                    "out"
                )
        if args.search_trajectory:
            raise InputError(
                "search_trajectory stores seeds, and search_masks cannot be recomputed from a seed; leave "
                "search_trajectory out and use the saved model"
            )
    if args.search_estimate == FORWARD and args.search_eps != args.method_defaults()["search_eps"]:
        raise InputError(
            f"search_eps={args.search_eps} is the size of a perturbation, and search_estimate=forward makes none; "
            "leave one of them out"
        )
    if args.search_estimate == FORWARD and args.search_objective != LOSS:
        raise InputError(
            f"search_estimate=forward differentiates, and search_objective={args.search_objective} has no "
            "derivative; pass search_estimate=two-sided"
        )
    if args.search_candidates_per_forward > 1 and args.search_dropout:
        raise InputError(
            "search_dropout needs the same dropout mask for all candidates, and rows of one forward pass have "
            "different masks; leave search_candidates_per_forward out"
        )
