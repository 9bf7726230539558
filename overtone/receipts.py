"""Receipts: signed statements of what was erased, which anybody with the public key can check.

A receipt is a JSON object with a `body` and, beside it, the Ed25519 signature of the body's canonical form (sorted
keys, no spaces, UTF-8) and the public key. It holds ids and counts, never a text.
"""

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from overtone.errors import ConfigurationError, DataError
from overtone.settings import Settings

KEY_FILE = "erasure_key"
_KEY_BYTES = 32
_ALGORITHM = "Ed25519"


def signing_key(settings: Settings) -> Ed25519PrivateKey:
    """The key of `settings.erasure_signing_key` or, where that is unset, of the home, where one is made if need be.

    Raises:
        ConfigurationError: the key is not 32 bytes in base64, or its file can be neither read nor made.
    """
    if settings.erasure_signing_key is not None:
        return _key_of(settings.erasure_signing_key.get_secret_value(), "ERASURE_SIGNING_KEY")
    path = settings.home / KEY_FILE
    try:
        if not path.exists():
            _make_key_file(path)
        return _key_of(path.read_text(encoding="ascii"), str(path))
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{path}: the key of erasure receipts cannot be read or made ({error})") from error


def public_key(key: Ed25519PrivateKey) -> str:
    """The public half of `key`, 32 bytes in base64."""
    return base64.b64encode(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def sign(body: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """The receipt with `body`, signed with `key`."""
    signature = base64.b64encode(key.sign(_canonical(body))).decode()
    return {"body": dict(body), "algorithm": _ALGORITHM, "public_key": public_key(key), "signature": signature}


def verify(receipt: Any, trusted: str) -> dict[str, Any]:
    """The body of `receipt`, if it is whole and signed by the public key `trusted` (base64).

    Raises:
        DataError: it is no receipt, was changed, or was signed with another key.
    """
    try:
        body, claimed = receipt["body"], str(receipt["public_key"])
        signature = base64.b64decode(receipt["signature"], validate=True)
        algorithm = receipt["algorithm"]
        Ed25519PublicKey.from_public_bytes(base64.b64decode(trusted, validate=True)).verify(signature, _canonical(body))
    except InvalidSignature:
        if claimed != trusted:
            raise DataError("The receipt was signed with another key than the one it is checked with.") from None
        raise DataError("The receipt was changed after it was signed.") from None
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise DataError(f"This is no erasure receipt ({type(error).__name__}).") from error
    if algorithm != _ALGORITHM or not isinstance(body, dict):
        raise DataError(f"This is no erasure receipt: its algorithm must be {_ALGORITHM}.")
    return body


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def _key_of(written: str, where: str) -> Ed25519PrivateKey:
    try:
        seed = base64.b64decode(written.strip(), validate=True)
        if len(seed) != _KEY_BYTES:
            raise ValueError
    except ValueError:
        raise ConfigurationError(f"{where}: must be {_KEY_BYTES} bytes in base64") from None
    return Ed25519PrivateKey.from_private_bytes(seed)


def _make_key_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    seed = base64.b64encode(Ed25519PrivateKey.generate().private_bytes_raw())
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(seed + b"\n")
    try:
        # Of two processes that make one at once, the first wins.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
