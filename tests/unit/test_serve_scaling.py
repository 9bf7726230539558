"""How many replicas the work needs."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from serve.scaling import Load, LoadMeter, Work, consumers_for, replicas_for, scale_by_queue, scale_by_waiting_tokens

LOADS = st.lists(
    st.builds(
        Load,
        waiting_tokens=st.integers(0, 10**7).map(float),
        tokens_per_s=st.integers(0, 10**6).map(float),
        busy=st.integers(0, 100).map(lambda percent: percent / 100),
    ),
    max_size=20,
)


@given(LOADS, st.integers(1, 5), st.integers(0, 20))
def test_the_number_is_within_bounds(loads: list[Load], minimum: int, more: int) -> None:
    assert minimum <= replicas_for(loads, minimum=minimum, maximum=minimum + more) <= minimum + more


@given(LOADS, st.integers(1, 10**6))
def test_more_work_never_needs_fewer(loads: list[Load], tokens: int) -> None:
    more = [*loads, Load(float(tokens), 1000.0, 0.5)]

    assert replicas_for(more, minimum=1, maximum=1000) >= replicas_for(loads, minimum=1, maximum=1000)


def test_idle_replicas_shrink_to_the_minimum_and_busy_ones_grow() -> None:
    assert replicas_for([Load(0, 2000, 0.0)] * 8, minimum=2, maximum=10) == 2
    assert replicas_for([Load(0, 2000, 1.0)] * 3, minimum=1, maximum=10) == 4
    assert replicas_for([Load(20_000, 2000, 1.0)], minimum=1, maximum=10) == 4
    assert replicas_for([Load(0, 2000, 0.75)] * 4, minimum=1, maximum=10) == 4


def test_a_meter_tells_what_was_done_since_the_last_look() -> None:
    now = [0.0]
    meter = LoadMeter(lambda: now[0])

    now[0] = 10.0
    assert meter.measure(Work(7, 4000, 2.0)) == {"waiting_tokens": 7.0, "tokens_per_s": 2000.0, "busy": 0.2}
    now[0] = 20.0
    assert meter.measure(Work(0, 4000, 2.0)) == {"waiting_tokens": 0.0, "tokens_per_s": 0.0, "busy": 0.0}


def test_the_policy_reads_what_replicas_report_and_stays_without_any() -> None:
    context = SimpleNamespace(
        aggregated_metrics={
            "waiting_tokens": {"a": 30_000.0, "b": 0.0},
            "tokens_per_s": {"a": 2000.0},
            "busy": {"a": 1},
        },
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=10,
        target_num_replicas=2,
    )

    assert scale_by_waiting_tokens(context) == (6, {})
    context.aggregated_metrics = None
    assert scale_by_waiting_tokens(context) == (2, {})


def test_consumers_follow_the_length_of_the_queue_within_bounds() -> None:
    assert [consumers_for(waiting, minimum=1, maximum=4) for waiting in (0, 16, 17, 64, 1e9)] == [1, 1, 2, 4, 4]
    context = SimpleNamespace(
        aggregated_metrics={"queue_length": {"a": 40.0, "b": 33.0}},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        target_num_replicas=2,
    )

    assert scale_by_queue(context) == (3, {})
    context.aggregated_metrics = {}
    assert scale_by_queue(context) == (2, {})
    context.aggregated_metrics = None
    assert scale_by_queue(context) == (2, {})


def test_the_policy_of_consumers_over_a_night_of_work() -> None:
    context = SimpleNamespace(
        aggregated_metrics={}, capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=8, target_num_replicas=1
    )
    wanted = []
    for waiting in (0, 1, 16, 17, 63, 64, 65, 127, 128, 129, 640, 100, 48, 16, 0):
        # Each consumer that there is tells the length it saw last; one of them has not looked for a while.
        seen = {f"c{number}": float(waiting) for number in range(context.target_num_replicas)} | {"late": 0.0}
        context.aggregated_metrics = {"queue_length": seen}
        context.target_num_replicas, _ = scale_by_queue(context)
        wanted.append(context.target_num_replicas)

    assert wanted == [1, 1, 1, 2, 4, 4, 5, 8, 8, 8, 8, 7, 3, 1, 1]


def test_consumers_keep_to_the_bounds_that_serve_has_adjusted() -> None:
    context = SimpleNamespace(
        aggregated_metrics={"queue_length": {"a": 500.0}},
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=3,
        target_num_replicas=1,
    )

    assert scale_by_queue(context) == (3, {})
    context.aggregated_metrics = {"queue_length": {"a": 0.0}}
    assert scale_by_queue(context) == (0, {})
    context.capacity_adjusted_min_replicas = 2
    assert scale_by_queue(context) == (2, {})
