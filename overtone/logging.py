"""Log lines: JSON for machines or console colours for people, one event name and its fields a line.

`configure` is called by entry points only. Post text, author ids and secrets are never passed to a logger; as a
second guard the keys under which they would travel are masked.
"""

import logging
import sys
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

_MASKED = frozenset({"text", "texts", "author_id", "authorization", "api_key", "token", "password", "bearer_token"})


def configure(service: str, level: str = "INFO", format: Literal["json", "console"] = "json") -> None:
    """Send the log lines of this process to standard error as `service`."""
    renderer: Any
    if format == "json":
        renderer = structlog.processors.JSONRenderer(sort_keys=False)
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
            structlog.processors.add_log_level,
            _constant("service", service),
            _mask,
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def get_logger(**bound: Any) -> FilteringBoundLogger:
    """A logger whose every line carries `bound`. Event names are `area.verb_past`, such as `stream.connected`."""
    logger: FilteringBoundLogger = structlog.get_logger(**bound)
    return logger


def is_enabled_for(level: str) -> bool:
    """Whether lines of `level` are shown, for callers that would gather their fields in vain."""
    return bool(structlog.get_logger().is_enabled_for(logging.getLevelNamesMapping()[level]))


def _constant(key: str, value: str) -> Any:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event[key] = value
        return event

    return add


def _mask(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key in _MASKED.intersection(event):
        event[key] = "***"
    return event
