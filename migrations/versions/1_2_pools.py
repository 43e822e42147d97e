"""Pools of tokens that can be leased."""

import sqlalchemy as sa
from alembic import op

revision = "1.2"
down_revision = "1.1"


def upgrade() -> None:
    """Create the table."""
    postgres = op.get_context().dialect.name == "postgresql"
    number = (sa.BigInteger(), sa.Identity()) if postgres else (sa.Integer(),)
    value = sa.String(collation="C") if postgres else sa.String()  # ordered by code point
    op.create_table(
        "pool_tokens",
        sa.Column("number", *number, primary_key=True),
        sa.Column("pool", sa.String, primary_key=postgres, nullable=False),
        sa.Column("value", value, nullable=False),
        sa.Column("free_at", sa.Float, nullable=False),
        sa.Column("holder", sa.String),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("retired", sa.Boolean, nullable=False),
        sa.Column("idle", sa.Boolean, sa.Computed("holder IS NULL", persisted=True), nullable=False),
    )
    op.create_index("pool_tokens_by_value", "pool_tokens", ["pool", "value"], unique=True)
    op.create_index("pool_tokens_by_turn", "pool_tokens", ["pool", "retired", "idle", "free_at", "number"])


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("pool_tokens")
