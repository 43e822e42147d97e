"""PostgreSQL: what differs from the other databases."""
