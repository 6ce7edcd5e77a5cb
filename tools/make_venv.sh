#!/usr/bin/env bash
# Makes a virtual environment with Python 3.12 and installs requirements.lock, this package and its plugin into it.
set -euo pipefail
venv=$1

# pyenv's shims answer to the name of every version they know of, installed or not: ask each candidate to run.
is_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3 python; do
        if is_312 "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    if command -v uv >/dev/null && candidate=$(uv python find 3.12 2>/dev/null) && is_312 "$candidate"; then
        echo "$candidate"
        return
    fi
    # a version that pyenv has, though none or another is selected here
    if command -v pyenv >/dev/null && candidate=$(pyenv prefix 3.12 2>/dev/null)/bin/python && is_312 "$candidate"; then
        echo "$candidate"
        return
    fi
    echo "Python 3.12 was not found (looked for \$PYTHON, python3.12, python3, python, uv, pyenv)." >&2
    echo "Install it, for instance: apt-get install python3.12 python3.12-venv | pyenv install 3.12 | uv python install 3.12" >&2
    echo "or say where it is: make PYTHON=/path/to/python3.12 TARGET" >&2
    return 1
}

if ! is_312 "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Making $venv with $("$python" --version)"
    if ! "$python" -m venv --clear "$venv"; then
        echo "$python has no venv module with pip. On Debian and Ubuntu: apt-get install python3.12-venv" >&2
        exit 1
    fi
fi

echo "Installing the packages of requirements.lock"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^uv==' requirements.lock)"
VIRTUAL_ENV=$venv "$venv/bin/uv" pip install --quiet --requirement requirements.lock
VIRTUAL_ENV=$venv "$venv/bin/uv" pip install --quiet --no-deps --no-build-isolation --editable . \
    --editable ./plugins/lerobot_policy_pi05_lightning
