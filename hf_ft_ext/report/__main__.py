"""The command line of the report."""

import argparse
import sys
from pathlib import Path

from hf_ft_ext.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """Write a report of run folders; return 0, or 2 if there is nothing to report."""
    parser = argparse.ArgumentParser(
        prog="hf-ft-ext report",
        description="Write report.html, report.md and pictures of quality against memory and time from run folders.",
    )
    parser.add_argument(
        "paths", nargs="+", help="run folders (runs/*), folders of run folders, or a comparison's folder"
    )
    parser.add_argument("--output_dir", type=Path, help="folder of the report (default: the single path, or reports)")
    parser.add_argument("--title", help="heading of the page")
    args = parser.parse_args(argv)
    output_dir = args.output_dir or (Path(args.paths[0]) if len(args.paths) == 1 else Path("reports"))
    try:
        from hf_ft_ext.report.build import write_report

        print(write_report(args.paths, output_dir, args.title).summary())
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        sys.stderr.write('error: the pictures need matplotlib: pip install "hf_ft_ext[pictures]"\n')
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
