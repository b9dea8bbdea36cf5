#!/usr/bin/env bash
# Shows the runs of this machine in MLflow's page, from the store that training writes beside its runs.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: launch/mlflow.sh [--port PORT] [--dir RUNS_DIR]

Serves the MLflow store in RUNS_DIR on http://127.0.0.1:PORT until Ctrl-C; this machine alone can reach it.

  --port PORT      default 5000
  --dir RUNS_DIR   where the runs are (run.dir of the config); default ./runs

examples:
  launch/mlflow.sh
  launch/mlflow.sh --port 5001 --dir /data/runs
  ssh -L 5000:127.0.0.1:5000 MACHINE    # then open http://127.0.0.1:5000 on your own desk
HELP
}

fail() {
    echo "mlflow.sh: $*" >&2
    exit 2
}

port=5000
runs_dir=./runs
while (($#)); do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --port | --dir)
            (($# > 1)) || fail "$1 has no value; for example $1 $([[ $1 == --port ]] && echo 5001 || echo runs)"
            if [[ $1 == --port ]]; then port=$2; else runs_dir=$2; fi
            shift 2
            ;;
        *) fail "unknown option '$1'; known: --port, --dir, --help" ;;
    esac
done
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] && ((port <= 65535)) || fail "--port is '$port'; must be a number from 1 to 65535"
[[ -f $runs_dir/mlflow.db ]] || fail "no MLflow store at $runs_dir/mlflow.db; train first, or name the folder of the runs with --dir"
if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    fail "port $port is in use; choose another one: --port $((port < 65535 ? port + 1 : 5000))"
fi

# From here on the working directory may change, so the folder becomes absolute.
runs_dir=$(cd -- "$runs_dir" && pwd)
checkout=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$checkout/.venv/bin/python
[[ -x $python ]] || "$checkout/launch/setup.sh"

echo "MLflow: http://127.0.0.1:$port (choose \"Model training\" at the top left; Ctrl-C ends it)"
cd -- "$checkout"
# A remote MLFLOW_TRACKING_URI is for training; this page shows the local store.
unset MLFLOW_TRACKING_URI
exec "$python" -c '
import os, sys
from pathlib import Path
from lce_dist.config import TrackingConfig
from lce_dist.tracking import UI_ENVIRONMENT, ui_command
argv = ui_command(TrackingConfig(), Path(sys.argv[1]), int(sys.argv[2]))
os.execve(argv[0], argv, {**os.environ, **UI_ENVIRONMENT})
' "$runs_dir" "$port"
