"""Writes a CycloneDX bill of materials of the environment that runs this, from the metadata of what is installed."""

import json
import sys
from importlib.metadata import distributions


def components() -> list[dict[str, object]]:
    """One component a distribution, by name."""
    found: dict[str, dict[str, object]] = {}
    for each in distributions():
        name = str(each.metadata["Name"]).lower().replace("_", "-")
        part: dict[str, object] = {
            "type": "library",
            "name": name,
            "version": each.version,
            "purl": f"pkg:pypi/{name}@{each.version}",
        }
        licence = each.metadata.get("License-Expression")
        if licence:
            part["licenses"] = [{"expression": licence}]
        found[name] = part
    return [found[name] for name in sorted(found)]


if __name__ == "__main__":
    bill = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components()}
    json.dump(bill, sys.stdout, indent=1)
    sys.stdout.write("\n")
