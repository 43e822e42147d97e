"""The PostgreSQL engine: what differs from other databases."""
