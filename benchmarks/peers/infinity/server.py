"""infinity: `python -m benchmarks.peers.infinity.server PORT WORKERS`. It loads the bundle by itself, by optimum."""

import os
import sys
from pathlib import Path

from benchmarks.peers.hub import write_hub_folder
from overtone.bundle import load_bundle
from overtone.settings import load_settings

if __name__ == "__main__":
    folder = write_hub_folder(load_bundle(load_settings().bundle), Path.cwd() / "model")
    # It hands optimum the path of the file within the model's folder only when it is started there.
    os.chdir(folder)
    os.environ |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ONNX_DISABLE_OPTIMIZE": "true"}
    options = {
        "--model-id": ".",
        "--served-model-name": "sentiment",
        "--engine": "optimum",
        "--device": "cpu",
        "--batch-size": "32",
        "--host": "127.0.0.1",
        "--port": sys.argv[1],
        "--log-level": "warning",
    }
    words = [word for option in options.items() for word in option]
    program = str(Path(sys.executable).parent / "infinity_emb")
    # Its own warm-up sends texts longer than the model's 512 positions, and it truncates none.
    os.execv(program, [program, "v2", *words, "--no-model-warmup"])
