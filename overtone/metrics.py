"""Every metric the product exports, by name, and the text that Prometheus reads.

`prometheus_client` in its multi-process mode adds up what the replicas and the ingest actor of one machine write
into one folder, so that any of them can answer `/metrics` for all. Counters of a process that died stay in the sum.
The folder comes from `PROMETHEUS_MULTIPROC_DIR`, which must be in the environment before this module is imported;
without it the metrics of this process alone are shown.
"""

from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

HTTP_REQUESTS = Counter("http_requests_total", "Requests answered.", ["method", "route", "status"])
HTTP_DURATION = Histogram(
    "http_request_duration_seconds", "Time from request to answer.", ["method", "route"], buckets=_SECONDS
)
CONFIDENCE = Histogram(
    "sentiment_prediction_confidence",
    "Confidence of predictions.",
    ["label"],
    buckets=(0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0),
)
TEXTS = Counter("overtone_serve_texts_total", "Texts classified.", ["priority"])
BATCH_TEXTS = Histogram("overtone_serve_batch_texts", "Texts a batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256))
BATCH_TOKENS = Counter("overtone_serve_batch_tokens_total", "Tokens given to the engine.", ["kind"])
"""kind: `real` for tokens of texts, `padding` for the rest."""
QUEUE_SECONDS = Histogram("overtone_serve_queue_seconds", "Time from admission to the engine.", buckets=_SECONDS)
ENGINE_SECONDS = Histogram("overtone_serve_engine_seconds", "Time of one batch in the engine.", buckets=_SECONDS)
QUEUE_TEXTS = Gauge("overtone_serve_queue_texts", "Texts waiting.", multiprocess_mode="livesum")
REFUSED = Counter("overtone_serve_refused_total", "Requests refused.", ["reason"])
BUNDLES_REFUSED = Counter("overtone_serve_bundles_refused_total", "Bundles not fit for use.", ["role"])
"""role: `champion` or `challenger`."""
CANARY_REQUESTS = Counter("overtone_serve_canary_requests_total", "Requests given to the challenger.", ["outcome"])
"""outcome: `answered`, or `failed`; the champion answers a request that the challenger failed."""
CANARY_ROLLBACKS = Counter("overtone_serve_canary_rollbacks_total", "Canaries that were taken back by themselves.")
CANARY_SHARE = Gauge(
    "overtone_serve_canary_share", "Share of requests the challenger answers.", multiprocess_mode="liveall"
)
SHADOW_TEXTS = Counter(
    "overtone_serve_shadow_texts_total", "Texts both bundles classified.", ["champion_label", "challenger_label"]
)
SHADOW_DISTANCE = Histogram(
    "overtone_serve_shadow_distance",
    "Total variation distance of the two bundles' scores.",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
)
SHADOW_DROPPED = Counter("overtone_serve_shadow_dropped_total", "Sampled texts dropped because the replica was busy.")
SHADOW_FAILED = Counter("overtone_serve_shadow_failed_total", "Sampled texts the challenger could not classify.")
CACHE_TEXTS = Counter("overtone_serve_cache_texts_total", "Texts looked up in the cache.", ["outcome"])
"""outcome: `hit`, `miss`, or `skipped` while the shared cache is away."""
POSTS_RECEIVED = Counter("overtone_ingest_posts_received_total", "Posts read from the stream or by search.", ["source"])
POSTS_STORED = Counter("overtone_ingest_posts_stored_total", "Posts stored for the first time.")
PREDICTIONS_STORED = Counter("overtone_ingest_predictions_stored_total", "Predictions stored for the first time.")
DEAD_LETTERS = Counter("overtone_ingest_dead_letters_total", "Payloads put aside.", ["reason"])
STREAM_CONNECTS = Counter("overtone_ingest_stream_connects_total", "Connection attempts to the stream.", ["outcome"])
WRITE_SECONDS = Histogram(
    "overtone_ingest_write_seconds", "Time of one write transaction.", ["table"], buckets=_SECONDS
)
COMPLIANCE_ACTIONS = Counter(
    "overtone_ingest_compliance_actions_total", "What X asked to remove or to let back.", ["kind"]
)
STREAM_LAG_SECONDS = Gauge(
    "overtone_ingest_lag_seconds", "Age of the newest post when it was stored.", multiprocess_mode="livemax"
)
INGEST_QUEUE = Gauge("overtone_ingest_queue_posts", "Posts received and not yet stored.", multiprocess_mode="livesum")
SPOOL_BYTES = Gauge(
    "overtone_ingest_spool_bytes", "Bytes on disk that wait for the database.", multiprocess_mode="livesum"
)
SPOOLED = Counter("overtone_ingest_spooled_total", "Events of the stream that went through the disk.", ["step"])
"""step: `kept` when put on disk, `replayed` when stored from there."""
GAP_SECONDS = Counter("overtone_ingest_gap_seconds_total", "Length of gaps that were settled.", ["outcome"])
"""outcome: `repaired`, `partly_repaired` or `accepted`."""
RULE_POSTS = Counter("overtone_ingest_rule_posts_total", "Posts received from the stream, by matching rule.", ["rule"])
SPEND_POSTS = Gauge(
    "overtone_ingest_spend_posts", "Posts read from X in this billing period.", multiprocess_mode="livemax"
)
SPEND_CAP_POSTS = Gauge(
    "overtone_ingest_spend_cap_posts", "Posts that may be read in a period; 0 for no cap.", multiprocess_mode="livemax"
)
RETENTION_DONE = Gauge(
    "overtone_ingest_retention_done_seconds", "Unix time of the last retention.", multiprocess_mode="livemax"
)
SECRETS_READ = Counter(
    "overtone_secrets_read_total", "Readings of secrets from files and stores, after the first.", ["outcome"]
)
"""outcome: `read` or `failed`."""
JOB_CHUNKS = Counter("overtone_jobs_chunks_total", "Chunks of jobs that a consumer took.", ["outcome"])
"""outcome: `done`; `failed`, and tried again; `skipped`, because it was done or is being done, or the job has ended."""
JOB_TEXTS = Counter("overtone_jobs_texts_total", "Lines of jobs that were done.", ["outcome"])
"""outcome: `classified`, or `failed` for lines with an error."""
CELERY_QUEUE = Gauge("celery_task_queue_length", "Tasks in a queue.", ["queue"], multiprocess_mode="livemostrecent")
DB_POOL = Gauge("overtone_db_pool_connections", "Connections of the pool.", ["state"], multiprocess_mode="livesum")


def exposition(folder: Path | None) -> bytes:
    """The metrics in Prometheus text format: of every process that writes into `folder`, or of this one alone."""
    if folder is None:
        return generate_latest()
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def forget_dead_processes(folder: Path) -> None:
    """Drop the gauges of processes that are gone, so that sums over live processes stay true."""
    for path in folder.glob("gauge_live*_*.db"):
        pid = int(path.stem.rsplit("_", 1)[1])
        if not psutil.pid_exists(pid):
            path.unlink(missing_ok=True)
