"""The X API's calls that have one answer, through tweepy: rules, recent search, ending stale connections.

Every failure is a `StreamError` of `overtone.errors`; nothing is repeated here.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import aiohttp
import tweepy
from tweepy.asynchronous import AsyncClient, AsyncStreamingClient

from ingest.options import RuleOption
from ingest.spend import Gate
from overtone.errors import StreamError, StreamFatalError, StreamThrottledError
from overtone.logging import get_logger

_TWEEPY_BASE_URL = "https://api.twitter.com"
_MAX_QUERY_CHARS = 512
_NOT_SEARCHABLE = ("sample:", "bio:", "bio_name:", "bio_location:")

_log = get_logger()


class _Session:
    """Stands where tweepy expects an aiohttp session and sends its requests to another host."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str) -> None:
        self._session = session
        self._base_url = base_url

    def request(self, method: str, url: str, **arguments: Any) -> Any:
        return self._session.request(method, url.replace(_TWEEPY_BASE_URL, self._base_url, 1), **arguments)


class XApi:
    """The X API at `base_url`. An async context manager: entering opens its connections, leaving closes them."""

    def __init__(
        self,
        base_url: str,
        token: str,
        *,
        timeout_s: float = 30.0,
        gate: Gate | None = None,
        is_sure: Callable[[], bool] = lambda: True,
    ) -> None:
        """Posts are read only while `gate` is open. `is_sure` says whether nobody else can be reading the stream."""
        self.base_url = base_url
        self.is_sure = is_sure
        self.gate = gate or Gate()
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=10.0)
        self._rules_client = AsyncStreamingClient(token, return_type=dict)
        self._client = AsyncClient(token, return_type=dict)
        self._session: aiohttp.ClientSession | None = None

    def use_token(self, token: str) -> None:
        """Ask with `token` from now on."""
        self._rules_client.bearer_token = self._client.bearer_token = token

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=self._timeout)
        self._rules_client.session = self._client.session = _Session(self._session, self.base_url)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def reconcile_rules(self, wanted: Sequence[RuleOption]) -> None:
        """Make X hold every rule of `wanted`, replacing those whose tag is there with another value.

        Raises:
            StreamFatalError: X refuses a rule.
            StreamError: X cannot be reached or asks to wait.
        """
        held = await self.rules()
        to_add, to_delete, unknown = plan_rules(wanted, held)
        await self.change_rules(to_add, to_delete)
        if unknown:
            _log.warning("rules.unknown_found", count=len(unknown), advice="they add posts; `overtone rules diff`")
        _log.info("rules.reconciled", added=len(to_add), deleted=len(to_delete), kept=len(held) - len(to_delete))

    async def rules(self) -> list[dict[str, str]]:
        """The rules that X holds: `id`, `value` and, where they have one, `tag`."""
        return list((await self._call(self._rules_client.get_rules())).get("data") or [])

    async def change_rules(
        self, to_add: Sequence[RuleOption], delete_ids: Sequence[str], *, dry_run: bool = False
    ) -> None:
        """Delete, then add rules; with `dry_run` X only checks them.

        Raises:
            StreamFatalError: X refuses a rule.
            StreamError: X cannot be reached or asks to wait.
        """
        how = {"dry_run": "true"} if dry_run else {}
        if delete_ids:
            await self._call(self._rules_client.delete_rules(list(delete_ids), **how))
        if to_add:
            rules = [tweepy.StreamRule(value=rule.value, tag=rule.tag) for rule in to_add]
            _check_added(await self._call(self._rules_client.add_rules(rules, **how)))

    async def refused_rules(self, rules: Sequence[RuleOption]) -> dict[str, str]:
        """Why X would refuse some of `rules`, by their tags; it keeps none of them.

        Raises:
            StreamError: X cannot be reached or asks to wait.
        """
        asked = [tweepy.StreamRule(value=rule.value, tag=rule.tag) for rule in rules]
        errors = _refusals(await self._call(self._rules_client.add_rules(asked, dry_run="true")))
        tags = {rule.value: rule.tag for rule in rules}
        return {tags.get(value, value): why for value, why in errors}

    async def search_recent(
        self,
        query: str,
        *,
        since_id: int,
        until_id: int | None = None,
        next_token: str | None = None,
        fields: Mapping[str, Sequence[str]],
    ) -> dict[str, Any]:
        """One page of the posts with since_id < id < until_id that match `query`, newest first.

        Waits while the gate is closed.
        """
        await self.gate.until_open()
        parameters: dict[str, Any] = {"since_id": since_id, "max_results": 100, **fields}
        if next_token is not None:
            parameters["next_token"] = next_token
        if until_id is not None:
            parameters["until_id"] = until_id
        answer = await self._call(self._client.search_recent_tweets(query, **parameters))
        self.gate.count(len(answer.get("data") or ()))
        return answer

    async def usage(self) -> tuple[int, int | None]:
        """Posts that X counts in the present period, and its cap if it says one."""
        data = (await self._call(self._client._make_request("GET", "/2/usage/tweets"))).get("data") or {}
        try:
            return int(data.get("project_usage") or 0), int(data["project_cap"]) if data.get("project_cap") else None
        except (TypeError, ValueError) as error:
            raise StreamError("the X API tells of its usage in another form") from error

    async def end_stale_connections(self) -> None:
        """Ask X to drop the filtered-stream connection that it still counts."""
        if not self.is_sure():
            raise StreamError("the connection may be another leader's")
        await self._call(self._client._make_request("DELETE", "/2/connections/filtered_stream"))

    async def _call(self, awaitable: Any) -> dict[str, Any]:
        try:
            answer = await awaitable
        except tweepy.HTTPException as error:
            raise _refused(error) from error
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise StreamError(f"the X API at {self.base_url} cannot be reached: {type(error).__name__}") from error
        return answer if isinstance(answer, dict) else {}


def plan_rules(
    wanted: Sequence[RuleOption], held: Sequence[Mapping[str, str]]
) -> tuple[list[RuleOption], list[str], list[str]]:
    """What to add, the ids to delete, and the ids of rules held under tags that nobody wants."""
    by_tag = {rule.tag: rule.value for rule in wanted}
    right = {rule["tag"] for rule in held if rule.get("tag") in by_tag and by_tag[rule["tag"]] == rule["value"]}
    wanted_values = set(by_tag.values())
    to_delete: list[str] = []
    unknown: list[str] = []
    for rule in held:
        tag = rule.get("tag")
        if tag in by_tag and by_tag[tag] == rule["value"]:
            continue
        # X holds one rule of a value: one that sits under another tag has to go before it can be added under its own.
        if tag in by_tag or rule["value"] in wanted_values:
            to_delete.append(rule["id"])
        else:
            unknown.append(rule["id"])
    return [rule for rule in wanted if rule.tag not in right], to_delete, unknown


def search_queries(rules: Sequence[RuleOption]) -> list[tuple[str, str | None]]:
    """The searches that together find what `rules` match: query, and the tag where it stands for one rule alone.

    Rules with operators that search does not know are left out.
    """
    usable = [rule for rule in rules if not any(name in rule.value for name in _NOT_SEARCHABLE)]
    groups: list[list[RuleOption]] = []
    for rule in usable:
        if groups and len(_joined([*groups[-1], rule])) <= _MAX_QUERY_CHARS:
            groups[-1].append(rule)
        else:
            groups.append([rule])
    return [(_joined(group), group[0].tag if len(group) == 1 else None) for group in groups]


def search_shortcoming(rules: Sequence[RuleOption]) -> str | None:
    """Why searches cannot find all that `rules` match; None if they can."""
    if any(name in rule.value for rule in rules for name in _NOT_SEARCHABLE):
        return "search does not know the operators of every rule"
    if any("-is:retweet" not in rule.value.split() for rule in rules):
        return "search finds no retweets"
    return None


def _joined(rules: Sequence[RuleOption]) -> str:
    return rules[0].value if len(rules) == 1 else " OR ".join(f"({rule.value})" for rule in rules)


def _check_added(answer: Mapping[str, Any]) -> None:
    for value, why in _refusals(answer):
        raise StreamFatalError(f"X refuses the stream rule {value!r}: {why}")


def _refusals(answer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which values X refuses and why; that it holds one already is no refusal."""
    return [
        (str(error.get("value", "")), str(error.get("detail") or error.get("title") or "no reason given"))
        for error in answer.get("errors") or []
        if error.get("title") != "DuplicateRule"
    ]


def _refused(error: tweepy.HTTPException) -> StreamError:
    status = error.response.status
    detail = "; ".join(error.api_messages) or getattr(error, "reason", "") or "no reason given"
    if status in (401, 403):
        return StreamFatalError(f"the X API refuses the bearer token ({status}): {detail}", status=status)
    if status == 429:
        reset = getattr(error, "reset_time", None)
        wait_s = max(reset - time.time(), 1.0) if reset is not None else 60.0
        return StreamThrottledError(f"the X API asks to wait (429): {detail}", retry_after_s=wait_s)
    return StreamError(f"the X API answers {status}: {detail}", status=status)
