"""`python -m ingest.simulator`: the simulator in this process."""

import sys

from ingest.simulator.command import main

sys.exit(main())
