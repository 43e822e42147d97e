"""Alembic runs this file: for tokenauth on a connection of tokenauth, or for the command `alembic` of a developer."""

from alembic import context
from sqlalchemy import Connection, create_engine

from tokenauth.stores.tables import metadata


def run(connection: Connection) -> None:
    """Run the migrations on a connection."""
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with create_engine(context.get_x_argument(as_dictionary=True).get("url", "sqlite:///tokenauth.db")).begin() as own:
        run(own)
