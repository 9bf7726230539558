"""The parts of the simulator that need no server: posts, their times and ids, rules."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.posts import Draft, FilePosts, Generator, open_posts
from ingest.rulebook import Rulebook
from ingest.timeline import Timeline, to_line
from overtone.errors import ConfigurationError
from overtone.schema import snowflake_to_datetime

START = 1_780_000_000.0


def timeline(**options: float | int | None) -> Timeline:
    chosen = {"rate": 10.0, "started_at": START, **options}
    return Timeline(Generator(), **chosen)  # type: ignore[arg-type]


def test_equal_seeds_give_equal_posts() -> None:
    assert [Generator(3).draft(i) for i in range(50)] == [Generator(3).draft(i) for i in range(50)]
    assert [Generator(3).draft(i) for i in range(50)] != [Generator(4).draft(i) for i in range(50)]


def test_generated_posts_are_varied() -> None:
    drafts = [Generator(1).draft(index) for index in range(2_000)]
    texts = [draft.text for draft in drafts]
    assert len(set(texts)) > 1_800
    assert any(draft.is_long for draft in drafts)
    assert any(draft.is_reply for draft in drafts)
    for part in ("#", "@", "https://", "😍", "👎"):
        assert any(part in text for text in texts)
    assert all(0 < len(text) < 4_000 and "{" not in text for text in texts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.tsv", 'label\ttext\nneutral\ta "quoted\npositive\tb\n'),
        ("p.csv", 'text,label\n"a ""quoted",neutral\nb,positive\n'),
        ("p.jsonl", '"a \\"quoted"\n{"text": "cut", "note_tweet": {"text": "b"}}\n\n'),
    ],
)
def test_posts_come_from_a_file_over_and_over(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    posts = FilePosts(path)
    assert [posts.draft(index).text for index in range(4)] == ['a "quoted', "b", 'a "quoted', "b"]


@pytest.mark.parametrize(
    ("name", "content"), [("p.csv", "words\na\n"), ("p.txt", "a"), ("p.jsonl", "[1]\n"), ("p.tsv", "text\n")]
)
def test_an_unusable_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=name):
        open_posts(path, 0)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone\.csv"):
        open_posts(tmp_path / "gone.csv", 0)


@given(st.lists(st.floats(-1, 30), max_size=30), st.integers(1, 200))
def test_ids_rise_and_follow_the_clock(steps: list[float], limit: int) -> None:
    posts, now = timeline(limit=limit), START
    for step in steps:
        now += step
        posts.publish_due(now)
    ids = posts.ids()
    assert ids == sorted(set(ids))
    assert len(ids) == posts.end <= limit
    for post_id in ids:
        assert START <= snowflake_to_datetime(post_id).timestamp() <= max(now, START) + 31


def test_posts_come_at_the_rate() -> None:
    posts = timeline()
    assert posts.publish_due(START + 5) == 50
    assert posts.publish_due(START + 5) == 0
    assert posts.publish_due(START + 5.5) == 5


def test_a_long_pause_brings_no_burst() -> None:
    posts = timeline()
    posts.publish_due(START + 1)
    assert posts.publish_due(START + 100_000) == 0
    assert posts.publish_due(START + 100_001) == 10


def test_search_walks_back_page_by_page() -> None:
    posts = timeline()
    posts.publish_due(START + 5)
    ids = posts.ids()
    found: list[int] = []
    until = None
    while True:
        page = posts.search(since_id=ids[9], until_id=until, max_results=15)
        found += [posts.post_id(position) for position in page.positions]
        until = page.next_until_id
        if until is None:
            break
    assert found == sorted(ids[10:], reverse=True)


def test_old_posts_are_forgotten() -> None:
    posts = timeline(keep=20)
    posts.publish_due(START + 5)
    assert posts.end == 50
    assert len(posts.ids()) <= 40
    assert posts.post_id(posts.end - 1) == posts.ids()[-1]


def test_a_post_shows_only_the_fields_asked_for() -> None:
    posts = timeline()
    posts.publish_due(START + 1)
    assert set(posts.post(0, frozenset())) == {"id", "text", "edit_history_tweet_ids"}
    assert posts.post(0, frozenset({"lang", "author_id"})).keys() >= {"lang", "author_id"}


def test_a_long_post_is_cut_and_sent_whole_as_a_note() -> None:
    class Long:
        def draft(self, index: int) -> Draft:
            return Draft(text="x" * 300, author=index)

    posts = Timeline(Long(), rate=1, started_at=START)
    posts.publish_due(START + 2)
    shown = posts.post(0, frozenset({"note_tweet"}))
    assert (len(shown["text"]), len(shown["note_tweet"]["text"])) == (280, 300)


def test_any_text_makes_one_line() -> None:
    line = to_line({"data": {"text": "a\r\n\x00\ud800😀"}})
    assert line.count(b"\n") == 1
    assert json.loads(line)["data"]["text"] == "a\r\n\x00\ud800😀"


def test_rules_are_added_listed_and_deleted() -> None:
    book = Rulebook()
    status, answer = book.change({"add": [{"value": "cat", "tag": "pets"}, {"value": "dog"}]}, dry_run=False)
    assert status == 201
    assert answer["meta"]["summary"] == {"created": 2, "not_created": 0, "valid": 2, "invalid": 0}
    assert book.listing()["meta"]["result_count"] == 2
    status, answer = book.change({"delete": {"ids": [answer["data"][0]["id"]], "values": ["cow"]}}, dry_run=False)
    assert (status, answer["meta"]["summary"]) == (200, {"deleted": 1, "not_deleted": 1})
    assert [rule.matched() for rule in book.rules] == [{"id": book.rules[0].rule_id}]


def test_a_dry_run_changes_nothing() -> None:
    book = Rulebook()
    assert book.change({"add": [{"value": "cat"}]}, dry_run=True)[0] == 201
    assert book.rules == ()


@pytest.mark.parametrize("value", ["", "x" * 1_025, "(cat", '"cat'])
def test_a_wrong_rule_is_refused(value: str) -> None:
    book = Rulebook()
    _, answer = book.change({"add": [{"value": value}]}, dry_run=False)
    assert answer["meta"]["summary"]["invalid"] == 1
    assert book.rules == ()


def test_a_duplicate_rule_is_refused() -> None:
    book = Rulebook()
    book.change({"add": [{"value": "cat"}]}, dry_run=False)
    _, answer = book.change({"add": [{"value": "cat"}]}, dry_run=False)
    assert answer["errors"][0]["title"] == "DuplicateRule"


@pytest.mark.parametrize("body", [None, [], {}, {"add": [], "delete": {}}, {"add": [{}]}, {"add": "x"}, {"delete": 1}])
def test_a_wrong_request_about_rules_is_refused(body: object) -> None:
    assert Rulebook().change(body, dry_run=False)[0] == 400
