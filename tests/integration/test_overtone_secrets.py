"""Secrets of AWS Secrets Manager, as moto's server speaks it, and of Vault, as a server of this test does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from overtone import secrets
from overtone.errors import ConfigurationError, UnavailableError
from overtone.rotation import Rotation
from overtone.settings import Settings, load_settings

LONG = "a secret of more than thirty-two bytes"
URL = "postgresql://u:hunter2@h/d"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an AWS Secrets Manager that is empty, which settings will ask too."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_SECRETS_MANAGER", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    yield boto3.session.Session(region_name="eu-central-1").client("secretsmanager")
    httpx.post(f"http://{host}:{port}/moto-api/reset", trust_env=False).raise_for_status()
    server.stop()


async def test_a_secret_of_aws_is_read_and_followed(aws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    aws.create_secret(Name="overtone/prod", SecretString=json.dumps({"DATABASE_URL": URL, "jwt_secret": LONG}))
    monkeypatch.setenv("SECRETS_FROM", "aws://overtone/prod?region=eu-central-1")
    settings = load_settings()
    assert settings.database_url is not None
    assert settings.jwt_secret is not None
    assert settings.database_url.get_secret_value() == URL
    assert settings.jwt_secret.get_secret_value() == LONG

    rotation = Rotation(settings)
    seen: list[str] = []

    async def take(fresh: Settings) -> None:
        assert fresh.jwt_secret is not None
        seen.append(fresh.jwt_secret.get_secret_value())

    rotation.follow("jwt_secret", take)
    aws.put_secret_value(
        SecretId="overtone/prod", SecretString=json.dumps({"DATABASE_URL": URL, "JWT_SECRET": LONG * 2})
    )
    await rotation.refresh()
    assert seen == [LONG * 2]


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (None, ConfigurationError, "ResourceNotFoundException"),
        ("hunter2", ConfigurationError, "JSON object"),
        ('["hunter2"]', ConfigurationError, "JSON object"),
        ('{"DATABASE_URL": 7}', ConfigurationError, "JSON object"),
    ],
)
def test_a_secret_of_aws_that_is_none_is_told(
    aws: Any, monkeypatch: pytest.MonkeyPatch, content: str | None, kind: type[Exception], said: str
) -> None:
    if content is not None:
        aws.create_secret(Name="overtone", SecretString=content)
    monkeypatch.setenv("SECRETS_FROM", "aws://overtone?region=eu-central-1")
    with pytest.raises(kind, match=said) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_an_aws_that_does_not_answer_is_unavailable(aws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SECRETS_MANAGER", "http://127.0.0.1:9")
    monkeypatch.setenv("SECRETS_FROM", "aws://overtone?region=eu-central-1")
    with pytest.raises(UnavailableError, match="does not answer"):
        load_settings()


class Vault:
    """As much of Vault as a reader of secrets asks for: key-value engines 1 and 2, tokens, sign-in by Kubernetes."""

    def __init__(self) -> None:
        self.secrets: dict[str, dict[str, str]] = {}
        self.tokens = {"root"}
        self.logins: list[dict[str, str]] = []
        self.namespaces: set[str | None] = set()
        vault = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                vault.namespaces.add(self.headers.get("X-Vault-Namespace"))
                if self.headers.get("X-Vault-Token") not in vault.tokens:
                    return self.reply(403, {"errors": ["permission denied"]})
                found = vault.secrets.get(self.path.removeprefix("/v1/"))
                if found is None:
                    return self.reply(404, {"errors": []})
                is_second = "/data/" in self.path
                return self.reply(200, {"data": {"data": found, "metadata": {"version": 1}} if is_second else found})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                vault.logins.append({"path": self.path, **body})
                token = f"login-{len(vault.logins)}"
                vault.tokens.add(token)
                self.reply(200, {"auth": {"client_token": token, "lease_duration": 60}})

            def reply(self, status: int, body: dict[str, Any]) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"vault+http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def vault() -> Iterator[Vault]:
    pytest.importorskip("hvac")
    vault = Vault()
    yield vault
    vault.stop()


@pytest.mark.parametrize(("path", "address"), [("secret/data/o/prod", "secret/o/prod"), ("old/o", "old/o?kv=1")])
def test_a_secret_of_vault_is_read_with_a_token(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, path: str, address: str
) -> None:
    vault.secrets[path] = {"DATABASE_URL": URL}
    separator = "&" if "?" in address else "?"
    monkeypatch.setenv("SECRETS_FROM", f"{vault.address}/{address}{separator}namespace=team")
    monkeypatch.setenv("VAULT_TOKEN", "root")
    settings = load_settings()
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == URL
    assert vault.namespaces == {"team"}


async def test_a_token_of_vault_may_be_exchanged_in_its_file(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As Vault's agent does it."""
    vault.secrets["secret/data/o"] = {"JWT_SECRET": LONG}
    (tmp_path / "token").write_text("root\n")
    monkeypatch.setenv("SECRETS_FROM", f"{vault.address}/secret/o")
    monkeypatch.setenv("VAULT_TOKEN_FILE", str(tmp_path / "token"))
    rotation = Rotation(load_settings())
    vault.tokens = {"other"}
    vault.secrets["secret/data/o"] = {"JWT_SECRET": LONG * 2}
    await rotation.refresh()
    assert rotation.settings.jwt_secret is not None
    assert rotation.settings.jwt_secret.get_secret_value() == LONG, "refused, so it stays"
    (tmp_path / "token").write_text("other\n")
    await rotation.refresh()
    assert rotation.settings.jwt_secret.get_secret_value() == LONG * 2


def test_a_pod_signs_in_to_vault_again_when_its_token_has_ended(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "account").write_text("signed by Kubernetes")
    monkeypatch.setattr(secrets, "_SERVICE_ACCOUNT", tmp_path / "account")
    vault.secrets["secret/data/o"] = {"JWT_SECRET": LONG}
    [store] = secrets.open_stores([f"{vault.address}/secret/o?role=overtone&auth=k8s"])
    assert store.read(None) == store.read(None) == {"jwt_secret": LONG}
    assert vault.logins == [{"path": "/v1/auth/k8s/login", "role": "overtone", "jwt": "signed by Kubernetes"}]
    vault.tokens = {"root"}
    assert store.read(None) == {"jwt_secret": LONG}
    assert len(vault.logins) == 2


def test_what_vault_does_not_give_is_told(vault: Vault) -> None:
    [store] = secrets.open_stores([f"{vault.address}/secret/o"])
    with pytest.raises(UnavailableError, match="Forbidden"):
        store.read("wrong")
    with pytest.raises(ConfigurationError, match="no secret 'secret/o'"):
        store.read("root")
    [away] = secrets.open_stores(["vault+http://127.0.0.1:9/secret/o"])
    with pytest.raises(UnavailableError, match="ConnectionError"):
        away.read("root")
