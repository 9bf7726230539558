"""What callers may ask for, packed bodies, tokens of explanations, lines and tensors: the parts without HTTP."""

import gzip
import zlib
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.bundle import Bundle, TextEncoder
from overtone.errors import EngineError, InvalidInputError, MalformedError, OvertoneError, TooLargeError
from serve import encodings, options, tensors
from serve.encodings import Deflater, Inflater, accepts_gzip, inflate
from serve.explain import occlusion
from serve.ndjson import LineSplitter, parse_line
from serve.options import PLAIN, Options


def field_of(error: pytest.ExceptionInfo[OvertoneError]) -> str:
    return str(error.value.details["errors"][0].field)


def test_a_body_without_options_is_plain() -> None:
    assert options.split({"text": "a"}, "text") == ("a", PLAIN)
    assert options.split({"text": "a"}, "text")[1] is PLAIN


def test_options_are_taken_from_body_and_query() -> None:
    asked = Options(top_k=2, threshold=0.5, long_text="window")
    pairs = [("top_k", "2"), ("threshold", "0.5"), ("long_text", "window")]

    assert options.split({"text": "a", "top_k": 2.0, "threshold": 0.5, "long_text": "window"}, "text")[1] == asked
    assert options.from_query(pairs) == asked
    assert options.split({"texts": [], "top_k": 1}, "texts", asked)[1] == Options(1, 0.5, "window")
    assert options.from_query([("explain", "true")]) == Options(explain=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 1e20), ("top_k", 10**10),
        ("top_k", 0), ("top_k", -1), ("top_k", True), ("top_k", "2"), ("top_k", None), ("top_k", 1.5), ("top_k", []),
        ("threshold", -0.1), ("threshold", 1.1), ("threshold", "0.5"), ("threshold", False), ("threshold", None),
        ("threshold", float("nan")), ("threshold", 10**400), ("long_text", "cut"), ("long_text", 1),
        ("long_text", ["window"]), ("long_text", None), ("explain", 1), ("explain", "true"), ("explain", None),
        ("topk", 1),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        options.split({"text": "a", name: value}, "text")
    assert field_of(error) == name


@pytest.mark.parametrize(
    ("pairs", "field"),
    [
        ([("top_k", "x")], "top_k"), ([("top_k", "1"), ("top_k", "2")], "top_k"), ([("top_k", "٣")], "top_k"),
        ([("top_k", "9" * 5000)], "top_k"), ([("threshold", "nan")], "threshold"),
        ([("threshold", "1e-1")], "threshold"),
        ([("explain", "yes")], "explain"), ([("key", "secret")], "key"), ([("<b>", "1")], "body"),
        ([("explain", "true"), ("long_text", "window")], "explain"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(pairs: list[tuple[str, str]], field: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        options.from_query(pairs)
    assert field_of(error) == field


def test_more_labels_than_there_are() -> None:
    Options(top_k=3).check_labels(3)
    with pytest.raises(InvalidInputError):
        Options(top_k=4).check_labels(3)


# --- packed bodies


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=3000), st.integers(1, 50))
def test_what_was_packed_comes_out_however_it_is_cut(data: bytes, size: int) -> None:
    packed = gzip.compress(data) + gzip.compress(b"more")
    inflater = Inflater()
    pieces = [piece for start in range(0, len(packed), size) for piece in inflater.feed(packed[start : start + size])]
    inflater.finish()

    assert b"".join(pieces) == data + b"more"


PACKED = gzip.compress(b"love", mtime=0)


@pytest.mark.parametrize("body", [b"", b"x", PACKED[:-1], PACKED + b"x", b"\x1f\x8b"])
async def test_damaged_gzip_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedError):
        await inflate(body, 1000)


async def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(bytes(20_000_000))
    with pytest.raises(TooLargeError):
        await inflate(bomb, 1_000_000)

    monkeypatch.setattr(encodings, "FREE_BYTES", 1_000_000)
    sizes: list[int] = []
    inflater = Inflater()
    with pytest.raises(TooLargeError):
        sizes.extend(len(piece) for piece in inflater.feed(bomb))
    assert max(sizes) <= encodings.PIECE_BYTES


def test_each_part_of_a_packed_answer_can_be_read_at_once() -> None:
    deflater, reader = Deflater(), zlib.decompressobj(31)

    assert reader.decompress(deflater.feed(b"one\n")) == b"one\n"
    assert reader.decompress(deflater.feed(b"two\n") + deflater.finish()) == b"two\n"
    assert reader.eof


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"gzip", True), (b"deflate, gzip;q=0.5, br", True), (b"*", True), (b"gzip;q=0", False), (b"br", False),
        (b"", False), (b"gzip;q=0.000", False), (b"GZIP", True), (b"identity, xgzip", False),
    ],
)  # fmt: skip
def test_who_reads_gzip(value: bytes, expected: bool) -> None:
    assert accepts_gzip([(b"accept-encoding", value)]) is expected


# --- explanations


def test_tokens_stand_where_they_stood(tiny_bundle: Bundle) -> None:
    text = "  @bob: I don't love #Mondays 😀😀 http://a.b/c?d "
    found = occlusion(TextEncoder(tiny_bundle), text[:40])

    assert all(text[token.start : token.end] == token.text for token in found.tokens)
    assert found.variants[0] == text[:40]
    words = [token.text for token in occlusion(TextEncoder(tiny_bundle), "love &amp; don't!!").tokens]
    assert words == ["love", "&amp;", "don't", "!!"]


def test_no_more_is_left_out_than_the_model_reads(tiny_bundle: Bundle) -> None:
    found = occlusion(TextEncoder(tiny_bundle), "love " * 5000)

    assert len(found.tokens) == 6
    assert len(found.variants) == 8
    assert found.variants[1] == "love love love love love love"
    assert occlusion(TextEncoder(tiny_bundle), "x" * 25_000).tokens[0].end == 25_000


def test_contributions_are_what_is_lost(tiny_bundle: Bundle) -> None:
    found = occlusion(TextEncoder(tiny_bundle), "love it")
    rows: list[list[float] | Exception] = [[0.1, 0.9], [0.1, 0.9], [0.6, 0.4], [0.05, 0.95]]

    assert [item["contribution"] for item in found.explanation(rows)] == [0.5, -0.05]
    with pytest.raises(EngineError):
        found.explanation([*rows[:3], EngineError("The engine failed on this text.")])


# --- lines


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), min_size=1), st.integers(1, 20))
def test_lines_are_whole_however_the_body_is_cut(lines: list[bytes], size: int) -> None:
    body = b"\n".join(lines)
    splitter = LineSplitter(limit=16)
    found = [line for start in range(0, len(body), size) for line in splitter.feed(body[start : start + size])]

    assert [*found, splitter.finish()] == [line if len(line) <= 16 else None for line in lines]


@pytest.mark.parametrize("line", [b'"love"', b' {"text": "love"} \r'])
def test_both_kinds_of_line(line: bytes) -> None:
    assert parse_line(line) == "love"


@pytest.mark.parametrize(
    "line", [None, b"love", b"7", b"[]", b'""', b'{"text": 1}', b'{"text": "a", "top_k": 1}', b"\xff", b'"\\ud800"']
)
def test_what_is_no_line_is_an_error(line: bytes | None) -> None:
    assert isinstance(parse_line(line), InvalidInputError)


# --- tensors


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.none() | st.integers(0, 250))
def test_whatever_bytes_come_only_input_is_to_blame(body: bytes, length: int | None) -> None:
    with pytest.raises(InvalidInputError):
        tensors.read_call(body, length)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.sampled_from([0.5, 1e300]) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("text") | JSON, "datatype": st.just("BYTES") | JSON, "shape": st.just([1]) | JSON,
        "data": st.just(["love"]) | JSON, "parameters": JSON | st.fixed_dictionaries({"binary_data_size": JSON}),
    },
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {}, optional={"inputs": st.lists(TENSOR, max_size=2) | JSON, "outputs": JSON, "id": JSON, "parameters": JSON}
    ),
    st.binary(max_size=8),
)
def test_whatever_tensors_come_only_input_is_to_blame(content: dict[str, Any], rest: bytes) -> None:
    head = orjson.dumps(content, option=orjson.OPT_PASSTHROUGH_DATACLASS)
    try:
        call = tensors.read_call(head + rest, len(head))
    except InvalidInputError:
        return
    assert all(isinstance(text, str) and text for text in call.texts)
