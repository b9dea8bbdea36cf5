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
    # these share nothing: one process a processor
    # ci: the same examples each time; "pytest" alone draws new ones
    OMP_NUM_THREADS=1 "$bin/python" -m pytest -rs --hypothesis-profile ci \
        -n logical --maxprocesses 8 --dist loadfile tests/unit tests/distributed
    # clusters and servers of their own, which wait more than they compute
    set -- -n logical --maxprocesses 2 --dist loadfile tests --ignore tests/unit --ignore tests/distributed
fi
# -rs: what is skipped, and why, is said at the end
exec "$bin/python" -m pytest -rs "$@"
