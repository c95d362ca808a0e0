"""Write the tables of arguments and of public names on these pages anew, from the code: python docs/argument_tables.py

A table stands between `<!-- arguments: NAME -->` and `<!-- end of arguments -->`, where NAME is a method; `run`,
`model`, `data`, `language` or `few_shot`; the class of an adapter's configuration; or `names`, for what `hf_ft_ext`
exports.
"""

import inspect
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path

from peft import PeftConfig

import hf_ft_ext
from hf_ft_ext.arguments import (
    DataArguments,
    FewShotArguments,
    LanguageArguments,
    ModelArguments,
    RunArguments,
    own_fields,
)
from hf_ft_ext.methods import METHODS

FOLDER = Path(__file__).resolve().parent
_BLOCK = re.compile(
    r"(<!-- arguments: (\w+) -->\n)(.*?)(<!-- end of arguments -->)", flags=re.DOTALL
)


def fields_of(name: str) -> list[Field]:
    """The arguments of a method or of a group that all methods share."""
    if name == "data":
        shared = {
            field.name
            for group in (FewShotArguments, LanguageArguments)
            for field in own_fields(group)
        }
        return [
            field for field in own_fields(DataArguments) if field.name not in shared
        ]
    if (
        name in hf_ft_ext.__all__
    ):  # the fields of peft's own base class need no page of ours
        shared = {field.name for field in fields(PeftConfig)}
        config = getattr(hf_ft_ext, name)
        found = [field for field in fields(config) if field.name not in shared]
        own = list(config.__annotations__)
        return sorted(
            found,
            key=lambda field: own.index(field.name) if field.name in own else len(own),
        )
    groups = {
        "run": RunArguments,
        "model": ModelArguments,
        "few_shot": FewShotArguments,
    }
    groups["language"] = LanguageArguments
    return own_fields(
        groups[name] if name in groups else METHODS[name].arguments_class()
    )


def table(name: str) -> str:
    """The arguments as a Markdown table."""
    if name == "names":
        return _names()
    dashes = "" if name in hf_ft_ext.__all__ else "--"
    rows = [
        f"| `{dashes}{field.name}` | {_default(field)} | {_meaning(field)} |"
        for field in fields_of(name)
    ]
    return "\n".join(
        ["| argument | default | meaning |", "| --- | --- | --- |", *rows, ""]
    )


def _names() -> str:
    rows = []
    for name in hf_ft_ext.__all__:
        found = getattr(hf_ft_ext, name)
        first = (
            inspect.getdoc(found)
            .split("\n\n")[0]
            .replace("\n", " ")
            .replace("|", r"\|")
        )
        rows.append(
            f"| `{name}` | {'class' if inspect.isclass(found) else 'function'} | {first} |"
        )
    return "\n".join(["| name | | what it is |", "| --- | --- | --- |", *rows, ""])


def _default(field: Field) -> str:
    value = field.default if field.default is not MISSING else field.default_factory()
    value = getattr(value, "value", value)
    return (
        "none"
        if value is None or value == {}
        else f"`{str(value).lower() if isinstance(value, bool) else value}`"
    )


def _meaning(field: Field) -> str:
    text = field.metadata["help"]
    unnamed = [
        str(choice)
        for choice in field.metadata.get("choices", ())
        if str(choice) not in text
    ]
    if unnamed:
        text += " Choices: " + ", ".join(map(str, field.metadata["choices"])) + "."
    return text.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")


def rewritten(text: str) -> str:
    """A page with its tables made anew."""
    return _BLOCK.sub(lambda found: found[1] + table(found[2]) + found[4], text)


def tables_in(text: str) -> list[str]:
    """Names of the tables that a page has."""
    return [found[2] for found in _BLOCK.finditer(text)]


if __name__ == "__main__":
    for page in sorted(FOLDER.glob("*.md")):
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
