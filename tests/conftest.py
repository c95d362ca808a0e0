"""Settings and fixtures of the whole suite: offline, on the CPU, quiet, nothing left in the user's caches."""

import atexit
import collections
import functools
import gc
import itertools
import os
import shutil
import sys
import tempfile
import types
import uuid
from pathlib import Path

if "TMPDIR" not in os.environ and os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 4 * 2**30:
    os.environ["TMPDIR"] = "/dev/shm"  # in memory, where a file is made in a third of a disk's time
    tempfile.tempdir = None  # to be read anew
if "datasets" not in sys.modules:  # a cache of this process alone: `pytest -n` has several
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="hf_ft_ext-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run on the CPU, also where there is a GPU, but for those with the marker `gpu`:
# `pytest -m gpu`, without -n, runs them alone.
if ("-m", "gpu") not in itertools.pairwise(sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("WANDB_DISABLED", "true")

import pytest

# No library is imported at the top: with -n, a process that only hands out the tests reads this file too.


_TESTS = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--few", type=int, metavar="N", help="run N cases of each parametrized test, spread over all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of modules that start the launcher or a trainer, for `make test-fast`; skip what needs a GPU."""
    import torch

    torch.set_num_threads(1)
    marked = {module: _starts_runs(module) for module in {item.module for item in items}}
    for item in items:
        if marked[item.module]:
            item.add_marker("run")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and `pytest -m gpu` without -n"))
    few = config.getoption("few")
    if few:
        cases = collections.defaultdict(list)
        for item in items:
            cases[item.nodeid.partition("[")[0]].append(item)
        kept = {some[i * len(some) // few] for some in cases.values() for i in range(few)}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def _starts_runs(module) -> bool:
    """Whether a module of tests, or one of `tests` that it takes functions from, has the launcher or a trainer.

    Not `processes`: what runs in several is marked `slow`.
    """
    functions = (value for value in vars(module).values() if isinstance(value, types.FunctionType))
    helpers = {id(function.__globals__): function.__globals__ for function in functions}
    return any(
        _has_trainer(names)
        for names in (vars(module), *helpers.values())
        if Path(names.get("__file__") or "").is_relative_to(_TESTS) and names["__name__"] != "processes"
    )


def _has_trainer(names: dict) -> bool:
    from transformers import Trainer

    if "run_glue" in names or "METHODS" in names:
        return True
    return any(isinstance(value, type) and issubclass(value, Trainer) for value in names.values())


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Leave the garbage collector off while modules are imported: it finds nothing in some seconds of looking."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Hide the libraries from the garbage collector: every training run ends with a collection, of all objects.

    In between it looks seldom: nearly all objects of a tiny run are freed by their counts.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="session")
def _quick_training():
    """Memory is freed when Python sees fit: each training run begins with a garbage collection of its own."""
    from accelerate.utils import memory

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "gc", types.SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """Hide what earlier modules left, such as imports, from the garbage collector too."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _quick_disks():
    """Files are not forced to the disk: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _unhashed_datasets():
    """Data sets get random fingerprints: hashing a function and its tokenizer costs more than few rows do.

    They come from the system: forks of this process would draw the same ones from its own generator, and take each
    other's cached files.
    """
    names = (
        "fingerprint.update_fingerprint",
        "arrow_dataset.update_fingerprint",
        "arrow_dataset.generate_fingerprint",
    )
    with pytest.MonkeyPatch.context() as patched:
        for name in names:
            patched.setattr(f"datasets.{name}", lambda *_: uuid.uuid4().hex[:16])
        for name in ("fingerprint", "arrow_dataset"):  # what would be hashed
            patched.setattr(f"datasets.{name}.format_kwargs_for_fingerprint", lambda *_, **__: {})
        yield


@pytest.fixture(autouse=True, scope="session")
def _datasets_in_memory():
    """Changed rows stay in memory: a file, its lock and the search for older ones cost more than a few rows do."""
    from datasets import Dataset

    change = Dataset.map

    @functools.wraps(change)
    def changed(self, *args, **options):
        if not options.get("cache_file_name") and not options.get("num_proc"):
            options["keep_in_memory"] = True
        return change(self, *args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Dataset, "map", changed)
        yield


@pytest.fixture(autouse=True, scope="session")
def _quick_models():
    """No weights are drawn where there are none to fill.

    Models are loaded on the device `meta` first, on which torch traces each draw of an initial weight in Python.
    """
    import torch

    def only_real(fill):
        @functools.wraps(fill)
        def filled(tensor, *args, **options):
            return tensor if tensor.is_meta else fill(tensor, *args, **options)

        return filled

    with pytest.MonkeyPatch.context() as patched:
        for name in ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_"):
            patched.setattr(torch.nn.init, name, only_real(getattr(torch.nn.init, name)))
        yield


@pytest.fixture(autouse=True, scope="session")
def _quick_pictures():
    """Runs leave an empty file for the picture of their plan: drawing takes longer than a tiny model's training."""
    from hf_ft_ext.fisher import pictures

    draw = pictures.draw_plan
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pictures, "draw_plan", lambda plan, folder: Path(folder, pictures.PICTURE_FILE).touch())
        yield draw


@pytest.fixture(autouse=True, scope="session")
def _quick_devices():
    """Packages for other devices are looked for once, and no seed is kept, with its call stack, for absent devices."""
    import torch
    from accelerate.utils import imports

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(imports, "_is_package_available", functools.cache(imports._is_package_available))
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            if not kind.is_available():
                patched.setattr(kind, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _quick_cards():
    """Templates are compiled once, versions are read once: each save writes a model card with both."""
    from jinja2 import Environment

    known, compile_source = {}, Environment.compile

    def compiled(self, source, name=None, filename=None, raw=False, defer_init=False):
        key = self, source, name, filename, raw, defer_init
        if key not in known:
            known[key] = compile_source(self, source, name, filename, raw, defer_init)
        return known[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Environment, "compile", compiled)
        if cards := sys.modules.get("trl.trainer.utils"):
            patched.setattr(cards, "version", functools.cache(cards.version))
        yield


@pytest.fixture(autouse=True, scope="session")
def _quick_structures():
    """Models built alike have their structure found once: a traced forward pass takes longer than a tiny step.

    What it is found from is the key: classes, settings, and the kinds of the tensors. Tests of the search itself
    start from `fresh_structures`.
    """
    import torch

    from hf_ft_ext.structure import find

    known, search = {}, find.trace_structure

    def built_alike(model):
        tensors = itertools.chain(model.named_parameters(), model.named_buffers())
        kinds = ((name, type(value), value.shape, value.dtype, value.device) for name, value in tensors)
        modules = tuple((name, type(module)) for name, module in model.named_modules())
        config = getattr(model, "config", None)
        settings = str(config), getattr(config, "_attn_implementation", None), torch.get_default_dtype()
        return type(model), modules, settings, tuple(kinds)

    def found(model):
        key = built_alike(model)
        if key not in known:
            known[key] = search(model)
        return known[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(find, "trace_structure", found)
        yield search


@pytest.fixture
def fresh_structures(monkeypatch, _quick_structures):
    """The structure of every model is found anew, as a user's is."""
    monkeypatch.setattr("hf_ft_ext.structure.find.trace_structure", _quick_structures)


@pytest.fixture
def drawn_pictures(monkeypatch, _quick_pictures):
    """Pictures of plans are drawn, as a user's are."""
    monkeypatch.setattr("hf_ft_ext.fisher.pictures.draw_plan", _quick_pictures)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with real GLUE and few-shot data; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("HF_FT_EXT_DATA", default))
    if not (root / "glue").is_dir():
        pytest.skip(f"no real data at {root}; set HF_FT_EXT_DATA to a folder that holds glue/ and fewshot/")
    return root


@pytest.fixture(scope="session")
def tokenizer():
    from tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory, tokenizer) -> str:
    """A saved tiny BERT classifier with its tokenizer: what `--model_name_or_path` takes."""
    from tiny import one_layer_model

    folder = tmp_path_factory.mktemp("tiny-bert")
    one_layer_model("bert").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
