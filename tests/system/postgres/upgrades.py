"""Simulated newer releases with more migrations."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from alembic.config import Config

from tokenauth.stores import schema

_STEP = '''"""A step of a newer release."""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = "{before}"


def upgrade() -> None:
    """Change the schema."""
    {changes}
'''

COLUMNS = (
    'op.add_column("tokens", sa.Column("device", sa.String))',
    'op.add_column("pool_tokens", sa.Column("note", sa.String))',
)
"""Changes that later steps of a generation may make."""


_GENERATION, _NUMBER = map(int, schema.HEAD.split("."))

NEXT_STEPS = [f"{_GENERATION}.{_NUMBER + more}" for more in range(1, 6)]
"""Revisions that this release is compatible with."""

NEXT_STEP = NEXT_STEPS[0]

NEXT_GENERATION = f"{_GENERATION + 1}.1"
"""A revision that this release is not compatible with."""


@contextmanager
def newer_release(directory: Path, revision: str, *changes: str) -> Iterator[None]:
    """Make this process a newer release, with one more migration."""
    migrations = directory / f"migrations_{revision}"
    shutil.copytree(str(schema.migrations().get_main_option("script_location")), migrations)
    step = _STEP.format(revision=revision, before=schema.HEAD, changes="\n    ".join(changes))
    (migrations / "versions" / f"{revision}.py").write_text(step)

    def settings() -> Config:
        made = Config()
        made.set_main_option("script_location", str(migrations))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "HEAD", revision)
        patch.setattr(schema, "migrations", settings)
        yield
