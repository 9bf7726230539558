"""Calls of the prediction routes that are meant to do harm."""

import gzip
import json
import random

Call = tuple[str, dict[str, str], bytes]
"""Path, headers and body."""


def hostile_calls() -> list[Call]:
    """More than 500 calls that are all wrong somewhere, or come close to it; the same ones each time."""
    rng = random.Random(7)
    good = {
        "/predict": {"text": "love"},
        "/predict/batch": {"texts": ["love", "hate"]},
        "/v2/models/overtone/infer": {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}]},
    }
    values = [
        b"null", b"true", b"-0", b"1e999", b"1e20", b"9" * 21, b"1" * 5000, b'""', b'"\\ud800"', b'"\\u0000"', b"[]",
        b'"\\udfff\\ud800"', b"{}",
        b"[" * 5000, b'{"a":' * 5000, b"NaN", b'"' + b"x" * 30_000 + b'"', b'"\xff"', b"'a'", b'"\xf4\x90\x80\x80"',
        b"[[[]]]",
        b'{"text":"a","text":"b"}', b"\xef\xbb\xbf{}", b"", b"\0", b'"\xc0\x80"', b'"a', b"0x10", b"-", b"1.", b'"\\x"',
    ]  # fmt: skip
    fields = [
        b"text",
        b"texts",
        b"top_k",
        b"threshold",
        b"long_text",
        b"explain",
        b"inputs",
        b"outputs",
        b"parameters",
        b"id",
    ]
    calls: list[Call] = []
    for path, body in good.items():
        whole = json.dumps(body).encode()
        kinds = [{"content-type": "application/json"}, {"content-type": "application/x-ndjson"}]
        for value in values:
            calls += [(path, kind, value) for kind in kinds]
            field = rng.choice(fields)
            calls.append((path, kinds[0], whole[:-1] + b', "' + field + b'": ' + value + b"}"))
            calls.append((path, kinds[0], b'{"' + field + b'": ' + value + b"}"))
            calls.append((path, kinds[1], value + b"\n" + b'"love"\n' + value))
        for kind in ("text/plain", "application/json; charset=utf-16", "multipart/form-data", "*/*", "x" * 3000):
            calls.append((path, {"content-type": kind}, whole))
        for encoding in ("br", "deflate", "gzip, gzip", "gzip", "x" * 3000):
            calls.append((path, kinds[0] | {"content-encoding": encoding}, whole))
        packed = gzip.compress(whole)
        bomb = gzip.compress(b" " * 80_000_000, 1)
        for damaged in (
            packed[:-1],
            packed[:9],
            packed + b"x",
            packed[:5] + b"\xff" + packed[6:],
            bomb,
            gzip.compress(bomb),
        ):
            calls += [(path, kind | {"content-encoding": "gzip"}, damaged) for kind in kinds]
        for length in ("0", "5", "-1", "99999999999", "x", "1" * 400, "1e3", "+3", str(len(whole) - 1)):
            calls.append((path, kinds[0] | {"inference-header-content-length": length}, whole + b"\xff\xff\xff\x7fa"))
        for size in (-1, 0, 4, 5, 2**40, True, "4", None, 1.5):
            tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}
            head = json.dumps({"inputs": [tensor]}).encode()
            for rest in (b"", b"\x04\0\0\0lov", b"\xff\xff\xff\xff", b"\0\0\0\0" * 3):
                calls.append((path, {"inference-header-content-length": str(len(head))}, head + rest))
        for _ in range(25):
            mangled = bytearray(whole)
            mangled[rng.randrange(len(mangled))] = rng.randrange(256)
            calls.append((path, rng.choice(kinds), bytes(mangled)))
        calls += [
            (f"{path}?{query}", kinds[1], b'"love"')
            for query in ("top_k=0", "a=%ff", "top_k", "threshold=nan", "&" * 99)
        ]
    return calls
