"""A Django site that django-oauth-toolkit guards.

`python -m tests.wire.oauth.django_site DATABASE URL SETTING CREDENTIAL...`

It introspects tokens at the tokenauth server at URL. SETTING is the toolkit setting for the credential.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import django  # type: ignore[import-untyped]
from django.conf import settings  # type: ignore[import-untyped]
from django.core.management import call_command  # type: ignore[import-untyped]
from django.core.wsgi import get_wsgi_application  # type: ignore[import-untyped]
from django.http import HttpRequest, JsonResponse  # type: ignore[import-untyped]
from django.urls import path  # type: ignore[import-untyped]

urlpatterns: list[Any] = []


class Quiet(WSGIRequestHandler):
    """A request handler that logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def configure(database: str, provider_settings: dict[str, Any]) -> None:
    """Set up Django, with the tables that the toolkit needs and no migrations."""
    apps = ("auth", "contenttypes", "oauth2_provider")
    settings.configure(
        ALLOWED_HOSTS=["127.0.0.1"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": database}},
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "oauth2_provider"],
        MIGRATION_MODULES=dict.fromkeys(apps),
        OAUTH2_PROVIDER=provider_settings,
        ROOT_URLCONF=__name__,
        SECRET_KEY="not one",
        USE_TZ=True,
    )
    django.setup()
    call_command("migrate", run_syncdb=True, verbosity=0)


def guard() -> None:
    """Add three guarded pages. `/advertised` sends challenges with metadata."""
    from oauth2_provider.decorators import protected_resource  # type: ignore[import-untyped]  # noqa: PLC0415

    def show(request: HttpRequest) -> JsonResponse:
        return JsonResponse({"user": request.resource_owner.username})

    urlpatterns.append(path("any", protected_resource()(show)))
    urlpatterns.append(path("write", protected_resource(scopes=["write"])(show)))
    urlpatterns.append(path("advertised", protected_resource(scopes=["write"], advertise_metadata=True)(show)))


def provider(url: str, setting: str, credential: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the toolkit for introspection at a tokenauth server."""
    return {
        "RESOURCE_SERVER_INTROSPECTION_URL": f"{url}/oauth/introspect",
        "RESOURCE_SERVER_TOKEN_CACHING_SECONDS": 1,
        "SCOPES": {"read": "Read", "write": "Write"},
        setting: tuple(credential) if len(credential) > 1 else credential[0],
    }


def main() -> None:
    database, url, setting, *credential = sys.argv[1:]
    configure(database, provider(url, setting, credential))
    guard()
    with make_server("127.0.0.1", 0, get_wsgi_application(), handler_class=Quiet) as server:
        print(json.dumps({"event": "listening", "level": "info", "port": server.server_port}), flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
