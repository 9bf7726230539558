"""Re-scoring as a job: its first chunk plans it, every other gives the posts of one span their predictions.

A job is for the version that was served when it was asked for. What another version answers is stored as its own, and
the posts are asked again; where nobody answers with that version any more, the job has failed and says so. It knows
neither Ray nor Celery.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from overtone import metrics
from overtone.db import jobs
from overtone.db.database import Database
from overtone.db.job_spans import finish_span, plan_job
from overtone.db.jobs import ChunkName, Claim, Finished
from overtone.db.predictions import write_predictions
from overtone.db.rescoring import plan_rescoring, posts_to_rescore
from overtone.errors import BundleError, OvertoneError, UnavailableError
from overtone.logging import get_logger
from overtone.schema import Prediction

RESCORING = "rescore"
"""The kind of job."""
SLICE_POSTS = 2_000
"""Posts a chunk: what is read in one statement, and written in one transaction."""
_PROBED = 16
"""Posts that are asked after an answer in which nothing came from the version of the job."""
_PROBES = 10
"""Half a minute: a challenger that answers half of all requests does not do so ten times in a row."""

Classified = Callable[[Sequence[str], Mapping[str, Any]], Awaitable[list[dict[str, Any]]]]
"""For each text, with the options of a prediction, what the API says of it."""

_Post = tuple[int, str]
_log = get_logger()


@dataclass(slots=True)
class Rescorer:
    """Does chunks that are held already."""

    db: Database
    classified: Classified
    pause_s: float = 0.5
    """Before the first probe; each time twice as long, up to eight times."""

    async def do(self, name: ChunkName, claim: Claim) -> jobs.State | None:
        """Do a chunk; the job's state then, or None if it was not needed.

        Raises:
            BundleError: nobody answers with the version of the job any more.
            OvertoneError: it cannot be done now.
        """
        version = str(claim.parameters["model_version"])
        if claim.first_post_id is None or claim.last_post_id is None:
            return await self._plan(name, version, claim.parameters.get("since"))
        posts = await posts_to_rescore(self.db, version, claim.first_post_id, claim.last_post_id)
        answers = await self._answers(posts, version)
        done = Finished(claim.items, answers.failed, ())
        state = await finish_span(self.db, name, done, answers.rows)
        if state is not None:
            metrics.JOB_TEXTS.labels("classified").inc(len(posts) - answers.failed)
            metrics.JOB_TEXTS.labels("failed").inc(answers.failed)
        if state == "succeeded":
            _log.info("job.succeeded", job_id=str(name.job_id))
        return state

    async def _plan(self, name: ChunkName, version: str, since: str | None) -> jobs.State | None:
        start = datetime.fromisoformat(since) if since else None
        plan = await plan_rescoring(self.db, version, since=start, rows=SLICE_POSTS)
        _log.info("rescoring.planned", job_id=str(name.job_id), posts=plan.posts, slices=len(plan.slices))
        return await plan_job(self.db, name, version, plan)

    async def _answers(self, posts: Sequence[_Post], version: str) -> "_Answers":
        """Predictions by `version` for all `posts` but those that the model fails on.

        While a challenger is on trial, or a swap goes round the replicas, some answers are by another version.

        Raises:
            BundleError: again and again all of them were. They are stored.
            UnavailableError: the same, after some that were not. All are stored, so that less is left to do.
        """
        answers, lacking, probes = _Answers(), list(posts), 0
        while lacking:
            asked = lacking[:_PROBED] if probes else lacking
            others = answers.add(asked, await self.classified([text for _, text in asked], {}), version)
            lacking = others + lacking[len(asked) :]
            if len(others) < len(asked):
                probes = 0
                continue
            if probes == _PROBES:
                await write_predictions(self.db, answers.rows)
                raise answers.failure(version)
            await asyncio.sleep(self.pause_s * min(2**probes, 8))
            probes += 1
        return answers


@dataclass(slots=True)
class _Answers:
    """What was said of the posts of a span."""

    failed: int = 0
    """Posts that no model took."""
    other_version: str = ""
    """Another than the one that was wanted, of those that answered the last."""
    _found: dict[tuple[int, str], Prediction] = field(default_factory=dict)

    @property
    def rows(self) -> list[tuple[int, Prediction]]:
        """Each post's id and prediction, one a version."""
        return [(post_id, prediction) for (post_id, _), prediction in self._found.items()]

    def add(self, posts: Sequence[_Post], answers: Sequence[Mapping[str, Any]], version: str) -> list[_Post]:
        """Take in the answers to `posts`; return the posts that were answered by another version than `version`.

        Raises:
            UnavailableError: these are no answers of our API.
        """
        others: list[_Post] = []
        for (post_id, text), answer in zip(posts, answers, strict=True):
            if "error" in answer:
                self.failed += 1
                continue
            prediction = _prediction(answer)
            self._found[post_id, prediction.model_version] = prediction
            if prediction.model_version != version:
                self.other_version = prediction.model_version
                others.append((post_id, text))
        return others

    def failure(self, version: str) -> OvertoneError:
        """What to raise when nothing more comes from `version`."""
        said = f"The API answers with {self.other_version} now, and this job is for {version}."
        if any(found == version for _, found in self._found):
            return UnavailableError(said)
        return BundleError(
            f"{said} Begin another for what is served now; this one can be resumed if its model returns."
        )


def _prediction(answer: Mapping[str, Any]) -> Prediction:
    try:
        scores = {str(label): float(score) for label, score in answer["scores"].items()}
        return Prediction(str(answer["label"]), float(answer["confidence"]), scores, str(answer["model_version"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnavailableError(f"The API's answer cannot be read: {type(error).__name__}.") from error
