"""Counts validations, for metrics."""

from tokenauth.metrics import ValidationCounts
from tokenauth.models import Login
from tokenauth.service import Service
from tokenauth.tokens import Tokens


class CountingValidator:
    """A Validator that counts the results of validations."""

    def __init__(self, tokens: Tokens, counts: ValidationCounts) -> None:
        self._tokens = tokens
        self._counts = counts

    async def identify(self, value: bytes, touch: bool = True) -> Login | None:
        try:
            login = await self._tokens.identify(value, touch)
        except Exception as error:
            self._counts.refuse(error)
            raise
        if login is None:
            self._counts.invalid += 1
        else:
            self._counts.valid += 1
        return login


def counted(service: Service, route: str) -> CountingValidator | Tokens:
    """Return what validates tokens at a route: it counts where there are metrics, since that costs a coroutine."""
    if not service.settings.metrics.listen:
        return service.tokens
    return CountingValidator(service.tokens, service.metrics.validations(route))
