"""Pages for people: Jinja2 templates of `pages/`, without script, under a strict Content-Security-Policy."""

import base64
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files

from starlette.responses import Response

from tokenauth.web.responses import NoStoreResponse, RawHeaders

STYLE = (files("tokenauth.web") / "pages" / "style.css").read_text(encoding="utf-8")
_STYLE_HASH = base64.b64encode(sha256(STYLE.encode()).digest()).decode()


def policy(form_action: str) -> str:
    """Return the Content-Security-Policy of a page. `form_action` lists where its forms may lead."""
    return (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; form-action {form_action};"
        " frame-ancestors 'none'; base-uri 'none'"
    )


class Pages:
    """Renders the templates of one host."""

    def __init__(self, host: str, form_action: str) -> None:
        """`host` is what the pages call this service; `form_action` lists where forms may lead, also by redirects."""
        # Most configurations have no login page: then Jinja is not loaded.
        from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415
        from markupsafe import Markup  # noqa: PLC0415

        self._templates = Environment(
            loader=PackageLoader("tokenauth.web", "pages"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._templates.globals.update(host=host, style=Markup(STYLE))  # noqa: S704 - our own file
        self._policy = policy(form_action)

    def render(self, name: str, status: int = 200, headers: RawHeaders = (), **values: object) -> Response:
        """Return the page that the template `name` makes of the values."""
        response = NoStoreResponse(
            self._templates.get_template(name).render(values),
            status,
            headers={"Content-Security-Policy": self._policy},
            media_type="text/html",
        )
        response.raw_headers.extend(headers)
        return response


def see_other(address: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> Response:
    """Return a redirect after a form was handled: the browser gets the address with GET."""
    response = NoStoreResponse(status_code=303, headers={"Location": address})
    response.raw_headers.extend(headers)
    return response
