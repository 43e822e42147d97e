"""A FastAPI service guarded by tokenauth, which also calls another service with its own login.

In one terminal (`make install` installs what the examples need):

    make install serve

In two more (this service calls the second one):

    .venv/bin/uvicorn examples.fastapi_app:app --http h11 --port 8001
    .venv/bin/uvicorn examples.starlette_app:app --http h11 --port 8002

Then log in at tokenauth, and call this service with the token:

    TOKEN=$(curl -s localhost:8000/api/token -H 'Content-Type: application/json' \
        -d '{"username": "admin", "password": "admin"}' | cut -d'"' -f4)
    curl localhost:8001/orders -H "X-Token: $TOKEN"
    curl localhost:8001/neighbour -H "X-Token: $TOKEN"

Set `TOKENAUTH_URL` and `NEIGHBOUR_URL` if they are elsewhere. This service logs in as `ROBOT_NAME` with
`ROBOT_PASSWORD`.
"""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, HTTPException, Request

from tokenauth import TokenMiddleware
from tokenauth.client import RemoteTokens, TokenAuth
from tokenauth.errors import Refusal
from tokenauth.models import Identity

ISSUER = os.environ.get("TOKENAUTH_URL", "http://127.0.0.1:8000")
NEIGHBOUR = os.environ.get("NEIGHBOUR_URL", "http://127.0.0.1:8002")

# A revoked token is refused here within two seconds. While tokenauth is unreachable, tokens that it confirmed in the
# last half minute keep working, and all others get 503.
tokens = RemoteTokens(ISSUER, max_age=2, stale_grace=28)
robot = TokenAuth(
    ISSUER, os.environ.get("ROBOT_NAME", "admin"), os.environ.get("ROBOT_PASSWORD", "admin"), origins=[NEIGHBOUR]
)
neighbour = httpx.AsyncClient(base_url=NEIGHBOUR, auth=robot)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Close the connections to both on shutdown."""
    async with tokens, neighbour:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(TokenMiddleware, tokens=tokens, exempt=["/docs", "/openapi.json"])


def user(request: Request) -> Identity:
    """Return the user that TokenMiddleware has identified."""
    found: Identity = request.user
    return found


def needs(scope: str) -> Callable[[Identity], Identity]:
    """Return a dependency that requires a scope."""

    def user_with_scope(who: Annotated[Identity, Depends(user)]) -> Identity:
        if scope not in who.scopes:
            raise HTTPException(403, f"This needs the scope {scope!r}.")
        return who

    return user_with_scope


@app.get("/orders")
async def orders(who: Annotated[Identity, Depends(user)]) -> dict[str, Any]:
    """Answer any user with a valid token."""
    return {"for": who.username, "orders": []}


@app.delete("/orders")
async def delete_orders(who: Annotated[Identity, Depends(needs("admin"))]) -> dict[str, str]:
    """Answer users with the scope `admin`."""
    return {"deleted by": who.username}


@app.get("/neighbour")
async def ask_neighbour() -> dict[str, Any]:
    """Call the other service. `robot` logs in when needed, and sends the token."""
    try:
        answer = (await neighbour.get("/greeting")).raise_for_status()
    except (httpx.HTTPError, Refusal):  # unreachable, or this service cannot log in
        raise HTTPException(503, "The neighbour is unreachable.") from None
    return {"the neighbour says": answer.json()}
