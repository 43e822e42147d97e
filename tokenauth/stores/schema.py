"""The version of a database's schema, and its upgrade."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

from tokenauth.errors import StartError
from tokenauth.logs import log
from tokenauth.stores.tables import metadata

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "4.1"
"""The revision that this release needs; the newest in `migrations/versions`.

It is GENERATION.STEP. Releases of one generation can share a database: a step only adds what earlier releases can
ignore. A change that they could not work with starts a new generation.
"""


COPYING = "copying"
"""The revision of an unfinished copy of another database, with which no release works."""

COPY_STATE = "copy_state"
"""The table of an unfinished copy that has the name of its source, and the definitions of indexes to be built."""

CREATE_COPY_STATE = f"CREATE TABLE IF NOT EXISTS {COPY_STATE} (kind VARCHAR NOT NULL, content VARCHAR NOT NULL)"

UNFINISHED_COPY = "an unfinished copy of another database"

FINISH_COPY = "run the same `tokenauth copy` again to finish it, or use another database"


def serves(version: str | None) -> bool:
    """Return whether this release works with a revision: its own, or a later one of its generation."""
    if version is None:
        return False
    (generation, _, step), (own, _, needed) = version.partition("."), HEAD.partition(".")
    return generation == own and step.isdecimal() and int(step) >= int(needed)


def is_newer(version: str) -> bool:
    """Return whether a revision is of a later generation than this release."""
    generation = version.partition(".")[0]
    return generation.isdecimal() and int(generation) > int(HEAD.partition(".")[0])


def is_older(version: str) -> bool:
    """Return whether this release can upgrade a revision."""
    generation, _, step = version.partition(".")
    own, _, needed = HEAD.partition(".")
    return generation.isdecimal() and step.isdecimal() and (int(generation), int(step)) < (int(own), int(needed))


def starts_generation(had: str) -> bool:
    """Return whether an upgrade from a revision starts a new generation."""
    return had.partition(".")[0] != HEAD.partition(".")[0]


STOP_FIRST = "Stop all servers of an older generation first."


def log_upgrade(had: str | None, name: str) -> None:
    """Log that the schema of a database was upgraded from a revision, or that its tables were made.

    Servers of an older generation do not look at the revision again while they run, and would misread what is new: they
    would lease tokens past clients that wait. Who else uses a database cannot be seen reliably, so this is always said.
    """
    if had is None:
        log.info("database_created", database=name, schema=HEAD)
    elif starts_generation(had):
        log.warning("schema_upgraded", before=had, after=HEAD, action="stop all servers of the older release")
    else:
        log.info("schema_upgraded", before=had, after=HEAD)


def version(db: Connection) -> str | None:
    """Return the revision that the database has; None if it is empty."""
    if not inspect(db).has_table("alembic_version"):
        return None
    return db.execute(text("SELECT version_num FROM alembic_version")).scalar()


def other_tables(found: Iterable[tuple[str, bool]], version: str | None) -> list[str]:
    """Return those of the tables in a database with a revision, or with none, that are of another program.

    Each comes with whether it is a view: beside tokenauth's tables, views are of an operator who looks at these.
    """
    if version is None:
        return sorted(name for name, _ in found)
    own = {"alembic_version", COPY_STATE, *metadata.tables}
    return sorted(name for name, is_view in found if not is_view and name not in own)


def taken_names(others: Iterable[str]) -> str:
    """Return the names, of tables of another program, that tokenauth's tables have, too; empty if there are none."""
    return ", ".join(sorted(metadata.tables.keys() & others))


OWN_DATABASE = "use a database of its own"


def upgrade(db: Connection, name: str, copying: bool = False) -> str | None:
    """Bring the schema of a database up to date inside the caller's transaction; return the revision it had.

    The caller has a lock that excludes other upgrades. `copying`: if there are no tables, make those of an unfinished
    copy. Raises StartError if a newer release has upgraded it, or another
    program uses the names of its tables.
    """
    had = version(db)
    if serves(had):
        return had
    if had == COPYING:
        raise StartError(f"the database {name} is {UNFINISHED_COPY}: {FINISH_COPY}")
    if had is None and (taken := taken_names([*inspect(db).get_table_names(), *inspect(db).get_view_names()])):
        raise StartError(f"the database {name} has tables of another program, {taken}: {OWN_DATABASE}")
    from alembic import command  # only an upgrade needs it, and it costs every start 100 ms

    settings = migrations()
    if had is not None and had not in _revisions(settings):
        raise StartError(
            f"the database {name} has schema {had}, which this release does not know (it needs {HEAD}):"
            " a newer tokenauth has used it; install that release, or restore an older backup"
        )
    settings.attributes["connection"] = db
    command.upgrade(settings, "head")
    if had is None and copying:
        db.execute(text(CREATE_COPY_STATE))
        db.execute(text("UPDATE alembic_version SET version_num = :copying"), {"copying": COPYING})
    return had


def migrations() -> "Config":
    """Return Alembic's settings, with the migrations of the wheel or of the checkout."""
    from alembic.config import Config

    package = Path(__file__).parents[1]
    installed = package / "migrations"
    settings = Config()
    settings.set_main_option("script_location", str(installed if installed.is_dir() else package.parent / "migrations"))
    return settings


def _revisions(settings: "Config") -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(settings).walk_revisions()}
