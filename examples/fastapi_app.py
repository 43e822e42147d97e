"""A FastAPI service that leaves logins to tokenauth, and calls another service with a login of its own.

In one terminal (`make install` brings what the examples need):

    make install serve

In two more (the second one is what this one calls):

    .venv/bin/uvicorn examples.fastapi_app:app --port 8001
    .venv/bin/uvicorn examples.starlette_app:app --port 8002

Then log in at tokenauth, and come here with the token:

    TOKEN=$(curl -s localhost:8000/api/token -H 'Content-Type: application/json' \
        -d '{"username": "admin", "password": "admin"}' | cut -d'"' -f4)
    curl localhost:8001/orders -H "X-Token: $TOKEN"
    curl localhost:8001/neighbour -H "X-Token: $TOKEN"

`TOKENAUTH_URL` and `NEIGHBOUR_URL` say where the others are, `ROBOT_NAME` and `ROBOT_PASSWORD` who this service is.
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

# A revoked token is refused here two seconds later at the most. While tokenauth cannot be asked, the tokens that
# it has confirmed in the last half minute go on working, and all others are answered 503.
tokens = RemoteTokens(ISSUER, max_age=2, stale_grace=28)
robot = TokenAuth(
    ISSUER, os.environ.get("ROBOT_NAME", "admin"), os.environ.get("ROBOT_PASSWORD", "admin"), origins=[NEIGHBOUR]
)
neighbour = httpx.AsyncClient(base_url=NEIGHBOUR, auth=robot)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Close the connections to the others at the end."""
    async with tokens, neighbour:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(TokenMiddleware, tokens=tokens, exempt=["/docs", "/openapi.json"])


def user(request: Request) -> Identity:
    """Say who sent a request: TokenMiddleware has found it out."""
    found: Identity = request.user
    return found


def needs(scope: str) -> Callable[[Identity], Identity]:
    """Make a dependency that lets through only users with a scope."""

    def user_with_scope(who: Annotated[Identity, Depends(user)]) -> Identity:
        if scope not in who.scopes:
            raise HTTPException(403, f"This needs the scope {scope!r}.")
        return who

    return user_with_scope


@app.get("/orders")
async def orders(who: Annotated[Identity, Depends(user)]) -> dict[str, Any]:
    """Answer whoever has a valid token."""
    return {"for": who.username, "orders": []}


@app.delete("/orders")
async def delete_orders(who: Annotated[Identity, Depends(needs("admin"))]) -> dict[str, str]:
    """Answer whoever has the scope `admin`."""
    return {"deleted by": who.username}


@app.get("/neighbour")
async def ask_neighbour() -> dict[str, Any]:
    """Call the other service; `robot` logs in when it is needed, and sends the token along."""
    try:
        answer = (await neighbour.get("/greeting")).raise_for_status()
    except (httpx.HTTPError, Refusal):  # nobody there, or no login for this service
        raise HTTPException(503, "The neighbour cannot be asked at the moment.") from None
    return {"the neighbour says": answer.json()}
