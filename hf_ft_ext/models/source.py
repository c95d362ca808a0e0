"""The source of a model: its folder or Hub id, its entry in run records, and errors of loading it."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from hf_ft_ext.arguments import ModelArguments
from hf_ft_ext.demo.encoder import DEMO_HUB_ID, DEMO_NAME
from hf_ft_ext.errors import InputError, first_line

ADAPTER_NOT_TRAINED = (
    "model {name!r} is a PEFT adapter; pass its base model, or merge the adapter (PeftModel.merge_and_unload) and "
    "pass the merged model. To evaluate or predict with the adapter, leave --do_train out"
)


def model_label(model_args: ModelArguments) -> str:
    """The model's name in a run record."""
    return DEMO_NAME if model_args.model_name_or_path is None else model_args.model_name_or_path


def model_source(model_args: ModelArguments) -> dict[str, str | None]:
    """The initial model of a run, for its record: `hub_id` and `revision`, or the absolute `folder`."""
    name = model_args.model_name_or_path
    if name is None:
        return {"hub_id": DEMO_HUB_ID, "revision": None, "folder": None}
    if os.path.isdir(os.path.expanduser(name)):
        return {"hub_id": None, "revision": None, "folder": os.path.realpath(os.path.expanduser(name))}
    return {"hub_id": name, "revision": model_args.model_revision, "folder": None}


def checked_name(name: str) -> str:
    """Check that `name` is a model folder or a Hub id, not a file, an adapter or a missing folder; return it."""
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        raise InputError(f"model {name!r} is a file; pass the folder that holds config.json and the weights")
    if os.path.isdir(path):
        folder = Path(path)
        if (folder / "adapter_config.json").is_file():
            raise InputError(ADAPTER_NOT_TRAINED.format(name=name))
        if not (folder / "config.json").is_file():
            raise InputError(f"model folder {name!r} has no config.json; pass a folder that save_pretrained wrote")
        return path
    if not is_hub_id(name):
        raise InputError(f"model {name!r}: there is no such folder, and it is not a Hub id (owner/name)")
    return name


def is_hub_id(name: str) -> bool:
    """Whether `name` is no local path and has the form of a Hub id."""
    form = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")
    return form and not os.path.exists(os.path.expanduser(name))


@contextlib.contextmanager
def loading_errors_as_input_errors(name: str, part: str) -> Iterator[None]:
    """Turn library errors while loading `part` of model `name` into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise InputError(_reason(name, part, error)) from error
    except (AttributeError, TypeError, ArithmeticError) as error:  # a configuration file with wrong content
        if not os.path.isdir(name):
            raise
        raise InputError(_reason(name, part, error)) from error
    except Exception as error:  # safetensors' own exceptions derive from Exception alone
        if type(error).__module__.partition(".")[0] not in ("safetensors", "safetensors_rust", "_pickle", "pickle"):
            raise
        raise InputError(_reason(name, part, error)) from error


def _reason(name: str, part: str, error: BaseException) -> str:
    if os.path.isdir(name):
        return f"cannot load the {part} of model {name!r}: {first_line(error)}; save or download it again"
    chain = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for kind, cause in (
        (GatedRepoError, "it is gated: ask for access on its page, then pass --token"),
        (RevisionNotFoundError, "there is no such revision; check --model_revision"),
        (RepositoryNotFoundError, "the Hub has no such model, or it is private (pass --token)"),
        (HFValidationError, "this is not a Hub id"),
    ):
        if any(isinstance(one, kind) for one in chain):
            return f"cannot load model {name!r}: {cause}"
    return (
        f"cannot load the {part} of model {name!r}: there is no such local folder, and it could not be "
        f"downloaded from the Hub (no network, offline mode, or no such model); pass a local folder. "
        f"The library reports: {first_line(error)}"
    )
