"""The page in a real browser: over the HTTP application with stand-ins, and over the whole stack."""

import asyncio
import contextlib
import re
import shutil
import socket
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from json import loads
from pathlib import Path
from secrets import token_urlsafe
from typing import Any, Protocol
from urllib.parse import urlsplit

import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as DriverService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overtone.bundle import Bundle
from overtone.errors import DatabaseUnavailableError, OverloadedError, OvertoneError
from overtone.schema import LABELS
from serve.auth import Gate, Identity, KeyRing
from serve.classifier import Answer
from serve.http import create_app
from serve.service import Service

KEY = "ovt_page_test_key"
VERSION = "tiny-0123abcd"
MARKUP = '<img src="x" onerror="document.title=1"><b>not bold</b>'
STRICT_POLICY = b"default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
WAIT_S = 20
_BROWSER_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --window-size=1280,1000"
)


class KeywordClassifier:
    """Positive for texts with "love", negative for the rest."""

    bundle = Bundle(
        path=Path(),
        name="tiny",
        version=VERSION,
        labels=LABELS,
        max_length=8,
        text_version=1,
        temperature=1.0,
        precision="fp32",
        golden=(),
        metrics={},
        base_model="none",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        license="Apache-2.0",
        sha256={},
    )

    def __init__(self) -> None:
        self.failure: OvertoneError | None = None

    async def classify(self, texts: Sequence[str], **options: Any) -> Answer:
        if self.failure is not None:
            raise self.failure
        return Answer(self.bundle, [[0.02, 0.08, 0.9] if "love" in text else [0.85, 0.1, 0.05] for text in texts])


@dataclass
class MemoryRecords:
    """Keys, sessions and figures, in memory."""

    identities: dict[bytes, Identity] = field(default_factory=dict)
    posts: list[dict[str, Any]] = field(default_factory=list)
    failure: OvertoneError | None = None
    source: str | None = "simulator"

    async def active(self) -> Mapping[bytes, Identity]:
        return self.identities

    async def find(self, digest: bytes) -> Identity | None:
        return self.identities.get(digest)

    async def exchange_sign_in(self, token: str) -> str | None:
        return await self.create_session(token)

    async def create_session(self, key_id: str, until: datetime | None = None) -> str | None:
        secret = token_urlsafe()
        self.admit(secret)
        return secret

    async def end_session(self, session_id: str) -> None:
        self.identities = {digest: one for digest, one in self.identities.items() if one.key_id != session_id}

    def admit(self, secret: str) -> None:
        scopes = frozenset({"predict", "read"})
        self.identities[sha256(secret.encode()).digest()] = Identity(secret, scopes, is_session=True)

    async def figures(self, *, minutes: int, newest: int) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        minute = datetime.now(UTC).replace(second=0, microsecond=0)
        labels = {label: sum(post["label"] == label for post in self.posts) for label in LABELS}
        series = [{"minute": minute - timedelta(minutes=ago), **labels} for ago in range(9, -1, -1)]
        return {
            "posts": len(self.posts),
            "predictions": sum(labels.values()),
            "labels": labels,
            "per_second": {"posts": 49.84, "predictions": 50.0},
            "series": series if self.posts else [],
            "newest": self.posts[::-1][:newest],
            "model_version": VERSION,
            "source": self.source,
        }


class StrictPolicy:
    """Serves the page under the policy it is written for, whatever the server allows for its other pages."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_strictly(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == "/":
                rest = [pair for pair in message["headers"] if pair[0] != b"content-security-policy"]
                message = {**message, "headers": [*rest, (b"content-security-policy", STRICT_POLICY)]}
            await send(message)

        await self._app(scope, receive, send_strictly)


@dataclass
class Site:
    """A running server and what stands behind it."""

    url: str
    records: MemoryRecords
    classifier: KeywordClassifier


class Stack(Protocol):
    """The whole product, as the fixture `stack` starts it."""

    api_url: str
    sign_in_url: str


def make_posts(number: int) -> list[dict[str, Any]]:
    start = datetime.now(UTC) - timedelta(seconds=number)
    return [
        {
            "post_id": str(1_990_000_000_000_000_000 + at),
            "text": MARKUP if at == number - 1 else f"post number {at}",
            "created_at": start + timedelta(seconds=at),
            "label": LABELS[at % 3],
            "confidence": 0.5 + at % 50 / 100,
            "model_version": VERSION,
        }
        for at in range(number)
    ]


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The address of `app` while it runs in a thread, on a port that was free."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", ws="none", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


@pytest.fixture
def site() -> Iterator[Site]:
    records, classifier = MemoryRecords(posts=make_posts(1234)), KeywordClassifier()
    records.admit(KEY)
    keys = KeyRing(records, refresh_s=0.1, unknown_s=0.0)
    app = create_app(Service(classifier=classifier, gate=Gate(keys), records=records))  # type: ignore[arg-type]
    with serving(StrictPolicy(app)) as url:
        yield Site(url, records, classifier)


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.fail("The page's tests need a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in _BROWSER_FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=DriverService(executable_path=driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def browser(chrome: webdriver.Chrome) -> webdriver.Chrome:
    """A browser that was nowhere yet: no cookies, no log."""
    chrome.get("about:blank")
    chrome.execute_cdp_cmd("Network.clearBrowserCookies", {})
    chrome.get_log("browser")
    chrome.get_log("performance")
    return chrome


def until(browser: webdriver.Chrome, condition: Callable[[], Any], message: str) -> Any:
    return WebDriverWait(browser, WAIT_S, poll_frequency=0.1).until(lambda _: condition(), message)


def text_of(browser: webdriver.Chrome, selector: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, selector).text


def view_is(browser: webdriver.Chrome, view: str) -> bool:
    return browser.find_element(By.TAG_NAME, "body").get_attribute("data-view") == view


def number_in(text: str) -> int:
    return int(re.sub(r"\D", "", text) or -1)


def sign_in(browser: webdriver.Chrome, site: Site) -> None:
    browser.get(site.url)
    until(browser, lambda: view_is(browser, "sign-in"), "the page did not ask for a key")
    browser.find_element(By.ID, "key").send_keys(KEY, Keys.ENTER)
    until(browser, lambda: text_of(browser, "#status-text") == "Live", "signing in did not bring figures")


def try_text(browser: webdriver.Chrome, text: str) -> None:
    box = browser.find_element(By.ID, "try-text")
    box.clear()
    box.send_keys(text, Keys.CONTROL, Keys.ENTER)


def console_errors(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}]


def origins_asked(browser: webdriver.Chrome) -> set[str]:
    messages = [loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {"{0.scheme}://{0.netloc}".format(urlsplit(url)) for url in urls if not url.startswith(("data:", "about:"))}


def colours_in_chart(browser: webdriver.Chrome) -> int:
    return browser.execute_script(
        "const canvas = document.querySelector('#chart canvas');"
        "const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        "return new Set(new Uint32Array(data.buffer)).size;"
    )


def save_screenshot(browser: webdriver.Chrome, path: Path) -> int:
    """Write what the window shows; the size of the file in bytes (a blank window is under 10,000)."""
    path.write_bytes(b64decode(browser.get_screenshot_as_base64()))
    return path.stat().st_size


def test_page_asks_for_a_key_and_refuses_a_wrong_one(browser: webdriver.Chrome, site: Site) -> None:
    browser.get(site.url)
    until(browser, lambda: view_is(browser, "sign-in"), "the page did not ask for a key")
    assert not browser.find_element(By.ID, "dashboard").is_displayed()

    browser.find_element(By.ID, "key").send_keys("ovt_wrong", Keys.ENTER)

    until(browser, lambda: "not valid" in text_of(browser, "#sign-in-error"), "a wrong key was not refused")
    assert view_is(browser, "sign-in")
    assert all("401" in error for error in console_errors(browser))


def test_page_shows_counts_posts_and_chart(browser: webdriver.Chrome, site: Site, tmp_path: Path) -> None:
    sign_in(browser, site)
    browser.get_log("browser")  # the browser itself logs the 401 that precedes signing in

    assert text_of(browser, "#posts") == "1,234"
    assert text_of(browser, "#predictions") == "1,234"
    assert text_of(browser, "#posts-rate") == "49.8"
    assert "Simulator" in text_of(browser, "#source")
    assert text_of(browser, "#model-version") == VERSION
    rows = browser.find_elements(By.CSS_SELECTOR, "#newest > li")
    assert len(rows) == 20
    assert all(word in text_of(browser, "#shares") for word in ("Negative", "Neutral", "Positive"))
    assert re.search(r"(Negative|Neutral|Positive)\s+confidence\s+\d+%", rows[0].text)
    assert colours_in_chart(browser) > 10
    assert save_screenshot(browser, tmp_path / "page.png") > 20_000
    assert console_errors(browser) == []
    assert origins_asked(browser) == {site.url}


def test_page_shows_markup_in_a_post_as_text(browser: webdriver.Chrome, site: Site) -> None:
    sign_in(browser, site)

    newest = browser.find_element(By.CSS_SELECTOR, "#newest > li .post-text")
    assert newest.text == MARKUP
    assert newest.find_elements(By.CSS_SELECTOR, "*") == []
    assert browser.title == "Overtone"


def test_page_keeps_up_and_can_be_paused(browser: webdriver.Chrome, site: Site) -> None:
    sign_in(browser, site)
    site.records.posts = make_posts(2000)
    until(browser, lambda: text_of(browser, "#posts") == "2,000", "the counts did not move")
    first = browser.find_element(By.CSS_SELECTOR, "#newest > li").get_attribute("data-post-id")
    assert first == site.records.posts[-1]["post_id"]

    browser.find_element(By.ID, "pause").click()
    site.records.posts = make_posts(3000)

    until(browser, lambda: text_of(browser, "#posts") == "3,000", "pausing the list stopped the counts")
    assert browser.find_element(By.CSS_SELECTOR, "#newest > li").get_attribute("data-post-id") == first


def test_try_box_answers(browser: webdriver.Chrome, site: Site) -> None:
    sign_in(browser, site)
    browser.get_log("browser")

    try_text(browser, "I love this")

    until(browser, lambda: text_of(browser, "#try-result").startswith("Positive"), "no answer to a text")
    answer = text_of(browser, "#try-result")
    assert "90.0% confidence" in answer
    assert re.search(r"Answered in [\d.,]+ ms", answer)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#try-result .score")) == 3
    browser.find_elements(By.CSS_SELECTOR, ".chip")[1].click()
    until(browser, lambda: text_of(browser, "#try-result").startswith("Negative"), "no answer to an example")
    assert console_errors(browser) == []


def test_try_box_says_why_there_is_no_answer(browser: webdriver.Chrome, site: Site) -> None:
    sign_in(browser, site)
    error = browser.find_element(By.ID, "try-error")

    try_text(browser, "  ")
    until(browser, lambda: "Write a text" in error.text, "an empty text was not refused")
    browser.execute_script("document.getElementById('try-text').value = 'x'.repeat(25001)")
    browser.find_element(By.ID, "try-button").click()
    until(browser, lambda: "25,001" in error.text, "a long text was not refused")
    site.classifier.failure = OverloadedError("The queue is full.", retry_after_s=1.0)
    try_text(browser, "I love this")
    until(browser, lambda: "overloaded" in error.text, "overload was not told")

    site.classifier.failure = None
    browser.find_element(By.ID, "try-button").click()
    until(browser, lambda: text_of(browser, "#try-result").startswith("Positive"), "no answer after overload")
    assert error.text == ""


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (OverloadedError("The queue is full.", retry_after_s=1.0), "overloaded"),
        (DatabaseUnavailableError("The database cannot be reached."), "database cannot be reached"),
    ],
    ids=["overloaded", "no database"],
)
def test_page_says_what_is_wrong_and_recovers(
    browser: webdriver.Chrome, site: Site, failure: OvertoneError, words: str
) -> None:
    sign_in(browser, site)

    site.records.failure = failure
    until(browser, lambda: words in text_of(browser, "#banner"), "the trouble was not told")
    assert text_of(browser, "#posts") == "1,234"

    site.records.failure = None
    until(browser, lambda: text_of(browser, "#status-text") == "Live", "the page did not recover")
    assert not browser.find_element(By.ID, "banner").is_displayed()


def test_page_recovers_when_the_server_was_away(browser: webdriver.Chrome, site: Site) -> None:
    sign_in(browser, site)

    browser.set_network_conditions(offline=True, latency=0, throughput=-1)
    try:
        until(browser, lambda: "cannot be reached" in text_of(browser, "#banner"), "a lost server was not told")
        assert text_of(browser, "#status-text") == "Not connected"
    finally:
        browser.delete_network_conditions()

    until(browser, lambda: text_of(browser, "#status-text") == "Live", "the page did not recover")


@pytest.mark.parametrize(
    ("source", "badge"),
    [("simulator", "Simulator: not real posts"), ("filtered_stream", "Posts from X"), (None, "")],
)
def test_page_says_where_posts_come_from(browser: webdriver.Chrome, site: Site, source: str | None, badge: str) -> None:
    site.records.source = source
    sign_in(browser, site)

    assert text_of(browser, "#source") == badge


def test_page_without_posts_says_so(browser: webdriver.Chrome, site: Site) -> None:
    site.records.posts = []
    sign_in(browser, site)

    assert text_of(browser, "#posts") == "0"
    assert "No posts yet" in text_of(browser, "#newest-empty")
    assert "Waiting for the first prediction" in text_of(browser, "#chart-empty")


def test_signing_out_and_an_ended_session_lead_back_to_the_key(browser: webdriver.Chrome, site: Site) -> None:
    sign_in(browser, site)
    browser.find_element(By.ID, "sign-out").click()
    until(browser, lambda: view_is(browser, "sign-in"), "signing out did not ask for a key")
    assert browser.find_elements(By.CSS_SELECTOR, "#newest > li") == []
    assert browser.get_cookies() == []

    sign_in(browser, site)
    browser.delete_all_cookies()
    until(browser, lambda: "session has ended" in text_of(browser, "#sign-in-error"), "an ended session was not told")


@pytest.mark.parametrize(("width", "theme"), [(390, "light"), (390, "dark"), (820, "dark"), (1440, "light")])
def test_page_fits_the_window(browser: webdriver.Chrome, site: Site, tmp_path: Path, width: int, theme: str) -> None:
    shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        sign_in(browser, site)
        try_text(browser, "I love this")
        until(browser, lambda: text_of(browser, "#try-result").startswith("Positive"), "no answer to a text")

        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (number_in(ground.split(",")[0]) < 128) == (theme == "dark")
        assert save_screenshot(browser, tmp_path / "page.png") > 20_000
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_chart_minutes_follow_the_servers_clock(browser: webdriver.Chrome, site: Site) -> None:
    browser.get(site.url)

    found = browser.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        import("/static/chart.js").then(({ fillMinutes, stackColumns }) => {
          const series = [{ minute: "2026-01-01T12:03:00Z", negative: 1, neutral: 2, positive: 1 }];
          const rows = fillMinutes(series, Date.parse("2026-01-01T12:04:30Z"), 3);
          const labels = ["negative", "neutral", "positive"];
          done([rows.map(({ minute }) => new Date(minute).toISOString()), stackColumns(rows, labels, false),
                stackColumns(rows, labels, true)]);
        });
        """
    )

    minutes, counts, shares = found
    assert [minute[11:16] for minute in minutes] == ["12:02", "12:03", "12:04"]
    assert counts[1:] == [[None, 4, None], [None, 3, None], [None, 1, None]]
    assert shares[1:] == [[None, 100, None], [None, 75, None], [None, 25, None]]


def test_page_shows_posts_of_the_whole_stack(browser: webdriver.Chrome, stack: Stack, tmp_path: Path) -> None:
    browser.get(stack.sign_in_url)
    until(browser, lambda: view_is(browser, "dashboard"), "the printed link did not sign in")

    until(browser, lambda: number_in(text_of(browser, "#predictions")) > 0, "no prediction came")
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#newest > li .label"), "no post with a label came")
    until(browser, lambda: colours_in_chart(browser) > 10, "the chart is empty")
    assert save_screenshot(browser, tmp_path / "page.png") > 20_000
    assert console_errors(browser) == []
    assert origins_asked(browser) == {stack.api_url.rstrip("/")}
