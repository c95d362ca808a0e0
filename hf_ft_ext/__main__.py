"""The console script `hf-ft-ext`, also `python -m hf_ft_ext`: train, compare, report, recipes, push."""

import sys

from hf_ft_ext.errors import did_you_mean

_COMMANDS = {
    "train": "fine-tune a model with one of the methods (what run_glue.py does)",
    "compare": "run several methods, each in a process of its own, and report on them side by side",
    "report": "write the report of runs that are there already",
    "recipes": "list, filter and print recipes: the experiments of the papers, by name",
    "push": "push a finished run to the Hub, with its model card",
}
_USAGE = "\n".join(
    (
        "usage: hf-ft-ext COMMAND [--argument value ...]",
        "",
        "commands:",
        *(f"  {name:<8}  {text}" for name, text in _COMMANDS.items()),
        "",
        "`hf-ft-ext COMMAND --help` lists the arguments of a command.",
        "",
    )
)


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first word of `argv` names; return the exit status (2 = no such command)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0
    name, rest = argv[0], argv[1:]
    if name == "train":
        from hf_ft_ext.launch.run import command

        command(rest, program=("hf-ft-ext", "train"))  # ends the process
    if name == "compare":
        from hf_ft_ext.compare.__main__ import main as run
    elif name == "report":
        from hf_ft_ext.report.__main__ import main as run
    elif name == "recipes":
        from hf_ft_ext.recipes.__main__ import main as run
    elif name == "push":
        from hf_ft_ext.hub.__main__ import main as run
    else:
        sys.stderr.write(
            f"error: unknown command {name!r}{did_you_mean(name, _COMMANDS)}; the commands are: "
            f"{', '.join(_COMMANDS)}\n"
        )
        return 2
    return run(rest)


if __name__ == "__main__":
    sys.exit(main())
