"""PostgreSQL, and the helpers of its tests."""
