"""What the ingestion can be told: values only, from YAML files; secrets and addresses come from the settings."""

from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from overtone.errors import ConfigurationError

Seconds = Annotated[float, Field(gt=0, le=86_400)]

MAX_STANDBYS = 8
PARTITIONS = {"filtered": 0, "sample10": 2, "firehose": 20}
"""Into how many parts X splits a stream; 0 for one that is not split."""

TWEET_FIELDS = (
    "author_id",
    "created_at",
    "lang",
    "note_tweet",
    "referenced_tweets",
    "conversation_id",
    "in_reply_to_user_id",
)


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RuleOption(_Options):
    """One rule of the stream. The tag is its name: a rule whose value changed is replaced under the same tag."""

    tag: str = Field(min_length=1, max_length=200)
    value: str = Field(min_length=1, max_length=2_048)


class StreamOptions(_Options):
    """How the stream is held."""

    stall_s: Seconds = 21.0
    """Silence after which the connection counts as dead; the X API sends something at least every 20 s."""
    connect_timeout_s: Seconds = 10.0
    stable_s: Seconds = 30.0
    """A connection that lasted this long was good: the waits start over."""
    connects_per_window: int = Field(50, ge=2, le=10_000)
    """Connections the X API allows in 15 minutes."""
    queue_lines: int = Field(20_000, ge=100, le=1_000_000)
    """Lines held in memory while the database is slow; with more the stream is left and repaired later."""
    max_line_bytes: int = Field(4 * 1024 * 1024, ge=16_384, le=64 * 1024 * 1024)
    endpoint: Literal["filtered", "sample10", "firehose"] = "filtered"
    """Which stream of posts: that of the rules, or a tenth or all of the public posts, in partitions (Enterprise)."""
    partition: int | None = Field(None, ge=1, le=20)
    """Which partition of `sample10` (2) or `firehose` (20) this process reads; each has a leader of its own."""

    @model_validator(mode="after")
    def _partition_fits(self) -> "StreamOptions":
        partitions = PARTITIONS[self.endpoint]
        if (self.partition is None) != (partitions == 0) or (self.partition or 0) > partitions:
            of = f"is from 1 to {partitions} for {self.endpoint}" if partitions else "is of sample10 and firehose only"
            raise ValueError(f"partition {of}")
        return self

    @property
    def has_rules(self) -> bool:
        """Whether the stream brings what rules match."""
        return self.endpoint == "filtered"

    @property
    def path(self) -> str:
        """Where the X API has the stream."""
        return f"/2/tweets/{'search' if self.has_rules else self.endpoint}/stream"

    @property
    def parameters(self) -> dict[str, str]:
        """What every connection asks for beside fields."""
        return {} if self.partition is None else {"partition": str(self.partition)}


class WriteOptions(_Options):
    """How posts are stored."""

    batch_rows: int = Field(1_000, ge=1, le=10_000)
    flush_s: Annotated[float, Field(gt=0, le=10)] = 0.2


class SpoolOptions(_Options):
    """What waits on disk while the database is away."""

    max_mib: int = Field(1_024, ge=0, le=1_048_576)
    """MiB on disk; when they are full, or with 0 of them, the stream is left and repaired later."""


class LeaderOptions(_Options):
    """How one process of several is found to read the stream."""

    lease_s: Annotated[float, Field(ge=1, le=300)] = 8.0
    """How long PostgreSQL hears nothing of the leader before another may lead."""
    poll_s: Annotated[float, Field(gt=0, le=10)] = 0.25
    """How often a standby looks whether it may lead."""
    standbys: int = Field(0, ge=0, le=MAX_STANDBYS)
    """Actors beside the first, on other nodes of Ray where there are any; `python -m ingest` is one process anyway."""


class SpendOptions(_Options):
    """How many posts may be read in a month: each is billed."""

    monthly_posts: int | None = Field(None, ge=1, le=100_000_000_000)
    """None: the cap that X tells of, and no cap for the simulator."""
    warn_at: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the cap at which the log warns and the alert fires."""
    stop_at: Annotated[float, Field(gt=0, le=1)] = 0.98
    """Share of the cap at which reading stops until the next period."""
    resets_on_day: int = Field(1, ge=1, le=28)
    """Day of the month on which X's count starts over, in UTC."""
    post_usd: Annotated[float, Field(ge=0, le=1_000)] = 0.005
    """Price of a post."""


class ClassifyOptions(_Options):
    """How posts are classified."""

    batch_texts: int = Field(128, ge=1, le=10_000)
    workers: int = Field(3, ge=1, le=256)
    """Requests under way at a time."""
    queue_posts: int = Field(10_000, ge=100, le=1_000_000)
    """Posts handed over in memory; the rest is found again in the database."""
    timeout_s: Seconds = 60.0
    scan_every_s: Seconds = 20.0
    """How often the database is asked for posts without a prediction."""
    scan_back_s: Annotated[float, Field(gt=0, le=400 * 86_400)] = 8 * 86_400.0
    """How far back the first look after a start goes."""


class RepairOptions(_Options):
    """How posts missed while disconnected are fetched."""

    enabled: bool = True
    """Without, every gap is accepted as it is."""
    overlap_s: Annotated[float, Field(ge=0, le=3_600)] = 10.0
    """How far before the last stored post a search begins: the stream delivers out of order by seconds."""
    settle_s: Annotated[float, Field(ge=0, le=3_600)] = 15.0
    """How long after a post search is trusted to know it."""
    first_start_back_s: Annotated[float, Field(ge=0, le=7 * 86_400)] = 0.0
    """How far back the very first start fetches. Each post fetched from X is billed."""


class ComplianceOptions(_Options):
    """How posts that were deleted, hidden or withheld at X are found."""

    mode: Literal["off", "sweep", "stream"] = "sweep"
    """`sweep` asks about all stored posts by batch jobs, `stream` follows the compliance streams (Enterprise)."""
    sweep_every_s: Annotated[float, Field(gt=0, le=30 * 86_400)] = 86_400.0
    ids_per_job: int = Field(100_000, ge=1, le=1_000_000)
    poll_s: Seconds = 30.0
    """How often a job is looked at."""
    job_timeout_s: Seconds = 21_600.0
    partitions: int = Field(4, ge=1, le=4)
    """Of each compliance stream."""
    flush_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """How long events are gathered before they are done together."""


class RetentionOptions(_Options):
    """How often months over the limits of the settings are archived and dropped."""

    every_s: Annotated[float, Field(ge=0, le=30 * 86_400)] = 86_400.0
    """0: never here, for those who schedule `overtone db retention` themselves."""
    first_after_s: Seconds = 300.0
    again_after_s: Seconds = 600.0
    """How long after a failure it is tried again."""


class IngestOptions(_Options):
    """Everything above together."""

    rules: tuple[RuleOption, ...] = Field(
        (RuleOption(tag="sentiment-analysis", value='"sentiment analysis" lang:en -is:retweet'),), min_length=1
    )
    plan: Literal["self_serve", "enterprise"] = "self_serve"
    """What X lets this app do: `enterprise` has backfill, replays and streams in partitions."""
    tweet_fields: tuple[str, ...] = TWEET_FIELDS
    user_fields: tuple[str, ...] = ()
    media_fields: tuple[str, ...] = ()
    poll_fields: tuple[str, ...] = ()
    place_fields: tuple[str, ...] = ()
    """Of the objects that `expansions` bring."""
    expansions: tuple[str, ...] = ()
    """Asked of the X API with every post; `author_id` brings user objects, which X may bill separately."""
    stream: StreamOptions = StreamOptions()
    write: WriteOptions = WriteOptions()
    spool: SpoolOptions = SpoolOptions()
    leader: LeaderOptions = LeaderOptions()
    spend: SpendOptions = SpendOptions()
    classify: ClassifyOptions = ClassifyOptions()
    repair: RepairOptions = RepairOptions()
    compliance: ComplianceOptions = ComplianceOptions()
    retention: RetentionOptions = RetentionOptions()
    drain_s: Annotated[float, Field(ge=0, le=600)] = 10.0
    """How long a stop waits for posts already received to be stored and classified."""

    @property
    def fields(self) -> dict[str, list[str]]:
        """What is asked with every post, by tweepy's names; those without a value are left out."""
        names = ("tweet_fields", "user_fields", "media_fields", "poll_fields", "place_fields", "expansions")
        return {name: list(values) for name in names if (values := getattr(self, name))}

    @model_validator(mode="after")
    def _plan_has_it(self) -> "IngestOptions":
        if self.plan == "self_serve" and not self.stream.has_rules:
            raise ValueError(f"stream.endpoint {self.stream.endpoint} is of the plan `enterprise` only")
        return self

    @field_validator("rules")
    @classmethod
    def _tags_differ(cls, rules: tuple[RuleOption, ...]) -> tuple[RuleOption, ...]:
        if len({rule.tag for rule in rules}) < len(rules):
            raise ValueError("two rules have the same tag")
        return rules


def load_options(paths: Sequence[Path] = ()) -> IngestOptions:
    """The options of the YAML files at `paths`, where a later file wins over an earlier one, over the defaults.

    Raises:
        ConfigurationError: naming the file that cannot be read, or each option that is wrong.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _merged(merged, _read(path))
    try:
        return IngestOptions.model_validate(merged)
    except ValidationError as error:
        names = ", ".join(str(path) for path in paths)
        lines = [f"{names}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigurationError("\n".join(lines)) from None


def suited_to(base_url: str, options: IngestOptions | None) -> IngestOptions:
    """`options`, or the defaults that suit the API at `base_url`.

    On this machine that is the simulator: what it publishes is free and found by search at once, so a first start
    fetches all of it.
    """
    if options is not None:
        return options
    if not is_loopback(base_url):
        return IngestOptions()
    return IngestOptions(
        repair=RepairOptions(overlap_s=2.0, settle_s=1.0, first_start_back_s=6 * 86_400.0),
    )


def is_loopback(url: str) -> bool:
    """Whether `url` names this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path}: cannot be read ({error})") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigurationError(f"{path}: must hold options by name")
    return loaded


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(base[name], over[name])
        for name in base.keys() & over.keys()
        if isinstance(base[name], dict) and isinstance(over[name], dict)
    }
    return {**base, **over, **both}
