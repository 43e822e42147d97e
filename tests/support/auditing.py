"""Reading audit logs."""

import json
from pathlib import Path
from typing import Any

from tests.support.journal import until
from tests.support.servers import whole_lines


def read_audit(path: Path) -> list[dict[str, Any]]:
    """Return the records of one file. It need not exist."""
    return [json.loads(line) for line in whole_lines(path)] if path.exists() else []


def wait_for(path: Path, count: int = 1, **fields: object) -> list[dict[str, Any]]:
    """Wait for that many records with these fields, and return them."""

    def found() -> list[dict[str, Any]]:
        return [record for record in read_audit(path) if fields.items() <= record.items()]

    until(lambda: len(found()) >= count, f"{count} records with {fields}")
    return found()
