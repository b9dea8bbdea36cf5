#!/usr/bin/env bash
# Makes or refreshes the checkout's own Python environment (.venv); says nothing when it is up to date.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$checkout/.venv"
stamp="$venv/lce-dist.stamp"

find_python() {
    local candidate
    for candidate in ${LCE_PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11 to 3.13 with the venv module found; install one (Debian: apt install python3 python3-venv) or set LCE_PYTHON=/path/to/python" >&2
    exit 4
}

wanted=$(cat "$checkout/requirements/torch.txt" "$checkout/requirements/lock.txt" "$checkout/pyproject.toml" | sha256sum | cut -d' ' -f1)
wanted="$wanted $checkout"
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

# two commands typed at once set up once
exec 9>"$checkout/.venv.lock"
flock 9
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

python=$(find_python)
log="$checkout/.venv.log"
: >"$log"
step() {
    echo "setup: $1" >&2
    shift
    if ! "$@" >>"$log" 2>&1; then
        tail -n 15 "$log" >&2
        echo "setup: failed; the whole log is $log. Check the network and the disk, then run the same command again" >&2
        exit 4
    fi
}
rm -f "$stamp"
# its commands hold the path that it was made under: after a move it is made anew
if ! "$venv/bin/python" -c 'import pip' 2>/dev/null || ! grep -qsF "$venv/" "$venv/bin/pip"; then
    rm -rf "$venv"
    step "making .venv with $("$python" --version)" "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
# torch first and alone: left to the solver, it could be replaced by a build for other hardware
step "installing torch (1 of 3; a few minutes the first time)" "${pip[@]}" -r "$checkout/requirements/torch.txt"
# deepspeed's own build looks at the torch that is there
step "installing the locked packages (2 of 3)" "${pip[@]}" --no-build-isolation -r "$checkout/requirements/lock.txt"
step "installing lce-dist (3 of 3)" "${pip[@]}" --no-build-isolation --no-deps -e "$checkout"
echo "$wanted" >"$stamp"
echo "setup: done" >&2
