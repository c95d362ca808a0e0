"""The scripts of examples/ as notebooks, for those who read and run them cell by cell.

    python docs/notebooks.py              # writes examples/*.ipynb, without outputs
    python docs/notebooks.py --execute    # runs them in folders of their own; nothing is written

A notebook has the script's docstring as text, then its imports, each function, and a call of `main`. jupytext writes
them, nbclient runs them: `pip install "hf_ft_ext[notebooks]"`, or `make notebooks`.
"""

import argparse
import ast
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "examples"
_GUARD = 'if __name__ == "__main__":\n    main()\n'
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cells(script: Path) -> list[tuple[str, str]]:
    """The cells of a script: pairs of `markdown` or `code` and the text.

    Raises:
        ValueError: the script does not start with a docstring or does not end with a call of `main`.
    """
    text = script.read_text(encoding="utf-8")
    tree = ast.parse(text)
    about = ast.get_docstring(tree)
    if about is None or not text.endswith(_GUARD):
        raise ValueError(
            f"{script.name} needs a docstring at its top, and {_GUARD!r} at its end"
        )
    lines = text.splitlines()
    definitions = [
        node
        for node in tree.body[1:]
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    starts = [tree.body[0].end_lineno]
    starts += [
        min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        for node in definitions
    ]
    ends = [*starts[1:], text.count("\n") - _GUARD.count("\n")]
    title, _, rest = about.partition("\n")
    found = [("markdown", f"# {title}\n{rest}".strip())]
    found += [
        ("code", "\n".join(lines[start:end]).strip())
        for start, end in zip(starts, ends, strict=True)
    ]
    return [
        *found,
        ("code", "main([])  # the arguments of the command line, such as --output_dir"),
    ]


def notebook(script: Path) -> str:
    """A script as the text of a notebook."""
    import jupytext

    parts = []
    for kind, text in cells(script):
        if kind == "markdown":
            parts.append(
                "# %% [markdown]\n"
                + "\n".join(f"# {line}".rstrip() for line in text.splitlines())
            )
        else:
            parts.append(f"# %%\n{text}")
    made = jupytext.reads("\n\n".join(parts) + "\n", fmt="py:percent")
    made.metadata.clear()
    made.metadata.update(_METADATA)
    made.nbformat, made.nbformat_minor = 4, 5
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # as a rule they are random
        cell.metadata.clear()
    return jupytext.writes(made, fmt="ipynb").rstrip("\n") + "\n"


def execute(path: Path) -> float:
    """Run a notebook in an empty folder; the seconds that it took. An error in a cell is raised."""
    import nbformat
    from nbclient import NotebookClient

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        loaded = nbformat.read(path, as_version=4)
        NotebookClient(
            loaded, timeout=1200, resources={"metadata": {"path": folder}}
        ).execute()
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--execute",
        action="store_true",
        help="run the notebooks in place of writing them",
    )
    parser.add_argument("names", nargs="*", help="scripts, without ending; none = all")
    args = parser.parse_args()
    known = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
    if unknown := set(args.names) - set(known):
        sys.exit(
            f"no script {sorted(unknown)[0]!r} in examples; there are {', '.join(known)}"
        )
    for name in args.names or known:
        path = known[name].with_suffix(".ipynb")
        if args.execute:
            print(f"{path.name}: {execute(path):.0f} s", flush=True)
        else:
            path.write_text(notebook(known[name]), encoding="utf-8")


if __name__ == "__main__":
    main()
