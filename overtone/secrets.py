"""Where secrets may be kept instead of the environment: a folder, AWS Secrets Manager or HashiCorp Vault.

A store holds secrets by the names of the variables that they stand for, in any case: as files of a folder, which is how
Kubernetes and Docker hand them over, or as the keys of one JSON object. The library of a store is imported when the
store is opened. Nothing here knows which variables there are, and no message repeats a secret.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from overtone.errors import ConfigurationError, EnvironmentProblemError, UnavailableError

_MAX_BYTES = 64 * 1024
_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 10.0
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_OPTIONS = {
    "file": frozenset[str](),
    "aws": frozenset({"region"}),
    "vault": frozenset({"role", "auth", "namespace", "kv"}),
}


class SecretStore(Protocol):
    """One place where secrets are kept. Reading blocks."""

    def read(self, token: str | None) -> dict[str, str]:
        """Every secret there, by its name in lower case. `token` is what a Vault without a role is shown.

        Raises:
            ConfigurationError: there is no such place, or what is in it cannot be read as secrets.
            UnavailableError: it does not answer, or refuses.
        """
        ...


def open_stores(addresses: Sequence[str]) -> list[SecretStore]:
    """The stores that `addresses` name; nothing is read yet.

    Raises:
        ConfigurationError: an address is not one.
        EnvironmentProblemError: the library that speaks to a store is not installed.
    """
    return [_open(address) for address in addresses]


def check_address(address: str) -> str:
    """`address`, if it is that of a store.

    Raises:
        ValueError: it is not; the message says what is wrong and never repeats the address.
    """
    parts = urlsplit(address)
    kind = parts.scheme.removesuffix("+http")
    allowed = _OPTIONS.get(kind)
    if allowed is None or parts.scheme not in {kind, "vault+http"}:
        raise ValueError("must begin with file://, aws:// or vault://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user or password")
    unknown = sorted(set(parse_qs(parts.query, keep_blank_values=True)) - allowed)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not an option of {kind}://")
    if kind == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise ValueError("file:// must be followed by the absolute path of a folder")
    if kind == "aws" and not _aws_name(parts.netloc, parts.path):
        raise ValueError("aws:// must be followed by the name of a secret")
    if kind == "vault" and (not parts.hostname or len(parts.path.strip("/").split("/", 1)) < 2):
        raise ValueError("vault:// must be followed by HOST:PORT/MOUNT/PATH")
    if parts.scheme == "vault+http" and parts.hostname not in _LOOPBACK:
        raise ValueError("vault+http:// is for loopback alone: secrets would cross the network in the clear")
    return address


def read_file(path: Path) -> str:
    """The secret in a file, without the line break at its end.

    Raises:
        ConfigurationError: the file cannot be read, or is no text of at most 64 KiB.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigurationError(f"{path}: longer than a secret may be, {_MAX_BYTES} bytes.")
        return content.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: not UTF-8 text.") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror or type(error).__name__}).") from None


class Folder:
    """Files, each named after what it holds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, token: str | None) -> dict[str, str]:
        """See `SecretStore.read`."""
        try:
            # Kubernetes keeps the files of one state in a folder with a leading dot, which it exchanges as a whole.
            files = [path for path in self._folder.iterdir() if not path.name.startswith(".") and path.is_file()]
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ConfigurationError(f"The folder of secrets {self._folder} cannot be read ({why}).") from None
        return {path.name.lower(): read_file(path) for path in files}


class AwsSecret:
    """One secret of AWS Secrets Manager, a JSON object. Region and credentials are found as boto3 finds them."""

    def __init__(self, name: str, region: str | None) -> None:
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError as error:
            raise _missing("AWS Secrets Manager", error) from None
        self._name = name
        limits = Config(
            connect_timeout=_CONNECT_TIMEOUT_S, read_timeout=_READ_TIMEOUT_S, retries={"total_max_attempts": 3}
        )
        try:
            self._client: Any = boto3.session.Session(region_name=region).client("secretsmanager", config=limits)
        except BotoCoreError as error:
            raise ConfigurationError(f"AWS Secrets Manager cannot be asked: {type(error).__name__}.") from None

    def read(self, token: str | None) -> dict[str, str]:
        """See `SecretStore.read`."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer = self._client.get_secret_value(SecretId=self._name)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            kind = ConfigurationError if code == "ResourceNotFoundException" else UnavailableError
            raise kind(f"AWS Secrets Manager does not give the secret {self._name!r}: {code}.") from None
        except BotoCoreError as error:
            raise UnavailableError(f"AWS Secrets Manager does not answer: {type(error).__name__}.") from None
        try:
            found = json.loads(answer.get("SecretString") or "")
        except ValueError:
            found = None
        return _by_name(found, f"The secret {self._name!r} of AWS Secrets Manager")


class VaultSecret:
    """One secret of a key-value engine of HashiCorp Vault or OpenBao."""

    def __init__(self, url: str, mount: str, path: str, options: Mapping[str, str]) -> None:
        try:
            import hvac
        except ImportError as error:
            raise _missing("Vault", error) from None
        self._mount, self._path, self._options = mount, path, options
        self._name = f"{mount}/{path}"
        timeouts: Any = (_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S)
        # An empty token: hvac would look for one in places that are not settings.
        self._client: Any = hvac.Client(url=url, token="", namespace=options.get("namespace"), timeout=timeouts)

    def read(self, token: str | None) -> dict[str, str]:
        """See `SecretStore.read`."""
        import hvac.exceptions
        import requests

        try:
            found = self._ask(token)
        except hvac.exceptions.InvalidPath:
            raise ConfigurationError(f"Vault has no secret {self._name!r}.") from None
        except (hvac.exceptions.VaultError, requests.RequestException) as error:
            raise UnavailableError(f"Vault does not give the secret {self._name!r}: {type(error).__name__}.") from None
        return _by_name(found, f"The secret {self._name!r} of Vault")

    def _ask(self, token: str | None) -> object:
        import hvac.exceptions

        if "role" not in self._options:
            self._client.token = token or ""
            return self._get()
        if self._client.token:
            try:
                return self._get()
            except hvac.exceptions.Forbidden:  # what signing in gave has ended
                pass
        self._sign_in()
        return self._get()

    def _sign_in(self) -> None:
        """With the service account of this pod, which Kubernetes vouches for."""
        self._client.auth.kubernetes.login(
            role=self._options["role"],
            jwt=read_file(_SERVICE_ACCOUNT),
            mount_point=self._options.get("auth", "kubernetes"),
        )

    def _get(self) -> object:
        if self._options.get("kv") == "1":
            answer = self._client.secrets.kv.v1.read_secret(path=self._path, mount_point=self._mount)
            return answer["data"]
        answer = self._client.secrets.kv.v2.read_secret_version(
            path=self._path, mount_point=self._mount, raise_on_deleted_version=True
        )
        return answer["data"]["data"]


def _open(address: str) -> SecretStore:
    try:
        parts = urlsplit(check_address(address))
    except ValueError as error:
        raise ConfigurationError(f"SECRETS_FROM: {error}.") from None
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if parts.scheme == "file":
        return Folder(Path(unquote(parts.path)))
    if parts.scheme == "aws":
        return AwsSecret(_aws_name(parts.netloc, parts.path), options.get("region"))
    mount, path = unquote(parts.path).strip("/").split("/", 1)
    scheme = "http" if parts.scheme == "vault+http" else "https"
    return VaultSecret(f"{scheme}://{parts.netloc}", mount, path, options)


def _aws_name(start: str, rest: str) -> str:
    return unquote(f"{start}{rest}").strip("/")


def _by_name(found: object, what: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ConfigurationError(f"{what} must be a JSON object of texts by the names of variables.")
    return {str(name).lower(): value for name, value in found.items()}


def _missing(what: str, error: ImportError) -> EnvironmentProblemError:
    return EnvironmentProblemError(f"{what} needs {error.name}: pip install 'overtone[secrets]'.")
