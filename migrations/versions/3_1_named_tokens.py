"""Named tokens with scopes of their own, lifetimes that use extends, and the last use of a token.

This is a new generation: an earlier release on the same database would give a named token all scopes of its user.
"""

import sqlalchemy as sa
from alembic import op

revision = "3.1"
down_revision = "2.1"

NAMED = sa.text("name IS NOT NULL")


def upgrade() -> None:
    """Add the columns and an index of names. Tokens that exist are logins with a fixed lifetime: they stay empty."""
    op.add_column("tokens", sa.Column("name", sa.String))
    op.add_column("tokens", sa.Column("scopes", sa.String))
    op.add_column("tokens", sa.Column("max_expires_at", sa.BigInteger))
    op.add_column("tokens", sa.Column("used_at", sa.Float))
    op.drop_index("tokens_by_user", "tokens")
    op.create_index("tokens_by_user", "tokens", ["username", "number", "expires_at", "name"])
    op.create_index("tokens_by_name", "tokens", ["username", "name"], sqlite_where=NAMED, postgresql_where=NAMED)


def downgrade() -> None:
    """Drop the columns. Tokens with scopes of their own are deleted: each would have all scopes of its user."""
    op.execute("DELETE FROM tokens WHERE name IS NOT NULL OR scopes IS NOT NULL")
    op.drop_index("tokens_by_name", "tokens")
    op.drop_index("tokens_by_user", "tokens")
    op.create_index("tokens_by_user", "tokens", ["username", "number", "expires_at"])
    for column in ("name", "scopes", "max_expires_at", "used_at"):
        op.drop_column("tokens", column)
