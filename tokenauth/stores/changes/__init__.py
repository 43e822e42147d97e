"""The changes that stores make, each written once for all databases and for many callers at a time."""
