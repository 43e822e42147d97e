"""Tokens, the log of their revocations, failed logins, and marks (instants by name)."""

import sqlalchemy as sa
from alembic import op

revision = "1.1"
down_revision = None


MICROSECOND = sa.text("(extract(epoch FROM clock_timestamp()) * 1000000)::bigint")


def upgrade() -> None:
    """Create the first schema."""
    postgres = op.get_context().dialect.name == "postgresql"
    number = (
        sa.Column("number", sa.BigInteger, nullable=False, server_default=MICROSECOND)
        if postgres
        else sa.Column("number", sa.Integer, primary_key=True)
    )
    op.create_table(
        "tokens",
        number,
        sa.Column("digest", sa.LargeBinary(32), primary_key=postgres, nullable=False),
        sa.Column("username", sa.String, nullable=False),
        sa.Column("credential", sa.String, nullable=False),
        sa.Column("issued_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("address", sa.String, nullable=False),
        sa.Column("user_agent", sa.String, nullable=False),
    )
    if not postgres:
        op.create_index("tokens_by_digest", "tokens", ["digest"], unique=True)
    op.create_index("tokens_by_user", "tokens", ["username", "number", "expires_at"])
    op.create_index("tokens_by_expiry", "tokens", ["expires_at"])
    op.create_table(
        "revocations",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "failures",
        sa.Column("key", sa.LargeBinary(16), primary_key=True),
        sa.Column("count", sa.Integer, nullable=False),
        sa.Column("last_at", sa.Float, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("failures_by_age", "failures", ["last_at"])
    op.create_table(
        "marks",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    """Drop all tables."""
    for table in ("tokens", "revocations", "failures", "marks"):
        op.drop_table(table)
