"""Whose a lease is. Earlier releases cannot serve beside: they would lease a token and leave its last user's name."""

import sqlalchemy as sa
from alembic import op

revision = "2.1"
down_revision = "1.2"


def upgrade() -> None:
    """Add the column. Leases that run already belong to nobody: they lapse, or a manager releases them."""
    op.add_column("pool_tokens", sa.Column("username", sa.String))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("pool_tokens", "username")
