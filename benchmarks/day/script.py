"""The script of the day: the simulator's faults, and which process is killed when. Equal seeds, equal days."""

import random
from dataclasses import dataclass
from typing import Any, Literal

Victim = Literal["ingest", "api", "postgres"]


@dataclass(frozen=True, slots=True)
class Day:
    """One day."""

    posts: int
    seconds: float
    """How long posts are published."""
    seed: int = 7
    kills: int = 6
    real: int = 0
    """About so many of the posts are classified by the model, the rest by an engine without one."""
    outage_s: float = 0.0
    """How long PostgreSQL is gone once, from a third of the day on."""
    plan: Literal["self_serve", "enterprise"] = "self_serve"
    """By which means gaps are filled."""

    @property
    def real_share(self) -> float:
        """Of the posts, by the model."""
        return min(self.real / self.posts, 1.0)

    @property
    def outage_at_s(self) -> float | None:
        """When PostgreSQL goes for long; None when it does not."""
        return self.seconds / 3 if self.outage_s else None

    @property
    def rate(self) -> float:
        """Posts a second."""
        return self.posts / self.seconds


def scenario(day: Day) -> dict[str, Any]:
    """The simulator's scenario: every kind of fault, spread over the day."""

    def at(share: float, fault: str, **more: Any) -> dict[str, Any]:
        return {"at": round(share * day.seconds, 2), "fault": fault, **more}

    often, now_and_then = day.seconds / 8, day.seconds / 4
    return {
        "name": f"day of {day.posts} posts",
        "simulator": {
            "rate": day.rate,
            "limit": day.posts,
            "seed": day.seed,
            "keep_alive_s": 1.0,
            "has_backfill": True,
            # The day is short: what X allows in a real one is allowed in this one, and a 429 is over in a minute.
            "window_s": 60.0,
            "limits": {"search": 1_000_000, "compliance_stream": 10_000},
        },
        "steps": [
            {"every": often, "until": day.seconds, "jitter": often / 2, "fault": ["close", "reset", "disconnect"]},
            {"every": often, "until": day.seconds, "jitter": often, "fault": ["garbage", "error_line"], "amount": 2},
            {"every": often, "until": day.seconds, "jitter": often, "fault": "duplicate", "amount": 200},
            {"every": often, "until": day.seconds, "jitter": often, "fault": "out_of_order", "amount": 50},
            {
                "every": now_and_then,
                "until": day.seconds,
                "jitter": now_and_then,
                "fault": ["missing_tag", "unknown_fields", "partial_error"],
                "amount": 100,
            },
            {"every": now_and_then, "until": day.seconds, "fault": "split_utf8", "amount": 50},
            {"every": often, "until": day.seconds, "fault": "delete", "amount": max(day.posts // 1_000, 1)},
            at(0.1, "giant_line", amount=1_000_000),
            at(0.2, "stall", amount=6),
            at(0.3, "slow", amount=2),
            at(0.35, "refuse", status=503, amount=2),
            at(0.35, "reset"),
            at(0.45, "gzip"),
            at(0.45, "close"),
            at(0.5, "refuse", status=429, reason="too_many_connections"),
            at(0.5, "reset"),
            at(0.6, "refuse", status=401),
            at(0.6, "close"),
            at(0.65, "search_down", amount=5),
            at(0.7, "refuse", status=429, reason="usage_cap"),
            at(0.7, "disconnect"),
            at(0.75, "user_suspend", amount=2),
            at(0.9, "refuse", status=429, reason="rate_limit"),
            at(0.9, "close"),
        ],
    }


def kills(day: Day) -> list[tuple[float, Victim]]:
    """Who is killed without warning, and how many seconds into the day."""
    dice = random.Random(f"kills:{day.seed}")
    victims: list[Victim] = ["ingest", "postgres", "api"]
    moments = sorted(dice.uniform(0.08, 0.92) * day.seconds for _ in range(day.kills))
    order = [victims[number % 3] for number in range(day.kills)]
    dice.shuffle(order)
    return list(zip(moments, order, strict=True))


def options(day: Day) -> dict[str, Any]:
    """The options of the ingestion. Waits after refusals are X's own."""
    return {
        "plan": day.plan,
        "stream": {"stall_s": 4.0},
        "classify": {"scan_every_s": 2.0},
        "repair": {"overlap_s": 2.0, "settle_s": 1.0, "first_start_back_s": 3600.0},
        "compliance": {"mode": "stream", "flush_s": 0.5},
    }
