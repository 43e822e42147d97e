"""PoolClient and AsyncPoolClient, against real workers."""
