"""`python -m equissl.data COMMAND …`, which `equihpc data COMMAND …` calls: building, checking and looking at data sets.

Each command is a module of this package with `DESCRIPTION`, `add_arguments(parser)` and `command(arguments) -> exit code`.
Exit codes: 0 done; 2 bad input, one message; 1 anything else.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys

COMMANDS = ("build", "check", "fake", "index", "info", "sample", "stage", "verify")


def main(words: list[str]) -> int:
    name = next((word for word in words if word in COMMANDS), None)
    parser = argparse.ArgumentParser(prog="equihpc data", description="Data sets as WebDataset shards.")
    commands = parser.add_subparsers(dest="command", metavar="|".join(COMMANDS), required=True)
    module = None
    for each in COMMANDS:  # only the one that is called is imported: `info` needs no torch
        if each == name:
            module = importlib.import_module(f"equissl.data.{each}")
            module.add_arguments(commands.add_parser(each, help=module.DESCRIPTION, description=module.DESCRIPTION))
        else:
            commands.add_parser(each, add_help=False)
    arguments = parser.parse_args(words)
    assert module is not None
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        code: int = module.command(arguments)
        return code
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        print(f"equihpc: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"equihpc: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(sys.argv[1:]))
