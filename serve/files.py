"""The page's files, from the package."""

import re
from functools import cache
from importlib import resources

from starlette.responses import Response

from overtone.errors import NotFoundError

_PAGE = "serve.page"
_STATIC_PATH = re.compile(r"[\w-]+(?:[./][\w-]+)*")
_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/x-icon",
    "woff2": "font/woff2",
    "json": "application/json",
    "txt": "text/plain; charset=utf-8",
}
_PAGE_POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


@cache
def _file_bytes(path: str) -> bytes | None:
    found = resources.files(_PAGE).joinpath(*path.split("/"))
    return found.read_bytes() if found.is_file() else None


def file_response(path: str) -> Response:
    """The file at `path` within the page's folder.

    Raises:
        NotFoundError: there is none of that name, or it is not of a kind that is served.
    """
    kind = _TYPES.get(path.rpartition(".")[2])
    content = _file_bytes(path) if kind and len(path) <= 200 and _STATIC_PATH.fullmatch(path) else None
    if content is None or kind is None:
        raise NotFoundError("There is no such file.")
    headers = {
        "content-security-policy": _PAGE_POLICY,
        "cache-control": "no-cache",
        "content-type": kind,
    }
    return Response(content, headers=headers)
