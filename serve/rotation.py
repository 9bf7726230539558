"""Which parts of a replica take in which secret when it changes."""

from pydantic import SecretStr

from overtone.rotation import Rotation
from overtone.settings import Settings
from serve.cache import Cache, RedisCache
from serve.quotas import Quotas
from serve.store import Store
from serve.tokens import Tokens


def follow_secrets(
    rotation: Rotation, *, store: Store, tokens: Tokens | None, quotas: Quotas, cache: Cache | None
) -> None:
    """Have the parts use the secrets of `rotation` as they change.

    An address that is gone changes nothing: a part that had a server cannot do without.
    """

    async def move_store(settings: Settings) -> None:
        if settings.database_url is not None:
            await store.move_to(settings.database_url.get_secret_value())

    async def move_redis(settings: Settings) -> None:
        if settings.redis_url is not None:
            await quotas.move_to(settings.redis_url.get_secret_value())
            if isinstance(cache, RedisCache):
                await cache.move_to(settings.redis_url.get_secret_value())

    rotation.follow("database_url", move_store)
    rotation.follow("redis_url", move_redis)
    if tokens is not None:
        rotation.follow("jwt_secret", tokens.use_secrets)
        rotation.follow("jwt_secret_previous", tokens.use_secrets)


def address(secret: SecretStr | None) -> str | None:
    """What `secret` holds."""
    return secret.get_secret_value() if secret else None
