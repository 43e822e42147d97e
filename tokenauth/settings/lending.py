"""The tables of the configuration about lending: pools, and the services whose HTTP is served over them."""

import re
from collections.abc import Mapping

import msgspec

from tokenauth.settings.section import Duration, Section, check_between, check_scope


class PoolEntry(Section, frozen=True):
    """A pool as the file has it."""

    capacity: int | None = None
    token_ttl: Duration | None = None
    lease_ttl: Duration = Duration(60)
    prefill: bool = False
    scope: str | None = None
    manage_scope: str = "admin"

    def __post_init__(self) -> None:
        """Hold the values to what can work."""
        if self.capacity is not None:
            check_between("capacity", self.capacity, 0, 100_000_000)
        if self.token_ttl is not None:
            check_between("token_ttl", self.token_ttl, 1, 10 * 365 * 86400)
        check_between("lease_ttl", self.lease_ttl, 1, 10 * 365 * 86400)
        if self.prefill and self.capacity is None:
            raise ValueError("prefill: keeps `capacity` tokens in being; say how many that are")
        if self.prefill and self.token_ttl is not None:
            raise ValueError("token_ttl: does not go with prefill, whose tokens wait for ever")
        if self.scope is not None:
            check_scope("scope", self.scope)
        check_scope("manage_scope", self.manage_scope)


class Dialect(Section, frozen=True):
    """The HTTP of another service, served over one pool."""

    pool: str
    prefix: str = ""
    require_token: bool = False

    def __post_init__(self) -> None:
        """Hold the values to what can work."""
        if not re.fullmatch(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)*", self.prefix):
            raise ValueError(
                f"prefix: {self.prefix!r} is neither empty nor a path such as '/pool', with no slash at its end"
            )


class PasswordDialect(Dialect, frozen=True, kw_only=True):
    """One whose every request has the same password."""

    password: str

    def __post_init__(self) -> None:
        """Hold the values to what can work."""
        super().__post_init__()
        if not re.fullmatch(r"[\x21-\x7e]{1,1024}", self.password):
            raise ValueError("password: is sent in a header, and so takes 1 to 1024 characters of ASCII, with no blank")


class Dialects(Section, frozen=True, rename="kebab"):
    """The services whose HTTP is served; one that is not named is not."""

    simple_token_implement: PasswordDialect | None = None
    token_pool: Dialect | None = None
    random_token_generator: Dialect | None = None
    token_management_service: Dialect | None = None

    def chosen(self) -> Mapping[str, Dialect]:
        """Return those that are served, by name."""
        fields = msgspec.structs.fields(self)
        return {field.encode_name: found for field in fields if (found := getattr(self, field.name)) is not None}
