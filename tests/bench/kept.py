"""The results of a script: one JSON file with the newest of each case, and the blocks of a page."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.record import commit, fill, machine

Table = Callable[[Any], str]
"""The text of a block, from the results of its case."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The cases of the script `name`, with the table of each.

    `json` keeps them, cases that are not measured included. The block of a case in `page` has its
    name. Either may be None.
    """

    name: str
    tables: Mapping[str, Table]
    json: Path | None = None
    page: Path | None = None

    def add(self, case: str, results: Any) -> str:
        """Keep the results of a case, fill its block, and return its table."""
        measured = {
            "machine": machine(),
            "commit": commit(),
            "command": shlex.join(["python", f"tests/bench/{self.name}.py", *sys.argv[1:]]),
            "results": results,
        }
        document = self.read()
        document[case] = measured
        if self.json:
            self.json.write_text(json.dumps({"cases": document}, indent=1) + "\n")
        if self.page:
            text = fill(self.page.read_text(), case, self.block(case, measured))
            self.page.write_text(text)
        return self.tables[case](results)

    def render(self) -> None:
        """Fill the blocks of all kept cases of this script again."""
        assert self.page
        text = self.page.read_text()
        for case, measured in self.read().items():
            if case in self.tables:
                text = fill(text, case, self.block(case, measured))
        self.page.write_text(text)

    def read(self) -> dict[str, Any]:
        """Return the kept cases by name, also those of another script."""
        if self.json is None or not self.json.exists():
            return {}
        found: dict[str, Any] = json.loads(self.json.read_text())["cases"]
        return found

    def block(self, case: str, measured: Mapping[str, Any]) -> str:
        """Return the text of a block: the table, the machine and the command."""
        table = self.tables[case](measured["results"])
        return f"{table}\n\n{measured['machine']}: `{measured['command']}`"
