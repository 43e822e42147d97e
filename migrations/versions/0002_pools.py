"""Pools of tokens that are lent."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "pool_tokens",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("pool", sa.String, nullable=False),
        sa.Column("value", sa.String, nullable=False),
        sa.Column("free_at", sa.Float, nullable=False),
        sa.Column("holder", sa.String),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("retired", sa.Boolean, nullable=False),
        sa.Column("idle", sa.Boolean, sa.Computed("holder IS NULL", persisted=True), nullable=False),
    )
    op.create_index("pool_tokens_by_value", "pool_tokens", ["pool", "value"], unique=True)
    op.create_index("pool_tokens_by_turn", "pool_tokens", ["pool", "retired", "idle", "free_at", "number"])


def downgrade() -> None:
    """Drop it."""
    op.drop_table("pool_tokens")
