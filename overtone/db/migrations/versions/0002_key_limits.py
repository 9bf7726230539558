"""Limits of API keys, and secrets that stay good for a while after a key was rotated."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

_KIND = "ck_api_keys_kind"


def upgrade() -> None:
    for name, kind, comment in (
        ("requests_per_minute", sa.Integer(), "Null: the default of the settings; 0: no limit."),
        ("texts_per_minute", sa.Integer(), "Null: the default of the settings; 0: no limit."),
        ("texts_per_day", sa.BigInteger(), "Null: the default of the settings; 0: no limit."),
    ):
        op.add_column("api_keys", sa.Column(name, kind, nullable=True, comment=comment), schema="overtone")
    op.drop_constraint(op.f(_KIND), "api_keys", schema="overtone", type_="check")
    op.create_check_constraint(
        op.f(_KIND), "api_keys", "kind IN ('key', 'sign_in', 'session', 'retired')", schema="overtone"
    )
    op.create_check_constraint(
        op.f("ck_api_keys_limits"),
        "api_keys",
        "least(requests_per_minute, texts_per_minute, texts_per_day) >= 0",
        schema="overtone",
    )


def downgrade() -> None:
    op.execute("DELETE FROM overtone.api_keys WHERE kind = 'retired'")
    op.drop_constraint(op.f("ck_api_keys_limits"), "api_keys", schema="overtone", type_="check")
    op.drop_constraint(op.f(_KIND), "api_keys", schema="overtone", type_="check")
    op.create_check_constraint(op.f(_KIND), "api_keys", "kind IN ('key', 'sign_in', 'session')", schema="overtone")
    for name in ("texts_per_day", "texts_per_minute", "requests_per_minute"):
        op.drop_column("api_keys", name, schema="overtone")
