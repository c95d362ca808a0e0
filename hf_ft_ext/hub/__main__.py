"""`hf-ft-ext push`: push a finished run to the Hub."""

import argparse
import logging
import sys
from pathlib import Path

from hf_ft_ext.errors import InputError, PushError


def main(argv: list[str] | None = None) -> int:
    """Push a run; return 0, 2 if there is nothing to push, or 3 if the Hub refused or failed."""
    parser = argparse.ArgumentParser(
        prog="hf-ft-ext push",
        description="Push a finished run to the Hub, with a model card written from its record.",
    )
    parser.add_argument("folder", type=Path, help="the run's output_dir")
    parser.add_argument("--hub_model_id", help="owner/name or name (default: the folder's name)")
    parser.add_argument("--hub_token", help="access token (default: the one of `hf auth login`)")
    parser.add_argument("--hub_revision", help="branch, created if it does not exist (default: main)")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--keep_readme", action="store_true", help="push README.md as it is in the folder")
    parser.add_argument(
        "--include",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="also push these files of the folder, such as *.png",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_ft_ext.hub").setLevel(logging.INFO)
    try:
        from hf_ft_ext.hub.push import push_run

        address = push_run(
            args.folder,
            args.hub_model_id or args.folder.resolve().name,
            token=args.hub_token,
            revision=args.hub_revision,
            private=args.private,
            write_card=not args.keep_readme,
            include=args.include,
        )
    except (InputError, PushError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, InputError) else 3
    print(f"pushed: {address}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
