"""The table of methods: name, arguments class, trainer class and one line of help for each.

Classes are imported only when they are requested, so that listing the methods is fast. Other packages add methods
through the entry point group `hf_ft_ext.methods`, see docs/add-a-method.md.
"""

import importlib
import logging
from dataclasses import dataclass
from importlib.metadata import entry_points

from hf_ft_ext.errors import InputError, did_you_mean

logger = logging.getLogger(__name__)

ENTRY_POINTS = "hf_ft_ext.methods"
_PARTS = ("arguments", "trainer", "help")


@dataclass(frozen=True)
class Method:
    """One fine-tuning method.

    Attributes:
        name: the value of `--method`.
        arguments: `module:Class` of its training arguments.
        trainer: `module:Class` of its trainer.
        help: a one-line description.
    """

    name: str
    arguments: str
    trainer: str
    help: str

    def arguments_class(self) -> type:
        """The dataclass of this method's arguments, a subclass of `MethodTrainingArguments`."""
        return _load(self.arguments)

    def trainer_class(self) -> type:
        """The subclass of `transformers.Trainer` that trains with this method."""
        return _load(self.trainer)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "full",
            "hf_ft_ext.full.arguments:FullTrainingArguments",
            "hf_ft_ext.full.trainer:FullTrainer",
            "fine-tuning of all weights, or of any peft method's: the baseline",
        ),
        Method(
            "lora",
            "hf_ft_ext.lora.arguments:LoraTrainingArguments",
            "hf_ft_ext.lora.trainer:LoraTrainer",
            "LoRA adapters (peft) and the head: the parameter-efficient baseline",
        ),
        Method(
            "sparse",
            "hf_ft_ext.sparse.arguments:SparseTrainingArguments",
            "hf_ft_ext.sparse.trainer:SparseTrainer",
            "SparseGrad: trains few entries of the MLP weights, in a Tucker basis of their gradients",
        ),
        Method(
            "gradientless",
            "hf_ft_ext.gradientless.arguments:GradientlessTrainingArguments",
            "hf_ft_ext.gradientless.trainer:GradientlessTrainer",
            "search without gradients: direct search (GLD), SPSA (MeZO and its successors)",
        ),
        Method(
            "linearhead",
            "hf_ft_ext.linearhead.arguments:LinearHeadTrainingArguments",
            "hf_ft_ext.linearhead.trainer:LinearHeadTrainer",
            "linear probing: logistic or ridge regression fits the last layer on a frozen encoder",
        ),
        Method(
            "fisher",
            "hf_ft_ext.fisher.arguments:FisherTrainingArguments",
            "hf_ft_ext.fisher.trainer:FisherTrainer",
            "FishPAL: a Fisher pre-pass chooses an adapter for each layer; FISH masks",
        ),
        Method(
            "kernel",
            "hf_ft_ext.kernel.arguments:KernelTrainingArguments",
            "hf_ft_ext.kernel.trainer:KernelTrainer",
            "kernel regression with the model's empirical neural tangent kernel (eNTK)",
        ),
    )
}


def add_methods_of_other_packages() -> None:
    """Add the methods of installed packages to `METHODS`.

    An entry point names a dictionary with `arguments`, `trainer` and `help`, as in `Method`. An invalid one is left
    out with a warning.
    """
    for point in entry_points(group=ENTRY_POINTS):
        where = f"method {point.name!r} of {point.value!r}"
        try:
            parts = point.load()
            if point.name in METHODS:
                logger.warning("%s is left out: there is a method of that name already", where)
            elif set(parts) != set(_PARTS):
                logger.warning("%s is left out: it needs %s, and has %s", where, ", ".join(_PARTS), ", ".join(parts))
            else:
                METHODS[point.name] = Method(point.name, **parts)
        except Exception as error:  # a broken third-party package must not stop the run
            logger.warning("%s is left out: %s: %s", where, type(error).__name__, error)


def find_method(name: str) -> Method:
    """Return the method called `name`.

    Raises:
        InputError: there is none; the message names the closest one and lists all.
    """
    if name not in METHODS:
        raise InputError(
            f"unknown method {name!r}{did_you_mean(name, METHODS)}; the methods are: {', '.join(METHODS)}"
        )
    return METHODS[name]


def hooks_of(name: str) -> type | None:
    """The trainer class of the method `name`, for its hooks (see `hf_ft_ext.training.sharing.run_files`).

    `None` if this installation does not have the method, or cannot load it (with a warning).
    """
    if name not in METHODS:
        return None
    try:
        return METHODS[name].trainer_class()
    except Exception as error:  # of another package
        logger.warning("the trainer of method %r cannot be loaded: %s: %s", name, type(error).__name__, error)
        return None


def list_methods() -> str:
    """The text of `--help` without a method."""
    width = max(map(len, METHODS))
    return "\n".join(
        (
            "usage: run_glue.py [recipe.yaml[#ROW]] [--method NAME] [--argument value ...]",
            "       hf-ft-ext train, the same in one process",
            "",
            "Fine-tune a classifier or a language model. Without arguments: method sparse on the demo model and task.",
            "A recipe is a YAML file of `argument: value` lines; the command line overrides it.",
            "`recipe.yaml#ROW` is one row of a table of experiments; `hf-ft-ext recipes` lists them.",
            "",
            "methods:",
            *(f"  {method.name:<{width}}  {method.help}" for method in METHODS.values()),
            "",
            "`--method NAME --help` lists the arguments of a method with their defaults, and the most used ones of",
            "transformers.TrainingArguments; `--method NAME --help all` lists all of these.",
            "",
        )
    )


def only_help_wanted(argv: list[str]) -> bool:
    """Whether `argv` asks for help and names neither a method nor a recipe."""
    named = any(word.split("=")[0] == "--method" for word in argv) or (argv and not argv[0].startswith("-"))
    return not named and ("-h" in argv or "--help" in argv)


def _load(path: str) -> type:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


add_methods_of_other_packages()
