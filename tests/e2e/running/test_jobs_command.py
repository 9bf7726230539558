"""`overtone jobs` on the whole stack, with the queue in files."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(600)


def test_a_file_goes_in_and_its_predictions_come_out(stack: Any, tmp_path: Path) -> None:
    def jobs(*arguments: str, code: int = 0) -> str:
        said: str = stack.overtone("jobs", *arguments, code=code)
        return said

    upload, result = tmp_path / "texts.csv", tmp_path / "result.ndjson"
    with upload.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "said"])
        writer.writerows([f"n-{number}", ("I love this", "worst ever")[number % 2]] for number in range(5_000))
        writer.writerow(["n-5000", " "])
    job = json.loads(jobs("submit", str(upload), "--text-column", "said", "--output", str(result), "--json"))
    assert (job["state"], job["done"], job["failed"]) == ("succeeded", 5_001, 1)
    rows = [json.loads(line) for line in result.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"n-{number}" for number in range(5_001)]
    assert {row["label"] for row in rows[:5_000:2]} == {"positive"}
    assert {row["label"] for row in rows[1:5_000:2]} == {"negative"}
    assert rows[-1]["error"]["code"] == "invalid_input"
    assert [one["job_id"] for one in json.loads(jobs("list", "--json"))] == [job["job_id"]]
    assert jobs("result", job["job_id"]) == result.read_text()
    assert "5,001 of 5,001 lines done, 1 with an error" in jobs("cancel", job["job_id"])
    assert "line 5002, said: must hold more than white space" in jobs("status", job["job_id"])
    assert "line 5002, said" in jobs("submit", str(upload), "--text-column", "said", "--reject", code=3)
    assert "only one that failed is resumed" in jobs("resume", job["job_id"], code=3)
    jobs("delete", job["job_id"])
    assert "There is no such job" in jobs("status", job["job_id"], code=5)
