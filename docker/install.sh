#!/bin/sh
# install.sh WHEELS PREFIX EXTRAS: an environment in PREFIX with the wheel from WHEELS, and beside it a list of all that
# is in it (a CycloneDX bill of materials in PREFIX/sbom.json). EXTRAS are comma-separated, or empty.
set -eu
wheels=$1 prefix=$2 extras=$3
wheel=$(ls "$wheels"/overtone-*.whl)
python3 -m venv "$prefix"
"$prefix/bin/pip" install --quiet --disable-pip-version-check --no-compile \
    --constraint "$wheels/constraints.txt" "${wheel}${extras:+[$extras]}"
case ",$extras," in *,gpu,*)
    # Both packages bring the module onnxruntime; the one for GPUs must be the one that stays.
    "$prefix/bin/pip" uninstall --quiet --yes onnxruntime
    "$prefix/bin/pip" install --quiet --disable-pip-version-check --no-deps --force-reinstall \
        "onnxruntime-gpu==$("$prefix/bin/pip" show onnxruntime-gpu | sed -n 's/^Version: //p')" ;;
esac
"$prefix/bin/overtone" --version
"$prefix/bin/python" "$(dirname "$0")/sbom.py" >"$prefix/sbom.json"
