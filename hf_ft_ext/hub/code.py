"""Write the Python code of a model card: the line that loads a run's result, changed to load it from the Hub."""

import ast
import json
from types import ModuleType
from typing import Any

import peft
import transformers
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

import hf_ft_ext
from hf_ft_ext.hub.files import ADAPTER_CONFIG
from hf_ft_ext.training.sharing import FinishedRun
from hf_ft_ext.training.sharing.privacy import is_foreign_path, last_part, without_paths

_LIBRARIES: tuple[ModuleType, ...] = (transformers, peft, hf_ft_ext)  # that the names in such a line are imported from


def loading_snippet(run: FinishedRun, trainer: type | None, record: dict[str, Any]) -> str:
    """Return Python code that loads the result from the Hub; the last line is a comment if code cannot do it alone.

    Args:
        trainer: trainer class of the method, which may provide the code itself (`loading_code`).
        record: the unchanged content of `run.json`, so that its folder is found in its loading line.
    """
    if trainer is not None and hasattr(trainer, "loading_code"):
        return trainer.loading_code(run)
    folder = record.get("output_dir") or str(run.folder)
    line = record.get("load") or f"AutoModelForSequenceClassification.from_pretrained({folder!r})"
    libraries = _libraries(line)
    if libraries is None:  # not a single expression
        from_hub = without_paths(line.replace(folder, "{folder}"))
        return _snippet(["from huggingface_hub import snapshot_download"], run, [f"# {from_hub}"], download=True)
    download = bool(libraries["hf_ft_ext"])  # our classes load from folders only
    code = ast.unparse(_FromHub(folder, run, download).visit(ast.parse(line, mode="eval")))
    own_adapter = run.has(ADAPTER_CONFIG) and not download and not _is_peft_adapter(run)
    lines = [f"model = {code}"]
    if not download:
        libraries["transformers"].add("AutoTokenizer")
        own_code = ", trust_remote_code=True" if _has_own_tokenizer(run) else ""
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({run.repo_id!r}{own_code})")
    imports = [f"from {library} import {', '.join(sorted(names))}" for library, names in libraries.items() if names]
    if own_adapter:
        imports.append("import hf_ft_ext  # registers this kind of adapter with peft")
    if download:
        imports.append("from huggingface_hub import snapshot_download")
    return _snippet(imports, run, lines, download)


def _snippet(imports: list[str], run: FinishedRun, code: list[str], download: bool = False) -> str:
    first = [f"folder = snapshot_download({run.repo_id!r})"] if download else []
    order = sorted(imports, key=lambda line: (line.startswith("from"), line))
    return "\n".join([*order, "", *first, *code])


def _libraries(line: str) -> dict[str, set[str]] | None:
    """The names in an expression, by library; `None` if it is not an expression or has a name of another library."""
    try:
        tree = ast.parse(line, mode="eval")
    except SyntaxError:
        return None
    found: dict[str, set[str]] = {library.__name__: set() for library in _LIBRARIES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            library = next((library for library in _LIBRARIES if hasattr(library, node.id)), None)
            if library is None:
                return None
            found[library.__name__].add(node.id)
    return found


class _FromHub(ast.NodeTransformer):
    """Replaces the run's folder by the repository, and a local base model by the one on the Hub."""

    def __init__(self, folder: str, run: FinishedRun, download: bool):
        self.folder, self.run, self.download = folder, run, download

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if node.value == self.folder:
            return ast.Name("folder", ast.Load()) if self.download else ast.Constant(self.run.repo_id)
        if isinstance(node.value, str) and is_foreign_path(node.value):
            return ast.Constant(self.run.base or last_part(node.value))
        return node


def _has_own_tokenizer(run: FinishedRun) -> bool:
    path = run.folder / TOKENIZER_CONFIG_FILE
    return path.is_file() and "auto_map" in json.loads(path.read_text(encoding="utf-8"))


def _is_peft_adapter(run: FinishedRun) -> bool:
    config = json.loads((run.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return config.get("peft_type") in {kind.value for kind in peft.PeftType}
