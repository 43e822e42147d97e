"""The waiting line of a pool; members with names and reservations; the start and the own time of a lease.

This is a new generation: an earlier release on the same database would lease tokens past those who wait.
"""

import sqlalchemy as sa
from alembic import op

revision = "4.1"
down_revision = "3.1"

WAITING, GRANTED = sa.text("granted_at IS NULL"), sa.text("granted_at IS NOT NULL")

TOKEN_COLUMNS = {
    "leased_at": sa.Float,
    "lease_ttl": sa.Float,
    "member": sa.String,
    "reservation": sa.String,
}


def upgrade() -> None:
    """Add the columns and the tables. Leases that run start, for `lease_max`, when they are next kept alive."""
    for name, kind in TOKEN_COLUMNS.items():
        op.add_column("pool_tokens", sa.Column(name, kind))
    postgres = op.get_context().dialect.name == "postgresql"
    number = (sa.BigInteger(), sa.Identity()) if postgres else (sa.Integer(),)
    op.create_table(
        "pool_requests",
        sa.Column("number", *number, primary_key=True),
        sa.Column("pool", sa.String, primary_key=postgres, nullable=False),
        sa.Column("username", sa.String, nullable=False),
        sa.Column("id", sa.String, nullable=False),
        sa.Column("holder", sa.String, nullable=False),
        sa.Column("count", sa.Integer, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("ttl", sa.Float),
        sa.Column("labels", sa.String, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
        sa.Column("turn", sa.Float, nullable=False),
        sa.Column("kept_until", sa.Float, nullable=False),
        sa.Column("granted_at", sa.Float),
        sa.Column("leases", sa.String),
        sa.Column("asks", sa.Integer, nullable=False),
        sa.Column("answers", sa.Integer, nullable=False),
    )
    op.create_index("pool_requests_by_id", "pool_requests", ["pool", "id", "username"], unique=True)
    for name, condition, columns in (
        ("pool_requests_by_turn", WAITING, ["pool", "turn", "number", "kept_until", "since"]),
        ("pool_requests_by_end", WAITING, ["pool", "kept_until"]),
        ("pool_requests_granted", GRANTED, ["pool", "kept_until"]),
    ):
        op.create_index(name, "pool_requests", columns, sqlite_where=condition, postgresql_where=condition)

    op.create_table(
        "forced_ends",
        sa.Column("pool", sa.String, primary_key=True),
        sa.Column("value", sa.String, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("end", sa.String, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("forced_ends_by_age", "forced_ends", ["pool", "at"])


def downgrade() -> None:
    """Drop them. Who waits asks again; members stay as tokens without a name."""
    op.drop_table("forced_ends")
    op.drop_table("pool_requests")
    for name in TOKEN_COLUMNS:
        op.drop_column("pool_tokens", name)
