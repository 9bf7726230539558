"""The X API's refusals and notices, word for word where X documents them."""

from typing import Any, Literal

from aiohttp import web

PROBLEMS = "https://api.x.com/2/problems/"

Reason = Literal["rate_limit", "too_many_connections", "usage_cap"]
"""The three things a 429 can mean."""

_TITLES = {400: "Invalid Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 409: "ConnectionException"}

RATE_LIMIT = {"errors": [{"code": 88, "message": "Rate limit exceeded"}]}
TOO_MANY_CONNECTIONS = {
    "title": "ConnectionException",
    "detail": "This stream is currently at the maximum allowed connection limit.",
    "connection_issue": "TooManyConnections",
    "type": PROBLEMS + "streaming-connection",
}
USAGE_CAP = {
    "title": "UsageCapExceeded",
    "period": "Monthly",
    "scope": "Product",
    "product_name": "standard-basic",
    "account_id": "1",
    "detail": "Usage cap exceeded: Monthly product cap",
    "type": PROBLEMS + "usage-capped",
}
_THROTTLED: dict[Reason, dict[str, Any]] = {
    "rate_limit": RATE_LIMIT,
    "too_many_connections": TOO_MANY_CONNECTIONS,
    "usage_cap": USAGE_CAP,
}

OPERATIONAL_DISCONNECT = {
    "errors": [
        {
            "title": "operational-disconnect",
            "disconnect_type": "UpstreamOperationalDisconnect",
            "detail": "This stream has been disconnected upstream for operational reasons.",
            "type": PROBLEMS + "operational-disconnect",
        }
    ]
}
ERROR_LINE = {
    "errors": [
        {
            "title": "Not Found Error",
            "detail": "Could not find tweet with referenced_tweets.id: [1].",
            "resource_type": "tweet",
            "parameter": "referenced_tweets.id",
            "value": "1",
            "type": PROBLEMS + "resource-not-found",
        }
    ]
}
"""What a post carries beside its data when something it refers to is gone; it may also come alone."""


def refused(status: int, reason: Reason = "rate_limit", detail: str = "Refused on purpose.") -> web.Response:
    """The answer with `status`; of a 429 `reason` says which one."""
    if status == 429:
        return web.json_response(_THROTTLED[reason], status=429)
    return problem(status, _TITLES.get(status, "Service Unavailable"), "about:blank", detail)


def problem(status: int, title: str, kind: str, detail: str) -> web.Response:
    """An answer with one problem."""
    return web.json_response({"title": title, "type": kind, "status": status, "detail": detail}, status=status)


def bad_request(detail: str) -> web.Response:
    """The answer to parameters that are not as documented."""
    return web.json_response(
        {
            "errors": [{"message": detail}],
            "title": "Invalid Request",
            "detail": "One or more parameters to your request was invalid.",
            "type": PROBLEMS + "invalid-request",
        },
        status=400,
    )


def no_rules() -> web.Response:
    """The answer to a connection without any rule."""
    return problem(409, _TITLES[409], PROBLEMS + "rules", "There are no rules; add one before you connect.")
