"""Deletes of old rows, in steps."""

from typing import Any

from sqlalchemy import Column, ColumnElement, Delete, bindparam, delete, select


def delete_oldest(key: Column[Any], age: Column[Any], old: ColumnElement[bool]) -> Delete:
    """Delete at most `limit` rows of the key's table that are old, the oldest first."""
    oldest = select(key).where(old).order_by(age).limit(bindparam("limit")).with_for_update(skip_locked=True)
    return delete(key.table).where(key.in_(oldest))
