"""Running the simulator until it is told to stop."""

import argparse
import asyncio
import signal
from pathlib import Path

from pydantic import ValidationError

from ingest.simulator.options import SimulatorOptions
from ingest.simulator.scenario import Scenario, load_scenario
from ingest.simulator.server import start_simulator
from overtone.errors import ConfigurationError
from overtone.logging import configure, get_logger

_log = get_logger()


def chosen_options(scenario: Scenario, **given: object) -> SimulatorOptions:
    """The options of `scenario`, with those of `given` that are not None in their place.

    Raises:
        ConfigurationError: naming each value that is wrong.
    """
    values = {**scenario.simulator.model_dump(), **{name: value for name, value in given.items() if value is not None}}
    try:
        return SimulatorOptions.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigurationError("\n".join(lines)) from None


async def serve(options: SimulatorOptions, host: str, port: int, scenario: Scenario) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigurationError: as `start_simulator`.
    """
    runner = await start_simulator(options, host, port, scenario=scenario)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await runner.cleanup()
    _log.info("simulator.stopped")


def main(arguments: list[str] | None = None) -> int:
    """Run the simulator until SIGINT or SIGTERM; 2 when it cannot start."""
    parser = argparse.ArgumentParser(
        prog="python -m ingest.simulator",
        description="A local server that speaks the X API v2: rules, stream, recent search, usage, compliance. "
        "Point X_API_BASE_URL at it; any bearer token will do. What is not given here comes from the scenario.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback only)")
    parser.add_argument("--port", type=int, default=8300, help="TCP port; 0 takes a free one (default: 8300)")
    parser.add_argument("--scenario", type=Path, help="YAML file of options and faults")
    parser.add_argument("--rate", type=float, help="posts a second, above 0 to 50000 (default: 50)")
    parser.add_argument("--posts", type=Path, help="texts to send, .jsonl, .tsv or .csv, over and over")
    parser.add_argument("--seed", type=int, help="seed of the generated posts and of the faults (default: 0)")
    parser.add_argument("--limit", type=int, help="publish this many posts, then only keep-alives")
    parser.add_argument("--token", help="the only bearer token to accept (default: any)")
    parser.add_argument("--log-format", choices=("json", "console"), default="console")
    given = parser.parse_args(arguments)
    configure("simulator", format=given.log_format)
    try:
        scenario = load_scenario(given.scenario) if given.scenario else Scenario()
        options = chosen_options(
            scenario, rate=given.rate, limit=given.limit, seed=given.seed, posts=given.posts, token=given.token
        )
        asyncio.run(serve(options, given.host, given.port, scenario))
    except ConfigurationError as error:
        _log.error("simulator.not_started", reason=error.message)
        return 2
    return 0
