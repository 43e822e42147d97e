"""The API documentation: every operation of /openapi.json and /docs, in the order in which people want to read.

The examples form one story: a value of an example answer, such as a token, is used by the examples after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

import msgspec

from tokenauth import errors
from tokenauth.passwords import MAX_LENGTH
from tokenauth.pools import MAX_COUNT
from tokenauth.settings.model import MAX_NAME, Settings
from tokenauth.tokens import LIST_LIMIT
from tokenauth.web import exceptions
from tokenauth.web.asgi_extensions import EVENTS as EVENTS_PATH
from tokenauth.web.dialects.serving import dialect_sections
from tokenauth.web.openapi import (
    BASIC,
    BEARER,
    FORM,
    JSON_BODY,
    NO_NUL,
    STORE,
    X_TOKEN,
    Answer,
    Document,
    Operation,
    Parameter,
    Section,
    build_document,
    guarded,
    schema_only,
)
from tokenauth.web.routes import account, console, health, home, javascript, oauth, pools, status, throttle, token

Refusals = Sequence[type[errors.Refusal]]

INTRO = """\
Issues bearer tokens that expire, checks and revokes them, and leases tokens from pools.

**Try it:** in the group **Token**, open **Log in**, choose **Try it out** and **Execute**. Copy the `token` from the
answer, choose **Authorize** at the top, and paste it under `X-Token`.

**Tokens** are sent as `X-Token` or as `Authorization: Bearer`. **Times** are Unix seconds. **Errors** are
`{"error": "<code>", "error_description": "<sentence>"}`, except where an answer shows another form. No answer but
`/tokenauth.js` and its types may be stored by a cache.
"""

FIELDS: Mapping[str, str] = {
    "access_token": "The token. Send it as `Authorization: Bearer`.",
    "active": "Whether the token is valid.",
    "address": "The IP address that the login came from.",
    "available": "The number of free tokens.",
    "available_tokens": "The number of free tokens.",
    "by": "Who made the reservation.",
    "capacity": "The maximum number of tokens, free and leased. Null: no limit.",
    "client_id": "A user name.",
    "client_secret": "The user's password.",
    "count": "The number of tokens.",
    "csrf": "The hidden field of the form. It must be the value of the form's cookie.",
    "current": "Whether this is the token that was sent with the request.",
    "docs": "The page that shows this document.",
    "error": "A code for programs.",
    "error_description": "A sentence for people.",
    "everywhere": "End all logins of the user.",
    "exp": "When the token expires, in Unix seconds.",
    "expires_in": "Seconds until it expires, for clients whose clock may be wrong.",
    "expiry_time": "When it expires, in Unix seconds. Null: never, or not valid.",
    "failures": "The number of failed logins that are counted.",
    "fence": "Grows with each lease of the token. A resource can reject a holder with a lower number than it has seen.",
    "for": "The only user who can lease it. Null: nobody can.",
    "force": "End the lease of another user, or replace their reservation.",
    "grant_type": "Always `client_credentials`.",
    "health": "Where to ask whether the service can serve.",
    "holder": "Which job or machine holds the lease. Default: the user name.",
    "iat": "When the token was issued, in Unix seconds.",
    "id": "A public name of the token. It cannot be used to log in.",
    "issued_at": "When the token was issued, in Unix seconds.",
    "jti": "The `id` of the token.",
    "kind": "`login`, or `named` for a token that was made for a program.",
    "labels": "Labels of a member of a pool. A request wants one that has all of them.",
    "last_used_at": "When its last use was noted, in Unix seconds. Null: none was yet.",
    "lease_expiry_time": "When the lease ends, in Unix seconds.",
    "leased": "The number of leased tokens.",
    "leased_at": "When the lease started, in Unix seconds.",
    "leases": "The leases, all at once.",
    "login": "The login page for people. Absent: there is none.",
    "manager": "Whether the user manages the pool.",
    "max_expiry_time": "The latest time to which use, or keeping alive, can extend it, in Unix seconds.",
    "name": "The name of a token, a pool, or a member of a pool. Null: the token is a login.",
    "next": "The value of `after` for the next page. Null: this is the last page.",
    "note": "A remark for people.",
    "openapi": "This document.",
    "overlap": "How long the old token stays valid. Default: 0.",
    "position": "The place in the waiting line. 1 is the next.",
    "priority": "One point counts as one minute of waiting. More than 0 needs the scope that manages the pool.",
    "rd": "Where the browser goes afterwards.",
    "remember": "Stay logged in.",
    "request": "Your own id of the request, to repeat it safely.",
    "requests": "The requests that wait, in order.",
    "reservation": "Until when a member is not leased, except to one user.",
    "reserved": "The number of members that are reserved, and not leased.",
    "retry_after": "Seconds after which to send the request again.",
    "revoked": "The number of tokens that were revoked.",
    "scope": "Scopes, separated by spaces.",
    "scopes": "What the user may do, and what a token is limited to. Null: it is not limited.",
    "service": "Always `tokenauth`.",
    "since": "When it joined the line, in Unix seconds.",
    "take": "With `force`: lease the token to me.",
    "throttled": "The logins that are refused for a while.",
    "token": "The value of the token.",
    "token_type_hint": "Ignored.",
    "ttl": "How long the token lives, or the lease lasts. Default: as the configuration says.",
    "until": "When it ends, in Unix seconds.",
    "user": "The user who holds the lease.",
    "user_agent": "The User-Agent header of the login.",
    "username": "The name of the user.",
    "wait": "Seconds to wait for a free token. Without it the answer comes at once.",
    "waiting": "The number of requests in the line.",
}
"""What fields of requests and answers mean."""


def describe(settings: Settings) -> Document:
    """Return the OpenAPI document of a service with this configuration."""
    sections = [
        TOKEN,
        MY_TOKENS,
        forward_auth_section(browsers=bool(settings.browser.url)),
        POOLS,
        THROTTLE,
        EVENTS,
        oauth_section(settings.oauth.issuer),
        WEB_PAGES,
        *([LOGIN_PAGE] if settings.browser.url else []),
        _console(),
        HEALTH,
        replace(DOCUMENTATION, operations=[_home(bool(settings.browser.url)), *DOCUMENTATION.operations]),
    ]
    return build_document([*sections, *dialect_sections(settings)], INTRO, FIELDS, settings.oauth.issuer or "/")


_LOGIN_VALUE = "kT3vXw9QmB2yZ7fHc5RjN8sLd1GpAeU4oWxKq6JtVb0iYhMzCr3FaSnE5gPuD7lO"
_ACCESS_VALUE = "Qe8ZcN1xVt6LrB4mYw0KsJ7hGf3DpA9uTi5EoXq2RzHbWj8CnMvSkF1yUl6aPdg4"
_ISSUED_AT, _EXPIRES_AT = 1_800_000_000, 1_800_086_400

_POOL_VALUE = "8Wm2TqZ5rXbN7cKvJ0dHfLyP3sGa9eUi1nQoEkRj4wYtCxBz6uVhMgSlDpFiAOTq"

_TOUCH = Parameter("touch", "`0`: this does not count as a use of the token, and so does not extend it.", Literal["0"])

TOKEN = Section(
    name="Token",
    text="Log in, check a token, log out.",
    operations=[
        Operation(
            method="POST",
            path="/api/token",
            id="logIn",
            title="Log in",
            text="Returns a new token for a user name and a password. To try it, write your own: `admin` with the"
            " password `admin` exists in the shipped `config.toml` only.",
            body=token.LogInRequest,
            example={"username": "admin", "password": "admin"},
            answers=[
                Answer(200, "The new token.", token.TokenAnswer, {"token": _LOGIN_VALUE, "expiry_time": _EXPIRES_AT}),
                Answer(
                    401,
                    "The user name or the password is wrong.",
                    Literal["invalid credentials"],
                    "invalid credentials",
                    "text/plain",
                ),
            ],
            refusals=[*JSON_BODY, exceptions.ForeignOrigin, errors.TooManyAttempts, *STORE],
        ),
        Operation(
            method="GET",
            path="/api/token",
            id="checkToken",
            title="Check a token",
            text="Returns whether a token is valid: the one in the query, or else the one in the header. For an"
            " unknown, expired or revoked token the answer is `200`, too, with `valid: false`.",
            parameters=[
                Parameter("token", "The token to check. Default: the one in the header.", str, _LOGIN_VALUE),
                _TOUCH,
            ],
            answers=[
                Answer(200, "Whether it is valid.", token.ValidityAnswer, {"valid": True, "expiry_time": _EXPIRES_AT})
            ],
            refusals=[errors.InvalidRequest, *STORE],
            security=[(), (X_TOKEN,), (BEARER,)],
        ),
        guarded(
            Operation(
                method="POST",
                path="/api/token/renew",
                id="renewToken",
                title="Renew a token",
                text="Extends a login that ends early when it is idle (`tokens.idle`), as any use of it does, and"
                " returns when it ends now. It never lives beyond `max_expiry_time`.",
                answers=[
                    Answer(
                        200,
                        "When the token ends.",
                        token.RenewedAnswer,
                        {"valid": True, "expiry_time": _ISSUED_AT + 9000, "max_expiry_time": _EXPIRES_AT},
                    )
                ],
                refusals=[errors.NotRenewable],
            )
        ),
        Operation(
            method="DELETE",
            path="/api/token",
            id="logOut",
            title="Log out",
            text="Revokes a token: the one in the body (JSON or a form) or in the query as `token`, or else the one in"
            " the header. The answer is always `200`, and the token is refused from then on.",
            body=token.LogOutRequest,
            body_required=False,
            example={"token": _LOGIN_VALUE},
            answers=[
                Answer(200, "The token is not valid.", token.ValidityAnswer, {"valid": False, "expiry_time": None})
            ],
            security=[(), (X_TOKEN,), (BEARER,)],
        ),
    ],
)

_ID = "5f0c9be2a7d1438e6b90fa13"
_WITHOUT_NUL = Annotated[str, schema_only(pattern=NO_NUL)]
_USER = Parameter("user", "Whose tokens; another user than yourself needs the scope `admin`.", _WITHOUT_NUL)

_Kinds = Literal["login", "named", "all"]

_NAMED_VALUE = "tknV7cQ2mZ9xLr4Ts8YbKf1WnGd6HpJe3AuRo5XiBvMt0EzDqCyNlPk2P1aBx0Zc"
_ROTATED_VALUE = "tkn4BhYs7GqLw2ZxRj9TcVm5NfKd1PaEu8XoIi3CeQt6DzMkWrJyHlUv0n3vTq8Y"
_NAMED_ID, _ROTATED_ID = "8b1f6de0c4a25973f8e0d2b6", "c07d93ab5e61f48a2b7c9d10"


def _named(value: str, id: str) -> Mapping[str, object]:
    expiry_time = _ISSUED_AT + 30 * 86400
    return {"token": value, "id": id, "name": "nightly", "scopes": ["admin"], "expiry_time": expiry_time}


MY_TOKENS = Section(
    name="My tokens",
    text="Who am I, where am I logged in? End one login or all. Make tokens for programs, which have a name, their own"
    " scopes and their own lifetime.",
    operations=[
        guarded(operation)
        for operation in (
            Operation(
                method="GET",
                path="/api/me",
                id="getMe",
                title="Show who I am",
                text="Returns the user of the token that is sent, and what the user may do.",
                answers=[
                    Answer(
                        200,
                        "The user and the token.",
                        account.MeAnswer,
                        {
                            "username": "admin",
                            "scopes": ["admin"],
                            "kind": "login",
                            "name": None,
                            "id": _ID,
                            "issued_at": _ISSUED_AT,
                            "expiry_time": _EXPIRES_AT,
                        },
                    )
                ],
            ),
            Operation(
                method="GET",
                path="/api/tokens",
                id="listMyTokens",
                title="List my tokens",
                text="Lists the valid tokens of the user, the newest first, at most 1,000. The tokens themselves are"
                " not shown. With `user=*`, admins get pages of the tokens of all users, the latest end first. `next`"
                " is the `after` of the next page; while a search is under way, a page may have no token and yet a"
                " next one.",
                parameters=[
                    Parameter("kind", "What to list. Default: `all`.", _Kinds, "login"),
                    _USER,
                    Parameter(
                        "search",
                        "With `user=*`: part of a user, name, address or user agent, or the beginning of an id.",
                    ),
                    Parameter(
                        "limit",
                        "With `user=*`: tokens on a page. Default: 100.",
                        Annotated[int, msgspec.Meta(ge=1, le=LIST_LIMIT)],
                    ),
                    Parameter("after", "With `user=*`: where the page begins, the `next` of the page before."),
                ],
                answers=[
                    Answer(
                        200,
                        "The tokens.",
                        account.ListedTokensAnswer,
                        {
                            "tokens": [
                                {
                                    "id": _ID,
                                    "user": "ann",
                                    "kind": "login",
                                    "name": None,
                                    "scopes": None,
                                    "issued_at": _ISSUED_AT,
                                    "expiry_time": _EXPIRES_AT,
                                    "last_used_at": None,
                                    "address": "192.0.2.7",
                                    "user_agent": "curl/8.5.0",
                                    "current": True,
                                }
                            ]
                        },
                    )
                ],
                refusals=[errors.InsufficientScope],
            ),
            Operation(
                method="POST",
                path="/api/tokens",
                id="issueNamedToken",
                title="Make a token for a program",
                text="Returns a named token. It is shown only now. It has those of `scopes` that the user has whenever"
                " it is used; without `scopes`, all that the user has. Without `ttl`, it lives as long as"
                " `tokens.named_ttl` says. The request needs the token of a login.",
                body=account.IssueNamedRequest,
                example={"name": "nightly", "scopes": ["admin"], "ttl": "30d"},
                answers=[Answer(201, "The new token.", account.NamedTokenAnswer, _named(_NAMED_VALUE, _NAMED_ID))],
                refusals=[
                    *JSON_BODY,
                    errors.LoginNeeded,
                    errors.InsufficientScope,
                    errors.NameTaken,
                    errors.TooManyTokens,
                ],
            ),
            Operation(
                method="POST",
                path="/api/tokens/{id}/rotate",
                id="rotateNamedToken",
                title="Rotate a named token",
                text="Returns a new token with the same name, scopes and lifetime. The old one ends after"
                " `overlap`; without one, at once. The request needs the token of a login.",
                parameters=[Parameter("id", "The `id` of the token, from the list.", str, _NAMED_ID)],
                body=account.RotateRequest,
                body_required=False,
                example={"overlap": "1h"},
                answers=[Answer(201, "The new token.", account.NamedTokenAnswer, _named(_ROTATED_VALUE, _ROTATED_ID))],
                refusals=[
                    *JSON_BODY,
                    errors.LoginNeeded,
                    exceptions.NotFound,
                    errors.AlreadyRotated,
                    errors.TooManyTokens,
                ],
            ),
            Operation(
                method="DELETE",
                path="/api/tokens",
                id="revokeMyTokens",
                title="End all my logins",
                text="Ends all logins of the user, or with `kind` their named tokens, or both. With `keep=current`, the"
                " token that is sent stays valid.",
                parameters=[
                    Parameter("keep", "Keep the token that is sent.", Literal["current"], "current"),
                    Parameter("kind", "What to end. Default: `login`.", _Kinds, "all"),
                    _USER,
                ],
                answers=[Answer(200, "How many were revoked.", account.RevokedAnswer, {"revoked": 3})],
                refusals=[errors.InsufficientScope],
            ),
            Operation(
                method="DELETE",
                path="/api/tokens/{id}",
                id="revokeMyToken",
                title="Revoke one of my tokens",
                text="Ends one login, for example that of a lost device, or one named token.",
                parameters=[Parameter("id", "The `id` of the token, from the list.", str, _ID), _USER],
                answers=[Answer(204, "The token is revoked.")],
                refusals=[errors.InsufficientScope, exceptions.NotFound],
            ),
        )
    ],
)

_FAILED_FROM = "198.51.100.7"

THROTTLE = Section(
    name="Throttle",
    text="Who has to wait after failed logins, and how to clear that. All of this needs the scope `admin`.",
    operations=[
        guarded(operation, errors.InsufficientScope)
        for operation in (
            Operation(
                method="GET",
                path="/api/throttle",
                id="listThrottled",
                title="List who is throttled",
                text="Lists the logins that this machine has refused and that still have to wait, at most 100, the"
                " longest wait first. Names that no user has are not shown.",
                answers=[
                    Answer(
                        200,
                        "Who has to wait.",
                        throttle.ThrottleAnswer,
                        {
                            "throttled": [
                                {
                                    "kind": "user",
                                    "user": "admin",
                                    "address": _FAILED_FROM,
                                    "failures": 5,
                                    "until": _ISSUED_AT + 1,
                                }
                            ]
                        },
                    )
                ],
            ),
            Operation(
                method="DELETE",
                path="/api/throttle",
                id="clearThrottle",
                title="Clear a user or a network",
                text="Forgets failed logins: those of a user at an address (`user` and `address`), or those of all"
                " names in a range together (`network`). It applies on all workers and machines at once.",
                parameters=[
                    Parameter("user", "The name of the user.", _WITHOUT_NUL, "admin"),
                    Parameter("address", "The IP address that they log in from.", str, _FAILED_FROM),
                    Parameter("network", "Such as `203.0.113.0/24`. A /24 or /16, or an IPv6 /64 or /48."),
                ],
                answers=[Answer(204, "The failed logins are forgotten.")],
                refusals=[exceptions.NotFound],
            ),
        )
    ],
)

_EVENT_TEXT = """\
id: 5f0c9be2-7
retry: 3000
event: hello
data: {"user":"admin","scopes":["admin"]}

id: 5f0c9be2-8
event: pool
data: {"name":"permits"}

"""

EVENTS = Section(
    name="Events",
    text="Hints of what to read again, as server-sent events.",
    operations=[
        guarded(
            Operation(
                method="GET",
                path=EVENTS_PATH,
                id="streamEvents",
                title="Stream changes",
                text="Sends an event when something has changed that the user may see, within about a second:"
                " `tokens` (my tokens), `pool` with its `name`, and for the scope `admin` `throttle` and `status`."
                " The data are to be read again. `hello` is the first event, and `reset` after an unknown"
                " `Last-Event-ID`: read everything. `bye` is the last one, with a `reason`: `logged_out`, `stop` or"
                " `unavailable`. Browsers can read it with `fetch`; their `EventSource` cannot send a token.",
                answers=[Answer(200, "The events, until the token ends.", str, _EVENT_TEXT, "text/event-stream")],
            )
        )
    ],
)

_FORWARD_AUTH = Section(
    name="Forward-auth",
    text="For reverse proxies: may this request pass?",
    operations=[
        Operation(
            method="GET",
            path="/auth",
            id="authorizeRequest",
            title="Authorize a request",
            text="A reverse proxy sends the headers of each request here, and lets the request pass if the answer is"
            " `200`. All methods are answered alike.",
            parameters=[
                Parameter("scope", "Scopes that the user must have, separated by spaces.", str, "admin"),
                _TOUCH,
                Parameter("path", "The path of the client's request. It is ignored, with all that follows it."),
            ],
            answers=[
                Answer(
                    200,
                    "The request may pass. The headers name the user.",
                    headers={
                        "X-Auth-User": "The user name, percent-encoded where it is not printable ASCII.",
                        "X-Auth-Scopes": "The user's scopes, separated by spaces.",
                        "X-Auth-Expires": "When the token expires, in Unix seconds.",
                    },
                )
            ],
            refusals=[
                errors.TokenRequired,
                errors.InvalidToken,
                errors.InsufficientScope,
                errors.Forbidden,
                *STORE,
                exceptions.RetryableInternalError,
            ],
            security=[(X_TOKEN,), (BEARER,)],
        )
    ],
)

_FOR_BROWSERS = [
    Parameter("cookie", "Empty. Take the token from the login cookie, if there is none in a header."),
    Parameter(
        "login",
        "With `cookie`: `302` to the login page instead of `401`, if a browser opens a page.",
        Literal["redirect"],
    ),
    Parameter("header", "Take a token from `X-Token` only, and not from `Authorization`.", Literal["x-token"]),
]
_LOGIN_ADDRESS = {"X-Auth-Login": "With `cookie`: the complete URL of the login page."}
_REDIRECTS = [
    Answer(
        302,
        "With `login=redirect`: a browser opens a page without a login.",
        headers={"Location": "The login page.", **_LOGIN_ADDRESS},
    ),
    Answer(401, "No one is logged in.", headers=_LOGIN_ADDRESS),
]


def forward_auth_section(browsers: bool) -> Section:
    """Return the section about forward-auth. `browsers`: whether there is a login page."""
    if not browsers:
        return _FORWARD_AUTH
    [ask] = _FORWARD_AUTH.operations
    first, *others = ask.parameters
    parameters = [first, *_FOR_BROWSERS, *others]
    changed = replace(
        ask,
        parameters=parameters,
        answers=[*ask.answers, *_REDIRECTS],
        refusals=[*ask.refusals, exceptions.ForeignOrigin],
    )
    return replace(_FORWARD_AUTH, operations=[changed])


class LogInForm(msgspec.Struct):
    csrf: str
    username: str
    password: str
    remember: Literal["yes"] | None = None
    rd: str = ""


class LogOutForm(msgspec.Struct):
    csrf: str
    everywhere: Literal["1"] | None = None
    rd: str = ""


_RD = Parameter("rd", "Where the browser goes afterwards, if `browser.return_to` lists it.")
_COOKIE = {"Set-Cookie": "The login cookie, or its deletion."}
_RETRY = {"Retry-After": "Seconds to wait before the next attempt."}


def _page(status: int, text: str, **headers: str) -> Answer:
    return Answer(status, text, media="text/html", headers=headers)


LOGIN_PAGE = Section(
    name="Login page",
    text="Pages for people. They work without script, and set a cookie that `/auth?cookie` reads.",
    operations=[
        Operation(
            method="GET",
            path="/login",
            id="getLoginPage",
            title="Show the login page",
            text="The form, or who is logged in.",
            parameters=[_RD],
            answers=[_page(200, "The page.", **_COOKIE), _page(503, "The database is unavailable.", **_RETRY)],
        ),
        Operation(
            method="POST",
            path="/login",
            id="sendLoginForm",
            title="Send the form of the login page",
            text="Sets a cookie with a new token, and revokes the token that was in it.",
            body=LogInForm,
            media=FORM,
            example={"csrf": "3v4xL0qJcN5yUu8mWw1kRg", "username": "admin", "password": "admin"},
            answers=[
                Answer(303, "Logged in: to `rd`, or to `/`.", headers={"Location": "That address.", **_COOKIE}),
                _page(400, "No user can have this name and this password."),
                _page(401, "The user name or the password is wrong."),
                _page(403, "The form was not sent by the login page in this browser."),
                _page(429, "Too many failed logins.", **_RETRY),
                _page(503, "The server is busy, or the database is unavailable.", **_RETRY),
            ],
            refusals=[errors.InvalidRequest, exceptions.BodyTooLarge],
        ),
        Operation(
            method="GET",
            path="/logout",
            id="getLogoutPage",
            title="Show the button to log out",
            text="The button, or that no one is logged in.",
            parameters=[_RD],
            answers=[_page(200, "The page.", **_COOKIE)],
        ),
        Operation(
            method="POST",
            path="/logout",
            id="sendLogoutForm",
            title="Press the button to log out",
            text="Revokes the token of the cookie, and deletes the cookie. With `everywhere`, it ends all logins of the"
            " user.",
            body=LogOutForm,
            media=FORM,
            example={"csrf": "3v4xL0qJcN5yUu8mWw1kRg"},
            answers=[
                Answer(303, "Logged out: to `rd`, or to a page that says so.", headers={"Location": "It.", **_COOKIE}),
                _page(200, "With `everywhere`: no one is logged in, so no other login was ended.", **_COOKIE),
                _page(403, "The form was not sent by the page in this browser."),
                _page(503, "The server is busy.", **_RETRY),
            ],
            refusals=[errors.InvalidRequest, exceptions.BodyTooLarge],
        ),
    ],
)

_POOL = Parameter("pool", "The name of a pool in the configuration.", str, "permits")
_POOL_TOKEN = Parameter("token", "The value of a token of the pool.", str, _POOL_VALUE)
_IN_POOL: Refusals = (errors.UnknownPool, errors.InsufficientScope)
_MEMBER_NAME = Parameter("name", "The name of a member.", str, "pixel-8")
_PHONES = Parameter("pool", "The name of a pool with members.", str, "phones")
_LEASE = {"token": _POOL_VALUE, "holder": "build-7", "fence": 1, "expiry_time": _ISSUED_AT + 1800, "expires_in": 1800}
_MEMBER = {
    "token": _POOL_VALUE,
    "expiry_time": None,
    "user": "admin",
    "holder": "build-7",
    "fence": 1,
    "leased_at": _ISSUED_AT,
    "lease_expiry_time": _ISSUED_AT + 1800,
}
_PHONE = {
    "token": "tQ9mWx2RkZ5cVbN8dJfHsLyP3gKa7eUi1nYoEwTj4rXtCxBz6uVhMqSlDpFiAO0G",
    "expiry_time": None,
    "name": "pixel-8",
    "labels": ["android", "arm"],
    "note": "shelf 3",
    "reservation": {"until": _ISSUED_AT + 86400, "note": "battery swap", "for": None, "by": "admin"},
}
_IN_LINE = {
    "position": 1,
    "user": "admin",
    "holder": "build-7",
    "since": _ISSUED_AT,
    "count": 1,
    "priority": 0,
    "labels": [],
    "request": "job-42",
}
_GENERATED_VALUE = "h4JzRk7WqYc2VnXb9TmLp0DsFg6AeUo3iKxQ8rBtCy5ZjHvNwMaSfGdPl1EuOIqT"

_COUNTED = {"name": "permits", "capacity": 1, "available": 1, "leased": 0, "waiting": 0, "manager": False}

POOLS = Section(
    name="Pools",
    text="Lease tokens, to limit how many clients use something at once. Pools are defined in the configuration.",
    operations=[
        guarded(operation)
        for operation in (
            Operation(
                method="GET",
                path="/api/pools",
                id="listPools",
                title="List the pools",
                text="Lists the pools that the user may use.",
                answers=[Answer(200, "The pools.", pools.PoolsAnswer, {"pools": [_COUNTED]})],
            ),
            Operation(
                method="POST",
                path="/api/pools/{pool}/leases",
                id="assignToken",
                title="Lease a token",
                text="Leases the token that has been free for the longest time. The lease ends by itself unless it is"
                " kept alive. `ttl` shortens it. In a pool with members, `labels` chooses among those that have all of"
                " these labels; the name of a member counts as one."
                " With `wait`, the request waits in line. If it is not served in that time, the answer is"
                " 202: send the same request again within 10 seconds to keep its place. With `request`, the same"
                " request has the same lease while that runs, so a lost answer costs nothing. With `count`, the answer"
                " has `leases`: all of them, or none.",
                parameters=[_POOL],
                body=pools.AssignRequest,
                body_required=False,
                example={"holder": "build-7"},
                answers=[
                    Answer(201, "The lease.", pools.LeaseAnswer, _LEASE),
                    Answer(201, "With `count`: the leases.", pools.LeasesAnswer, {"leases": [_LEASE]}),
                    Answer(
                        202,
                        "The request waits, and its place is kept.",
                        pools.WaitsAnswer,
                        {"request": "job-42", "position": 2, "waiting": 5, "retry_after": 0},
                        headers={"Retry-After": "Seconds after which to send the request again."},
                    ),
                ],
                refusals=[
                    *_IN_POOL,
                    *JSON_BODY,
                    errors.NoFreeToken,
                    errors.TooManyLeases,
                    errors.LeaseLost,
                    errors.RequestDiffers,
                    errors.TooManyPlaces,
                    errors.PlaceLost,
                ],
            ),
            Operation(
                method="GET",
                path="/api/leases",
                id="listMyLeases",
                title="List my leases and places in line",
                text="Lists what the user has leased and then where the user waits, in all pools that they may use, in"
                " pages. `next` is `null` on the last one. A page may have nothing, and yet a `next`: one request looks"
                " at about 10,000 leases and places.",
                parameters=[Parameter("after", "Where the page begins: the `next` of the page before.")],
                answers=[
                    Answer(
                        200,
                        "The leases and the places.",
                        pools.MyLeasesAnswer,
                        {
                            "leases": [
                                {
                                    "pool": "permits",
                                    "token": _MEMBER["token"],
                                    "holder": "build-7",
                                    "fence": 1,
                                    "leased_at": 1795235764,
                                    "lease_expiry_time": 1795235824,
                                }
                            ],
                            "places": [],
                            "next": None,
                        },
                    )
                ],
            ),
            Operation(
                method="GET",
                path="/api/pools/{pool}/requests",
                id="listRequests",
                title="List who waits",
                text="Lists the waiting line of a pool in its order. Ids of requests are shown to their users and to"
                " managers of the pool.",
                parameters=[
                    _POOL,
                    Parameter(
                        "limit",
                        "Requests in the answer. Default: 100.",
                        Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)],
                    ),
                ],
                answers=[Answer(200, "The waiting line.", pools.LineAnswer, {"waiting": 1, "requests": [_IN_LINE]})],
                refusals=_IN_POOL,
            ),
            Operation(
                method="DELETE",
                path="/api/pools/{pool}/requests/{request}",
                id="leaveLine",
                title="Leave the line",
                text="Takes a request out of the waiting line. A manager of the pool can take out that of another"
                " `user`.",
                parameters=[
                    _POOL,
                    Parameter("request", "The id of the request.", example="job-42"),
                    Parameter("user", "The user whose request it is. Default: you."),
                ],
                answers=[Answer(204, "It no longer waits.")],
                refusals=[*_IN_POOL, errors.UnknownRequest],
            ),
            Operation(
                method="PUT",
                path="/api/pools/{pool}/leases/{token}",
                id="keepLeaseAlive",
                title="Keep a lease alive",
                text="Renews the lease for its full duration. `holder` and `fence` may be left out; what is sent"
                " must be that of the lease.",
                parameters=[_POOL, _POOL_TOKEN],
                body=pools.KeepAliveRequest,
                body_required=False,
                example={"holder": "build-7"},
                answers=[Answer(200, "The lease.", pools.LeaseAnswer, _LEASE)],
                refusals=[*_IN_POOL, errors.UnknownToken, *JSON_BODY, errors.LeaseLost, errors.NotYourLease],
            ),
            Operation(
                method="DELETE",
                path="/api/pools/{pool}/leases/{token}",
                id="releaseToken",
                title="Release a leased token",
                text="Ends the lease; the token is free at once. With `force=true`, a manager of the pool ends the"
                " lease of another user, and can give a `reason`, which is logged. With `take=true` too, the manager"
                " gets the token in the same step, with a new lease.",
                parameters=[
                    _POOL,
                    _POOL_TOKEN,
                    Parameter("force", "End the lease of another user.", bool),
                    Parameter("take", "With `force`: lease the token to me.", bool),
                ],
                body=pools.ReleaseRequest,
                body_required=False,
                example={"holder": "build-7"},
                answers=[
                    Answer(204, "The lease has ended."),
                    Answer(200, "The lease has ended, and this is the new one.", pools.LeaseAnswer, _LEASE),
                ],
                refusals=[*_IN_POOL, errors.UnknownToken, *JSON_BODY, errors.LeaseLost, errors.NotYourLease],
            ),
            Operation(
                method="PUT",
                path="/api/pools/{pool}/members/{name}/reservation",
                id="reserveMember",
                title="Reserve a member",
                text="Keeps a member from being leased until an instant, or lets only one user lease it. A lease that"
                " it has goes on; the reservation applies when it is over. This needs the scope that manages the pool.",
                parameters=[_PHONES, _MEMBER_NAME, Parameter("force", "Replace a reservation of another user.", bool)],
                body=pools.ReserveRequest,
                example={"until": "24h", "note": "battery swap"},
                answers=[Answer(200, "The member.", pools.PoolTokenAnswer, _PHONE)],
                refusals=[*_IN_POOL, errors.UnknownMember, *JSON_BODY, errors.AlreadyReserved],
            ),
            Operation(
                method="DELETE",
                path="/api/pools/{pool}/members/{name}/reservation",
                id="endReservation",
                title="End a reservation",
                text="The member can be leased again, at once or when its lease is over. This needs the scope that"
                " manages the pool.",
                parameters=[_PHONES, _MEMBER_NAME],
                answers=[Answer(204, "The member is not reserved.")],
                refusals=[*_IN_POOL, errors.UnknownMember],
            ),
            Operation(
                method="GET",
                path="/api/pools/{pool}",
                id="showPool",
                title="Show a pool",
                text="Lists the tokens of a pool, page by page. Managers of the pool see all tokens; other users see"
                " the leased ones, and the values of their own. In a pool with members, everyone sees all members.",
                parameters=[
                    _POOL,
                    Parameter("after", "Where the page begins: the `next` of the page before."),
                    Parameter(
                        "limit", "Tokens on a page. Default: 100.", Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]
                    ),
                ],
                answers=[
                    Answer(
                        200,
                        "The pool and its tokens.",
                        pools.PoolPageAnswer,
                        {
                            "name": "permits",
                            "capacity": 1,
                            "available": 0,
                            "leased": 1,
                            "waiting": 0,
                            "manager": False,
                            "tokens": [_MEMBER],
                            "next": None,
                        },
                    )
                ],
                refusals=_IN_POOL,
            ),
            Operation(
                method="POST",
                path="/api/pools/{pool}/tokens",
                id="generateTokens",
                title="Generate tokens",
                text="Adds free tokens to a pool. This needs the scope that manages the pool.",
                parameters=[_POOL._replace(example="bounded")],
                body=pools.GenerateRequest,
                body_required=False,
                example={"count": 1},
                answers=[Answer(201, "The new tokens.", pools.GeneratedAnswer, {"tokens": [_GENERATED_VALUE]})],
                refusals=[*_IN_POOL, *JSON_BODY, errors.PoolFull],
            ),
            Operation(
                method="GET",
                path="/api/pools/{pool}/tokens/{token}",
                id="showPoolToken",
                title="Show a token of a pool",
                text="Returns one token, and its lease if it is leased. `fence` is that of the latest lease.",
                parameters=[_POOL, _POOL_TOKEN],
                answers=[Answer(200, "The token.", pools.PoolTokenAnswer, _MEMBER)],
                refusals=[*_IN_POOL, errors.UnknownToken],
            ),
            Operation(
                method="DELETE",
                path="/api/pools/{pool}/tokens/{token}",
                id="deleteToken",
                title="Delete a token of a pool",
                text="Deletes a token, also while it is leased. This needs the scope that manages the pool.",
                parameters=[_POOL._replace(example="bounded"), _POOL_TOKEN._replace(example=_GENERATED_VALUE)],
                answers=[Answer(204, "The token is deleted.")],
                refusals=[*_IN_POOL, errors.UnknownToken],
            ),
        )
    ],
)


class ClientForm(msgspec.Struct):
    """A client, unless it authenticates by HTTP Basic."""

    client_id: Annotated[str, schema_only(maxLength=MAX_NAME, pattern=NO_NUL)] | msgspec.UnsetType = msgspec.UNSET
    client_secret: Annotated[str, schema_only(maxLength=MAX_LENGTH, pattern=NO_NUL)] | msgspec.UnsetType = msgspec.UNSET


class GrantForm(ClientForm, kw_only=True):
    grant_type: Literal["client_credentials"]
    scope: str | msgspec.UnsetType = msgspec.UNSET


class TokenForm(ClientForm, kw_only=True):
    token: Annotated[str, schema_only(minLength=1)]
    token_type_hint: str | msgspec.UnsetType = msgspec.UNSET


_CLIENT: Refusals = (
    errors.InvalidRequest,
    exceptions.BodyTooLarge,
    exceptions.InvalidClient,
    errors.TooManyAttempts,
    *STORE,
    exceptions.ForeignOrigin,
)
_CLIENT_SECURITY = ((), (BASIC,))
_CLIENT_EXAMPLE = {"client_id": "admin", "client_secret": "admin"}
_ISSUER = "https://auth.example.com"
_METADATA = Operation(
    method="GET",
    path=oauth.METADATA,
    id="getServerMetadata",
    title="Get the server metadata",
    text="Authorization server metadata (RFC 8414). It exists if `oauth.issuer` is set in the configuration.",
    answers=[
        Answer(
            200,
            "The metadata.",
            oauth.MetadataAnswer,
            msgspec.to_builtins(
                oauth.MetadataAnswer(
                    _ISSUER, f"{_ISSUER}/oauth/token", f"{_ISSUER}/oauth/introspect", f"{_ISSUER}/oauth/revoke"
                )
            ),
        )
    ],
    refusals=[exceptions.NotFound],
)


def oauth_section(issuer: str) -> Section:
    """Return the OAuth 2.0 endpoints; the metadata of an issuer with a path has a second address (RFC 8414)."""
    path = oauth.METADATA + unquote(urlsplit(issuer).path)
    second = [replace(_METADATA, path=path, id="getServerMetadataOfPath")] if path != oauth.METADATA else []
    return replace(OAUTH, operations=[*OAUTH.operations, *second])


OAUTH = Section(
    name="OAuth 2.0",
    text="For standard OAuth 2.0 client libraries. Clients are users of the configuration: `client_id` is a user name,"
    " `client_secret` the password.",
    operations=[
        Operation(
            method="POST",
            path="/oauth/token",
            id="issueAccessToken",
            title="Get an access token",
            text="Issues a token to a client (client credentials grant, RFC 6749 section 4.4). The client"
            " authenticates in the form or by HTTP Basic.",
            body=GrantForm,
            media=FORM,
            example={"grant_type": "client_credentials", **_CLIENT_EXAMPLE},
            answers=[
                Answer(
                    200,
                    "The token. `scope` is all that the client may do.",
                    oauth.GrantAnswer,
                    {"access_token": _ACCESS_VALUE, "expires_in": 86400, "scope": "admin", "token_type": "Bearer"},
                )
            ],
            refusals=[*_CLIENT, exceptions.InvalidScope, exceptions.UnsupportedGrantType],
            security=_CLIENT_SECURITY,
        ),
        Operation(
            method="POST",
            path="/oauth/introspect",
            id="introspectToken",
            title="Introspect a token",
            text="Returns whether a token is valid and whose it is (RFC 7662). The client authenticates in the form, by"
            " HTTP Basic or with a token of its own, and needs the scope `introspect`: add it to the user's `scopes`.",
            body=TokenForm,
            media=FORM,
            parameters=[_TOUCH],
            example={"token": _ACCESS_VALUE, **_CLIENT_EXAMPLE},
            answers=[
                Answer(
                    200,
                    "A valid token.",
                    oauth.ActiveAnswer,
                    {
                        "sub": "admin",
                        "username": "admin",
                        "client_id": "admin",
                        "scope": "admin introspect",
                        "iat": _ISSUED_AT,
                        "exp": _EXPIRES_AT,
                        "jti": _ID,
                        "active": True,
                        "token_type": "Bearer",
                    },
                ),
                Answer(200, "Any other token.", oauth.InactiveAnswer, {"active": False}),
            ],
            refusals=[*_CLIENT, errors.InvalidToken, errors.InsufficientScope],
            security=(*_CLIENT_SECURITY, (X_TOKEN,), (BEARER,)),
        ),
        Operation(
            method="POST",
            path="/oauth/revoke",
            id="revokeAccessToken",
            title="Revoke a token",
            text="Revokes a token (RFC 7009). For a token that is not valid the answer is the same.",
            body=TokenForm,
            media=FORM,
            example={"token": _ACCESS_VALUE, **_CLIENT_EXAMPLE},
            answers=[Answer(200, "The token is not valid.")],
            refusals=_CLIENT,
            security=_CLIENT_SECURITY,
        ),
        _METADATA,
    ],
)

_FILE_HEADERS = {
    "ETag": "Names this version of the file. Send it as `If-None-Match` to get `304` while it is the same.",
    "Access-Control-Allow-Origin": "Always `*`: pages of any origin may load it.",
}

WEB_PAGES = Section(
    name="Web pages",
    text="A JavaScript module for pages that log in.",
    operations=[
        Operation(
            method="GET",
            path=javascript.MODULE,
            id="getJavaScriptModule",
            title="Get the JavaScript module",
            text='For `import { TokenAuth } from "https://auth.example.com/tokenauth.js"`: log in, log out, and `fetch`'
            " with the token.",
            answers=[
                Answer(200, "The module.", media="text/javascript", headers=_FILE_HEADERS),
                Answer(304, "The browser has this version.", headers=_FILE_HEADERS),
            ],
        ),
        Operation(
            method="GET",
            path=javascript.TYPES,
            id="getTypeScriptTypes",
            title="Get the types of the module",
            text="The types of the module, for TypeScript.",
            answers=[
                Answer(200, "The types.", media="text/plain", headers=_FILE_HEADERS),
                Answer(304, "The client has this version.", headers=_FILE_HEADERS),
            ],
        ),
    ],
)

_HOUR = [None] * 60  # as of a service that was just started
_STATUS = {
    "version": "0.1.0+3f1c9a52",
    "time": _ISSUED_AT,
    "started_at": _ISSUED_AT - 90,
    "workers": [{"pid": 4711, "started_at": _ISSUED_AT - 89}],
    "workers_configured": 1,
    "worker_crashes": 0,
    "store": {
        **{"kind": "sqlite", "schema": "4.1", "up": True},
        **{"feed_age": 0.0, "revocations_held": 0, "live_tokens": 17},
    },
    "audit": None,
    "password_queue": 0,
    "risks": [
        {
            "name": "shipped_password",
            "text": "'admin' has the password that tokenauth ships with; run `tokenauth user passwd admin`",
        }
    ],
    "totals": {
        "logins": {
            **{"ok": 12, "invalid_credentials": 3, "too_many_attempts": 0},
            **{"overloaded": 0, "client_gone": 0, "store_unavailable": 0},
        },
        "validations": {"valid": 40, "invalid": 2, "denied": 0, "unavailable": 0},
        "throttle_refusals": 0,
    },
    "pools": [
        {
            **{"name": "permits", "capacity": 1, "leased": 1, "waiting": 2},
            **{"granted": 9, "denied": 1, "lapsed": 0, "forced": 0},
        }
    ],
    "history": {
        **{"step": 60, "end": _ISSUED_AT, "logins": _HOUR, "failures": _HOUR},
        **{"validations": _HOUR, "leases": _HOUR, "waiting": _HOUR},
    },
}

HEALTH = Section(
    name="Health",
    text="For load balancers and monitoring.",
    operations=[
        guarded(
            Operation(
                method="GET",
                path="/api/status",
                id="getStatus",
                title="Find out how the service is doing",
                text="Returns the sums of all workers of the node that answers, and the last hour, minute by minute."
                " The user needs the scope `admin`.",
                answers=[Answer(200, "The status.", status.StatusAnswer, _STATUS)],
                refusals=[errors.InsufficientScope],
            )
        ),
        Operation(
            method="GET",
            path="/healthz",
            id="getHealth",
            title="Check that the process is running",
            text="The answer is `200` while the process is running, also without a database.",
            answers=[Answer(200, "It is running.", health.AliveAnswer, {"status": "ok"})],
        ),
        Operation(
            method="GET",
            path="/readyz",
            id="getReadiness",
            title="Check that the service can serve",
            text="The answer is `503` with a reason while the service cannot serve, for example without a database."
            " With `200`, `audit` says why the audit log cannot be written, if so: that stops no request.",
            answers=[
                Answer(200, "It can serve.", health.ReadyAnswer, {"status": "ready"}),
                Answer(
                    503,
                    "It cannot serve.",
                    health.NotReadyAnswer,
                    {"reason": "The database is unavailable.", "status": "not ready"},
                ),
            ],
        ),
    ],
)

DOCUMENTATION = Section(
    name="API documentation",
    text="This document and this page.",
    operations=[
        Operation(
            method="GET",
            path="/openapi.json",
            id="getOpenapiDocument",
            title="Get this document",
            text="The OpenAPI 3.1 document of this API.",
            answers=[Answer(200, "The document.", Document, {"openapi": "3.1.0"})],
        ),
        Operation(
            method="GET",
            path="/docs",
            id="getDocumentationPage",
            title="Open this page",
            text="A page that shows the document, and can send requests.",
            answers=[Answer(200, "The page.", media="text/html")],
        ),
        Operation(
            method="GET",
            path="/docs/{file}",
            id="getDocumentationFile",
            title="Get a file of this page",
            text="The scripts and styles of the page.",
            parameters=[Parameter("file", "The name of a file of the page.", str, "start.js")],
            answers=[Answer(200, "The file.", media="*/*")],
            refusals=[exceptions.NotFound],
        ),
    ],
)


def _console() -> Section:
    return Section(
        name="Console",
        text="A page for people and operators: logins, named tokens and pools. It calls this API.",
        operations=[
            Operation(
                method="GET",
                path="/console",
                id="getConsole",
                title="Open the console",
                text="The page. It shows what the person who logs in there may see.",
                answers=[Answer(200, "The page.", media="text/html")],
            ),
            Operation(
                method="GET",
                path="/console/{version}/{file}",
                id="getConsoleFile",
                title="Get a file of the console",
                text="The scripts and styles of the page. Their address changes with each version of them.",
                parameters=[
                    Parameter("version", "The version that the page names.", str, console.version()),
                    Parameter("file", "The name of a file of the page.", str, "app.js"),
                ],
                answers=[Answer(200, "The file.", media="*/*", headers={"Cache-Control": "`immutable`: keep it."})],
                refusals=[exceptions.NotFound],
            ),
        ],
    )


def _home(browsers: bool) -> Operation:
    example = {
        "service": "tokenauth",
        "health": "/readyz",
        "console": "/console",
        "docs": "/docs",
        "openapi": "/openapi.json",
    }
    answers = [Answer(200, "Where to find what, for programs.", home.HomeAnswer, example)]
    if browsers:
        answers += [
            _page(200, "A page with the logins of the person whose cookie was sent."),
            Answer(303, "To the login page: no one is logged in.", headers={"Location": "The login page.", **_COOKIE}),
            _page(503, "The database is unavailable.", **_RETRY),
        ]
    else:
        answers.append(_page(200, "A page for people: what this service is."))
    return Operation(
        method="GET",
        path="/",
        id="getHomePage",
        title="Find out what this service is",
        text="A page for browsers, which send `Accept: text/html`. JSON for all others.",
        answers=answers,
    )
