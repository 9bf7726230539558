"""Rules tried on posts that are at hand."""

from ingest.options import RuleOption
from ingest.trial import subject_of, try_rules

TEXTS = ("I love my cat", "a dog and a cat https://t.co/x", "nothing to see")


def test_matches_are_counted_rule_by_rule() -> None:
    rules = [
        RuleOption(tag="cats", value="cat"),
        RuleOption(tag="links", value="cat has:links"),
        RuleOption(tag="bad", value="(cat"),
        RuleOption(tag="unknown", value="cat bio:vet"),
    ]
    trials = try_rules(rules, [subject_of(number, text) for number, text in enumerate(TEXTS)])
    assert [(trial.tag, trial.matched) for trial in trials] == [
        ("cats", 2),
        ("links", 1),
        ("bad", None),
        ("unknown", None),
    ]
    assert trials[0].note is None
    assert "bracket" in (trials[2].note or "")
    assert "bio" in (trials[3].note or "")


def test_a_stored_post_is_looked_at_as_it_came() -> None:
    payload = {
        "data": {"id": "5", "author_id": "42", "lang": "en", "referenced_tweets": [{"type": "retweeted", "id": "1"}]},
        "includes": {"users": [{"id": "42", "username": "Someone"}]},
    }
    values = ("from:42", "from:Someone", "lang:en", "lang:de", "is:retweet", "-is:retweet")
    rules = [RuleOption(tag=value, value=value) for value in values]
    matched = {trial.value: trial.matched for trial in try_rules(rules, [subject_of(5, "x", payload)])}
    assert matched == {
        "from:42": 1,
        "from:Someone": 1,
        "lang:en": 1,
        "lang:de": 0,
        "is:retweet": 1,
        "-is:retweet": 0,
    }
    for odd in ({}, {"data": 7}, {"includes": {"users": [7, {}]}}, {"includes": []}):
        assert try_rules(rules[:1], [subject_of(5, "x", odd)])[0].matched == 0
