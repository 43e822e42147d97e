"""The user of each lease.

This is a new generation: an earlier release on the same database would lease a token without changing its username.
"""

import sqlalchemy as sa
from alembic import op

revision = "2.1"
down_revision = "1.2"


def upgrade() -> None:
    """Add the column. Current leases get no user: they lapse, or a manager of the pool releases them."""
    op.add_column("pool_tokens", sa.Column("username", sa.String))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("pool_tokens", "username")
