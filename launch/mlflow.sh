#!/usr/bin/env bash
# Shows the runs of this machine in MLflow's page, or serves a team (--server); see launch/mlflow.sh --help.
set -euo pipefail
checkout=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
"$checkout/launch/setup.sh"
exec "$checkout/.venv/bin/python" -P -m launch.mlflow_server "$@"
