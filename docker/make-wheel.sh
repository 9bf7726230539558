#!/bin/sh
# make-wheel.sh SOURCE FOLDER: builds the product's wheel from SOURCE into FOLDER, with the versions it is tested with.
set -eu
source=$1 folder=$2
builder=$(mktemp -d)
trap 'rm -rf "$builder"' EXIT
python3 -m venv "$builder"
"$builder/bin/pip" install --quiet --disable-pip-version-check build==1.6.1
mkdir -p "$folder"
"$builder/bin/python" -m build --wheel --outdir "$folder" "$source"
cp "$source/constraints.txt" "$folder/"
