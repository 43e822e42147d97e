"""The API documentation of the dialects."""

from collections.abc import Mapping

from tokenauth.web.dialects import (
    random_token_generator,
    simple_token_implement,
    token_management_service,
    token_pool,
)
from tokenauth.web.openapi import Section

DIALECTS: Mapping[str, Section] = {
    module.DOCUMENTATION.name: module.DOCUMENTATION
    for module in (simple_token_implement, token_pool, random_token_generator, token_management_service)
}
