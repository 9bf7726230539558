"""Lengths of time as people type them: `90`, `90s`, `2m`, `1h30m`."""

import re

from overtone.errors import ConfigurationError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def parse_duration(text: str, *, longest_days: int = 30) -> float:
    """Seconds of `text`: a number of seconds, or numbers with the units s, m, h and d one after another.

    Raises:
        ConfigurationError: it is no such thing, not above 0 or over `longest_days`.
    """
    compact = text.strip().lower().replace(" ", "")
    if re.fullmatch(r"\d+(?:\.\d+)?", compact):
        seconds = float(compact)
    else:
        parts = _PART.findall(compact)
        if not parts or "".join(number + unit for number, unit in parts) != compact:
            raise ConfigurationError(f"{text!r} is no length of time: write for example 90s, 2m or 1h30m.")
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not 0 < seconds <= longest_days * 86_400:
        raise ConfigurationError(f"{text!r}: a length of time is above 0 and at most {longest_days} days.")
    return seconds


def in_words(seconds: float) -> str:
    """`seconds` for people: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
