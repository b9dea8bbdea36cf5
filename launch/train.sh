#!/usr/bin/env bash
# Trains a compatible model; see launch/train.sh --help. Sets the environment up on first use.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$checkout/launch/setup.sh"
exec "$checkout/.venv/bin/lce" train "$@"
