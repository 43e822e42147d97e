"""The services whose HTTP is served over pools."""

import re
from collections.abc import Mapping

import msgspec

from tokenauth.settings.fields import Table


class DialectSettings(Table, frozen=True):
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


class PasswordDialectSettings(DialectSettings, frozen=True, kw_only=True):
    """One whose every request has the same password."""

    password: str

    def __post_init__(self) -> None:
        """Hold the values to what can work."""
        super().__post_init__()
        if not re.fullmatch(r"[\x21-\x7e]{1,1024}", self.password):
            raise ValueError("password: is sent in a header, and so takes 1 to 1024 characters of ASCII, with no blank")


class DialectsSettings(Table, frozen=True, rename="kebab"):
    """The services whose HTTP is served; one that is not named is not."""

    simple_token_implement: PasswordDialectSettings | None = None
    token_pool: DialectSettings | None = None
    random_token_generator: DialectSettings | None = None
    token_management_service: DialectSettings | None = None

    def chosen(self) -> Mapping[str, DialectSettings]:
        """Return those that are served, by name."""
        fields = msgspec.structs.fields(self)
        return {field.encode_name: found for field in fields if (found := getattr(self, field.name)) is not None}
