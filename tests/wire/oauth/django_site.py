"""A Django site that django-oauth-toolkit guards: `python -m tests.oauth.django_site DATABASE URL WAY CREDENTIAL...`.

It is no authorization server: it asks tokenauth about each token that it is shown. WAY is what it asks with.
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
    """Answers without a line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""


def configure(database: str, terms: dict[str, Any]) -> None:
    """Set up Django, with the tables that the toolkit needs and no migrations."""
    apps = ("auth", "contenttypes", "oauth2_provider")
    settings.configure(
        ALLOWED_HOSTS=["127.0.0.1"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": database}},
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "oauth2_provider"],
        MIGRATION_MODULES=dict.fromkeys(apps),
        OAUTH2_PROVIDER=terms,
        ROOT_URLCONF=__name__,
        SECRET_KEY="not one",
        USE_TZ=True,
    )
    django.setup()
    call_command("migrate", run_syncdb=True, verbosity=0)


def guard() -> None:
    """Put two guarded pages up."""
    from oauth2_provider.decorators import protected_resource  # type: ignore[import-untyped]  # noqa: PLC0415

    def show(request: HttpRequest) -> JsonResponse:
        return JsonResponse({"user": request.resource_owner.username})

    urlpatterns.append(path("any", protected_resource()(show)))
    urlpatterns.append(path("write", protected_resource(scopes=["write"])(show)))
    urlpatterns.append(path("told", protected_resource(scopes=["write"], advertise_metadata=True)(show)))


def provider(url: str, way: str, credential: Sequence[str]) -> dict[str, Any]:
    """Say whom to ask about tokens, and with what."""
    return {
        "RESOURCE_SERVER_INTROSPECTION_URL": f"{url}/oauth/introspect",
        "RESOURCE_SERVER_TOKEN_CACHING_SECONDS": 1,
        "SCOPES": {"read": "Read", "write": "Write"},
        way: tuple(credential) if len(credential) > 1 else credential[0],
    }


def main() -> None:
    """Serve until killed."""
    database, url, way, *credential = sys.argv[1:]
    configure(database, provider(url, way, credential))
    guard()
    with make_server("127.0.0.1", 0, get_wsgi_application(), handler_class=Quiet) as server:
        print(json.dumps({"event": "listening", "level": "info", "port": server.server_port}), flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
