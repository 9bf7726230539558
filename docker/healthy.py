"""Exits with 0 if the server at the address given answers with 200: by default the API of this container, /ready."""

import sys
import urllib.error
import urllib.request


def is_healthy(address: str) -> bool:
    """Whether `address` answers with 200 within 2 seconds."""
    try:
        with urllib.request.urlopen(address, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


if __name__ == "__main__":
    sys.exit(0 if is_healthy(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/ready") else 1)
