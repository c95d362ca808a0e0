"""Record runs of the launcher, and list in docs/walks.md the functions that a value passes through.

    python docs/walks.py    # runs each method on a tiny model, then writes the page

walks.yaml says what is run and followed, and why each file takes part. The functions come from the runs, so the
page changes with the code.
"""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
PAGE = FOLDER / "walks.md"
START, END = "<!-- walks -->\n", "<!-- end of walks -->\n"
_PACKAGE = f"{ROOT / 'hf_ft_ext'}{os.sep}"
# Called by imports, which happen once in a process: they would differ from run to run.
_LEFT_OUT = ("moved.py",)
# The learning rate of the runs in walks.yaml; no other number equals it.
RATE = 0.00123


@dataclass(frozen=True)
class Function:
    """A function of the package: its file, relative to the package, and its qualified name."""

    file: str
    name: str

    @classmethod
    def of(cls, code: CodeType) -> "Function | None":
        """The function of a code object; `None` for libraries, comprehensions, and bodies of modules and classes."""
        path, named = code.co_filename, not code.co_name.startswith("<")
        if not (path.startswith(_PACKAGE) and named and code.co_flags & CO_OPTIMIZED):
            return None
        file = path.removeprefix(_PACKAGE).replace(os.sep, "/")
        return None if file in _LEFT_OUT else cls(file, code.co_qualname)

    def __str__(self) -> str:
        return f"{self.file} {self.name}"


@dataclass
class Call:
    """A call: the function, the calls that were running, and whether it held or read the value that is followed."""

    function: Function
    callers: "tuple[Call, ...]"
    met: bool = False


@contextlib.contextmanager
def recorded(name: str, value: float) -> Iterator[list[Call]]:
    """Record calls of functions of the package.

    Args:
        name: an attribute, such as `learning_rate`; functions that read it meet the value.
        value: functions that have it among their variables, or in a list or dict, meet it.
    """
    calls: list[Call] = []
    running: list[Call] = []
    before = sys.gettrace()

    def on_call(frame: FrameType, event: str, _: Any) -> Callable | None:
        function = Function.of(frame.f_code)
        if function is None:
            return None
        frame.f_trace_lines = False
        running.append(Call(function, tuple(running)))
        calls.append(running[-1])
        return on_return

    def on_return(frame: FrameType, event: str, result: Any) -> None:
        if event == "return":
            call = running.pop()
            call.met = (
                name in frame.f_code.co_names
                or _holds(result, value)
                or any(_holds(variable, value) for variable in frame.f_locals.values())
            )

    sys.settrace(on_call)
    try:
        yield calls
    finally:
        sys.settrace(before)


def _holds(variable: Any, value: float) -> bool:
    if isinstance(variable, dict):
        parts = variable.values()
    else:
        parts = variable if isinstance(variable, list | tuple) else [variable]
    return any(type(part) is float and part == value for part in parts)


def run(words: str) -> list[Call]:
    """Run the launcher with `words` on a tiny model and small files, and record it."""
    from tiny import text_dataset, tiny_model, tiny_tokenizer, write_texts

    import run_glue

    _forget_results()
    options = words.split()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        tiny_model().save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
        write_texts("train.csv", 8)
        text_dataset(4).select_columns(["sentence"]).to_csv("test.csv")
        with (
            contextlib.redirect_stdout(io.StringIO()),
            recorded("learning_rate", RATE) as calls,
        ):
            status = run_glue.main(options)
    if status != 0:
        raise SystemExit(f"the run ended with status {status}: {words}")
    return calls


def _forget_results() -> None:
    """Empty the caches of the package's functions, so that a run in the same process calls them again."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "hf_ft_ext":
            for function in vars(module).values():
                getattr(function, "cache_clear", bool)()


def calls_of(calls: list[Call], walk: dict[str, Any]) -> list[Call]:
    """The recorded calls that belong to a walk.

    They are those that met the value, or, if the walk lists functions under `inside`, these, their callers and what
    ran inside of them. What ran inside of functions under `without` is left out.
    """
    if "inside" not in walk:
        return [call for call in calls if call.met]
    inside, without = set(walk["inside"]), set(walk.get("without", ()))
    found: list[Call] = []
    for call in calls:
        lineage = (*call.callers, call)
        names = {str(each.function) for each in lineage}
        if names & inside and not names & without:
            found += lineage
    return found


def calls_back(call: Call) -> bool:
    """Whether the call came from another file while a function of its own file was waiting for that file."""
    files = [caller.function.file for caller in call.callers]
    own = call.function.file
    return own in files and files[-1] != own


def listing(calls: list[Call], reasons: dict[str, str]) -> str:
    """The walk as a numbered list: each file in the order of first calls, why it takes part, and its functions."""
    back = {call.function for call in calls if calls_back(call)}
    by_file: dict[str, dict[str, None]] = {}
    for call in calls:
        name = f"`{call.function.name.rpartition('<locals>.')[2]}`"
        mark = " (called back)" if call.function in back else ""
        by_file.setdefault(call.function.file, {})[name + mark] = None
    return "".join(
        f"{number}. `{file}`: {reasons[file]}<br>{', '.join(functions)}\n"
        for number, (file, functions) in enumerate(by_file.items(), 1)
    )


def read() -> dict[str, Any]:
    """The content of walks.yaml: `runs` by name, and `walks`."""
    return yaml.safe_load((FOLDER / "walks.yaml").read_text(encoding="utf-8"))


def written(record: Callable[[str], list[Call]] = run) -> str:
    """The generated part of the page.

    Raises:
        ValueError: walks.yaml lacks the reason of a file that takes part, or has that of a file that does not.
    """
    plan = read()
    recorded = {name: record(words) for name, words in plan["runs"].items()}
    rows, parts, seen = [], [], set()
    for walk in plan["walks"]:
        calls = calls_of(recorded[walk["run"]], walk)
        functions = {call.function for call in calls}
        files = {function.file for function in functions}
        back = {call.function for call in calls if calls_back(call)}
        numbers = " | ".join(str(len(found)) for found in (files, functions, back))
        rows.append(f"| {walk['title']} | {numbers} |\n")
        own = walk.get("files", {})
        reasons = {**plan["files"], **own}
        if missing := files - reasons.keys():
            raise ValueError(
                f"{walk['title']}: walks.yaml does not say why {sorted(missing)} take part"
            )
        text = listing(calls, reasons)
        parts.append(f"\n## {walk['title']}\n\n{walk['about']}\n\n{text}")
        if idle := own.keys() - files:
            raise ValueError(
                f"{walk['title']}: remove {sorted(idle)} from walks.yaml, which take no part"
            )
        seen |= files - own.keys()
    if idle := plan["files"].keys() - seen:
        raise ValueError(
            f"remove {sorted(idle)} from walks.yaml, which take part in no walk"
        )
    head = "| walk | files | functions | called back |\n| --- | --- | --- | --- |\n"
    return head + "".join(rows) + "".join(parts)


def rewritten(page: str, part: str) -> str:
    """The page with its generated part replaced."""
    before, _, rest = page.partition(START)
    return f"{before}{START}{part}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    PAGE.write_text(
        rewritten(PAGE.read_text(encoding="utf-8"), written()), encoding="utf-8"
    )
