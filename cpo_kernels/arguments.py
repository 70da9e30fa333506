"""The argument parser of every command: shared options, and hints for mistyped names. It imports only the standard
library, so help and usage errors appear at once."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """`--help` shows the description as it is written; every command takes -q, -v and --traceback."""

    def __init__(self, prog: str, description: str, **options: Any):
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        shared = self.add_argument_group("output")
        shared.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
        shared.add_argument("-v", "--verbose", action="store_true", help="also show warnings of other packages")
        shared.add_argument("--traceback", action="store_true", help="show the traceback of an error")

    def names(self) -> list[str]:
        """All option strings and choices."""
        options = [option for action in self._actions for option in action.option_strings]
        return options + [str(choice) for action in self._actions for choice in action.choices or ()]

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"(?:unrecognized arguments:|invalid choice:) '?([^'\s=]+)", message)
        near = difflib.get_close_matches(wrong[1], self.names(), n=1) if wrong else []
        super().error(message + (f"; did you mean {near[0]}?" if near else ""))
