#!/usr/bin/env bash
# Lets checkov look at the manifests; its environment (.venv-checkov, apart because its pins are not ours) is made on first use.
#   launch/checkov.sh                       everything that k8s/ builds, through the test that knows which findings are explained
#   launch/checkov.sh -d FOLDER ...         checkov itself
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$checkout/launch/setup.sh"
venv="$checkout/.venv-checkov"
stamp="$venv/lce-dist.stamp"
wanted=$(sha256sum <"$checkout/requirements/checkov.txt")
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    echo "checkov: making .venv-checkov (once, a few minutes)" >&2
    rm -rf "$venv"
    "$checkout/.venv/bin/python" -m venv "$venv"
    "$venv/bin/python" -m pip --disable-pip-version-check install --quiet -r "$checkout/requirements/checkov.txt"
    echo "$wanted" >"$stamp"
fi
if [[ $# -gt 0 ]]; then
    exec "$venv/bin/checkov" "$@"
fi
cd "$checkout"
exec "$checkout/.venv/bin/python" -m pytest -rs tests/unit/test_kubernetes.py -k checkov
