#!/usr/bin/env bash
# Passes the checks and the tests; arguments go to pytest. Sets the environment up on first use.
#   launch/test.sh                      everything
#   launch/test.sh tests/unit -k order  a part
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$checkout/launch/setup.sh"
cd "$checkout"
bin="$checkout/.venv/bin"
if [[ $# -eq 0 ]]; then
    "$bin/ruff" check .
    "$bin/ruff" format --check .
    "$bin/mypy"
    "$bin/lint-imports"
    # these share nothing: one process a processor; integration tests start clusters of their own
    # ci: the same examples each time; "pytest" alone draws new ones
    OMP_NUM_THREADS=1 "$bin/python" -m pytest -rs --hypothesis-profile ci \
        -n logical --maxprocesses 8 --dist loadfile tests/unit tests/distributed
    set -- tests --ignore tests/unit --ignore tests/distributed
fi
# -rs: what is skipped, and why, is said at the end
exec "$bin/python" -m pytest -rs "$@"
