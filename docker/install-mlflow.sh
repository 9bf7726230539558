#!/bin/sh
# install-mlflow.sh WHEELS PREFIX: an environment in PREFIX with MLflow and its drivers, and a list of all that is in it.
set -eu
wheels=$1 prefix=$2
python3 -m venv "$prefix"
"$prefix/bin/pip" install --quiet --disable-pip-version-check --no-compile \
    --constraint "$wheels/constraints.txt" mlflow 'psycopg2-binary>=2.9,<3' 'boto3>=1.40,<2'
"$prefix/bin/mlflow" --version
"$prefix/bin/python" "$(dirname "$0")/sbom.py" >"$prefix/sbom.json"
