"""Read a comparison from the command line and a recipe: the launcher's arguments for each variant and seed."""

import argparse
import functools
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_ft_ext.arguments import DataArguments, ModelArguments, RunArguments
from hf_ft_ext.data.tasks import get_task
from hf_ft_ext.errors import InputError, did_you_mean
from hf_ft_ext.launch.defaults import DEMO
from hf_ft_ext.launch.folder import folder_name
from hf_ft_ext.launch.parsing import parse_arguments
from hf_ft_ext.methods import METHODS, find_method
from hf_ft_ext.recipes.reading import read_recipe
from hf_ft_ext.training.sharing.privacy import hide_tokens

USAGE = "hf-ft-ext compare [recipe.yaml] [--methods A,B] [--seeds N] [--argument value ...]"
FIRST_SEED = 42
_SHARED = "all"
_LOGGED = "0.04"  # logging_steps: log the loss after every 4 % of a run's steps
_OWN_KEYS = ("methods", "seeds", "max_minutes", "output_dir", "dry_run", "variants")
# Arguments that the comparison sets for each run, and what to use instead.
_RESERVED = {
    "method": "pass --methods, or set it in the variants of a recipe",
    "seed": "pass --seeds",
    "overwrite_output_dir": "finished runs with the same command are kept, others are replaced",
    "resume_from_checkpoint": "start the comparison again: finished runs are not repeated",
    "output_dir": "pass it for the comparison as a whole",
    "dry_run": "pass it for the comparison as a whole",
    "push_to_hub": "run the command of the run to share from the report again, with --push_to_hub",
}
Words = dict[str, list[str]]  # name of a launcher argument -> its words on the command line, --name first


@dataclass(frozen=True)
class Variant:
    """A method with its settings: one row of the report.

    Attributes:
        left_out: arguments that were set for all methods and that this one does not support, with the reason.
    """

    name: str
    method: str
    words: Words
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The variants, seeds and options of one comparison."""

    task: str
    variants: list[Variant]
    seeds: list[int]
    output_dir: Path
    max_minutes: float | None = None
    dry_run: bool = False

    def folder(self, variant: Variant, seed: int) -> Path:
        return self.output_dir / "runs" / f"{variant.name}-seed{seed}"

    def words(self, variant: Variant, seed: int) -> list[str]:
        """The launcher's arguments of one run."""
        own = ["--method", variant.method, "--seed", str(seed), "--output_dir", str(self.folder(variant, seed))]
        words = [word for group in variant.words.values() for word in group]
        return [*own, *words, "--overwrite_output_dir"]


def read_comparison(argv: list[str]) -> Comparison:
    """Parse `[recipe.yaml] [--argument value ...]`; the command line overrides the recipe, both override defaults.

    Raises:
        InputError: invalid input; all runs are checked before the first one starts.
        SystemExit: `--help` was printed.
    """
    argv = list(argv)
    recipe = read_recipe(argv.pop(0)) if argv and not argv[0].startswith("-") else {}
    if not {"-h", "--help"}.isdisjoint(argv):
        _parser().parse_args(["--help"])
    line = _grouped(argv)
    options = {key: recipe.pop(key) for key in _OWN_KEYS if key in recipe}
    options |= {key: _own_value(key, line.pop(key)) for key in _OWN_KEYS if key in line}
    shared = {key: _words(key, value) for key, value in recipe.items() if value is not None}
    _refuse_reserved({**shared, **line})
    chosen = _chosen(options.get("methods"), options.get("variants") or {})
    with_defaults = not {"model_name_or_path"} & (shared.keys() | line.keys())
    defaults = _defaults() if with_defaults else {}
    variants = [_variant(name, own_settings, defaults, shared, line) for name, own_settings in chosen.items()]
    _refuse_unknown({**shared, **line}, variants)
    task = _task({**shared, **line})
    comparison = Comparison(
        task=task,
        variants=variants,
        seeds=_seeds(options.get("seeds", 1)),
        output_dir=Path(options.get("output_dir") or Path("runs") / f"compare-{folder_name(task)}").expanduser(),
        max_minutes=_minutes(options.get("max_minutes")),
        dry_run=bool(options.get("dry_run")),
    )
    for variant in variants:  # all of them before the first one starts
        try:
            parse_arguments(comparison.words(variant, comparison.seeds[0]))
        except InputError as error:
            raise InputError(f"{variant.name}: {error}") from error
    return comparison


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-ft-ext compare",
        usage=USAGE,
        description="Run several methods on the same data, each run in a separate process, and write report.html, "
        "report.md and pictures. Finished runs are not repeated, so an interrupted comparison can be continued.",
        epilog="All other arguments are those of the launcher (`run_glue.py --help`) and are passed to every method "
        "that has them. A recipe is a YAML file of these arguments; `variants` in it maps names to their settings, "
        "including `method`.",
    )
    names = ", ".join(METHODS)
    parser.add_argument("--methods", help=f"Methods or variants of the recipe, separated by commas ({names})")
    parser.add_argument("--seeds", help=f"Number of seeds, counted from {FIRST_SEED}; or seeds separated by commas")
    parser.add_argument(
        "--max_minutes", help="Time limit: skip runs that are expected to exceed it, and stop a run that does"
    )
    parser.add_argument("--output_dir", help="Folder of the runs and the report (default: runs/compare-TASK)")
    parser.add_argument("--dry_run", action="store_true", default=None, help="Print the commands without running them")
    return parser


# --- words ------------------------------------------------------------------------------------------


def _grouped(rest: list[str]) -> Words:
    groups: Words = {}
    name = None
    for word in rest:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            groups[name] = [word]
        elif name is None:
            raise InputError(
                f"unexpected argument {hide_tokens(word)!r}: put a recipe first, and values after their --argument"
            )
        else:
            groups[name].append(word)
    return groups


def _own_value(key: str, words: list[str]) -> str | bool:
    """The value of an option of the comparison itself, which has one; `True` for `--dry_run`."""
    _, given, value = words[0].partition("=")
    values = [value, *words[1:]] if given else words[1:]
    if key == "dry_run" and not values:
        return True
    if key in ("dry_run", "variants") or len(values) != 1:
        how = {
            "dry_run": "takes no value",
            "variants": "is a mapping; set it in a recipe",
            "methods": "takes one value: names separated by commas",
            "seeds": "takes one value: a number, or seeds separated by commas",
        }.get(key, "takes one value")
        raise InputError(f"--{key} {how}, got: {' '.join(values) or 'none'}")
    return values[0]


def _words(key: str, value: Any) -> list[str]:
    """A setting of a recipe as words of the command line."""
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, dict):
        value = json.dumps(value)
    return [f"--{key}", *(str(item) for item in (value if isinstance(value, list) else [value]))]


# --- variants ---------------------------------------------------------------------------------------


def _chosen(methods: Any, variants: Any) -> dict[str, dict[str, Any]]:
    """Settings of each chosen variant, by name, in the given order."""
    if not isinstance(variants, dict) or not all(isinstance(v, dict | None) for v in variants.values()):
        raise InputError("variants of a comparison's recipe must be a mapping: name: {method: ..., argument: value}")
    if methods is None:
        names = list(variants) or list(METHODS)
    else:
        names = methods if isinstance(methods, list) else str(methods).split(",")
        names = [str(name).strip() for name in names if str(name).strip()]
    if not names:
        raise InputError(f"methods={methods!r} is empty; choose from: {', '.join({**variants, **METHODS})}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"methods contains {twice[0]!r} twice; give the second variant another name in a recipe")
    chosen = {}
    for name in names:
        if name not in variants and name not in METHODS:
            known = {**variants, **METHODS}
            raise InputError(f"unknown method {name!r}{did_you_mean(name, known)}; choose from: {', '.join(known)}")
        if folder_name(name) != name:
            raise InputError(f"variant {name!r} is used as a folder name; use letters, digits, '.', '_' and '-' only")
        chosen[name] = {"method": name, **(variants.get(name) or {})}
        if chosen[name]["method"] not in METHODS:
            find_method(str(chosen[name]["method"]))  # raises, with a suggestion
    return chosen


def _variant(name: str, settings: dict[str, Any], defaults: dict[str, Words], shared: Words, line: Words) -> Variant:
    settings = dict(settings)
    method = settings.pop("method")
    own = {key.replace("-", "_"): value for key, value in settings.items() if value is not None}
    own = {key: _words(key, value) for key, value in own.items()}
    _refuse_reserved(own)
    left_out: dict[str, str] = {}

    def supported(words: Words, remember: bool) -> Words:
        kept = {}
        for key, group in words.items():
            if _field(method, key) is None:
                continue  # of another method, or unknown: see `_refuse_unknown`
            reason = _refusal(method, _field(method, key))
            if reason is None:
                kept[key] = group
            elif remember:
                left_out[key] = reason
        return kept

    words = supported(defaults.get(_SHARED, {}), remember=False) | defaults.get(method, {})
    words |= supported(shared, remember=True) | own | supported(line, remember=True)
    words.setdefault("save_strategy", ["--save_strategy", "no"])
    words.setdefault("disable_tqdm", ["--disable_tqdm", "true"])
    if "logging_strategy" not in words:
        words.setdefault("logging_steps", ["--logging_steps", _LOGGED])  # points of the report's loss curves
    return Variant(name, method, words, left_out)


@functools.cache
def _fields(method: str) -> frozenset[str]:
    classes = (RunArguments, ModelArguments, DataArguments, find_method(method).arguments_class())
    return frozenset(f.name for dtype in classes for f in fields(dtype) if f.init)


def _field(method: str, key: str) -> str | None:
    """The argument of `method` that `key` sets, or `None`; `no_x` sets a boolean `x`, as in argparse."""
    return next((name for name in (key, key.removeprefix("no_")) if name in _fields(method)), None)


@functools.cache
def _refusal(method: str, name: str) -> str | None:
    """The reason why `method` does not support an argument; `None` if it does."""
    try:
        find_method(method).arguments_class()("unused").check_given({name: "any value"})
    except InputError as error:
        return str(error).replace(f"{name}=any value ", "").replace("; leave it out", "")
    except (TypeError, ValueError, AttributeError):  # the check needs a valid value, so the argument is supported
        return None
    return None


def _refuse_reserved(words: Words) -> None:
    for key, instead in _RESERVED.items():
        if key in words:
            raise InputError(f"{key} is set by the comparison for each run; leave it out: {instead}")


def _refuse_unknown(words: Words, variants: list[Variant]) -> None:
    for key in words:
        if all(_field(variant.method, key) is None for variant in variants):
            owner = next((name for name in METHODS if _field(name, key) is not None), None)
            if owner is not None:
                raise InputError(
                    f"{key} belongs to method {owner!r}, which is not in this comparison; add it, or leave {key} out"
                )
            known = {name for variant in variants for name in _fields(variant.method)} | set(_OWN_KEYS)
            raise InputError(f"unknown argument {key!r}{did_you_mean(key, known)}; see `run_glue.py --help`")


def _defaults() -> dict[str, Words]:
    text = (Path(__file__).parent / "defaults.yaml").read_text(encoding="utf-8")
    return {
        name: {key: _words(key, value) for key, value in settings.items()}
        for name, settings in yaml.safe_load(text).items()
    }


# --- single options ---------------------------------------------------------------------------------


def _task(words: Words) -> str:
    for key in ("task_name", "dataset_name", "train_file"):
        if key in words:
            group = words[key]
            value = group[0].partition("=")[2] or (group[1] if len(group) > 1 else "")
            return get_task(value).name if key == "task_name" else folder_name(value)
    return DEMO


def _seeds(given: Any) -> list[int]:
    try:
        if isinstance(given, list):
            seeds = [int(seed) for seed in given]
        elif "," in str(given):
            seeds = [int(seed) for seed in str(given).split(",") if seed.strip()]
        else:
            seeds = list(range(FIRST_SEED, FIRST_SEED + int(given)))
    except (TypeError, ValueError):
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(
            f"seeds must be a number of seeds (1 or more) or a list of different seeds such as 13,21,42, got {given!r}"
        )
    return seeds


def _minutes(given: Any) -> float | None:
    if given is None:
        return None
    try:
        minutes = float(given)
    except (TypeError, ValueError):
        minutes = 0.0
    if not minutes > 0:
        raise InputError(f"max_minutes must be above 0 (leave it out for no limit), got {given!r}")
    return minutes
