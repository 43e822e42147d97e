"""PostgreSQL, and what its tests stand on."""
