"""The version of the schema: what a database has, and how it is brought up to what this release needs."""

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

from tokenauth.errors import StartError

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "2.1"
"""The revision that this release needs; the newest in `migrations/versions`.

It is GENERATION.STEP. A step only adds what earlier releases of its generation need not know, and they go on
serving beside it; what they could not bear begins a new generation.
"""


def serves(version: str | None) -> bool:
    """Say whether this release can serve with a revision: its own, or a later one of its generation."""
    if version is None:
        return False
    (generation, _, step), (own, _, needed) = version.partition("."), HEAD.partition(".")
    return generation == own and step.isdecimal() and int(step) >= int(needed)


def version(db: Connection) -> str | None:
    """Say which revision the database has; None when it is empty."""
    if not inspect(db).has_table("alembic_version"):
        return None
    return db.execute(text("SELECT version_num FROM alembic_version")).scalar()


def upgrade(db: Connection) -> str | None:
    """Bring the schema up to date inside the caller's transaction; the answer is the revision it had.

    The caller holds a lock that no other upgrade can hold. Raises StartError when a newer release has been here.
    """
    had = version(db)
    if serves(had):
        return had
    from alembic import command  # only an upgrade needs it, and it costs every start 100 ms

    settings = migrations()
    if had is not None and had not in _revisions(settings):
        raise StartError(
            f"the database has schema {had}, which this release does not know (it needs {HEAD}):"
            " a newer tokenauth has used it; install that release, or restore an older backup"
        )
    settings.attributes["connection"] = db
    command.upgrade(settings, "head")
    return had


def migrations() -> "Config":
    """Alembic's settings, with the migrations where the wheel or the checkout has them."""
    from alembic.config import Config

    package = Path(__file__).parents[1]
    installed = package / "migrations"
    settings = Config()
    settings.set_main_option("script_location", str(installed if installed.is_dir() else package.parent / "migrations"))
    return settings


def _revisions(settings: "Config") -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(settings).walk_revisions()}
