"""A local server that speaks the X API v2, so that nothing else is needed to try, show or test the pipeline.

It publishes posts on the clock, whether or not anyone listens; whoever was not connected has to find what it missed by
recent search, as with the real one. State lives in memory. `ingest.simulator.faults` lists what can be broken on
purpose, by `POST /simulator/faults` or by the steps of a scenario; `GET /simulator/ledger` tells what was sent.
"""

from ingest.simulator.command import main
from ingest.simulator.options import SimulatorOptions
from ingest.simulator.server import Simulator, start_simulator

__all__ = ["Simulator", "SimulatorOptions", "main", "start_simulator"]
