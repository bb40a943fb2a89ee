#!/usr/bin/env bash
# Make .venv with everything the project needs; a second run with nothing changed does nothing.
# PYTHON=/path/to/python3.12 chooses the interpreter; otherwise the first fitting one on PATH is taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "setup: error: $1" >&2
    exit 1
}

fits() { # whether $1 runs and is a Python this project supports
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null
}

find_python() {
    local candidate candidates=${PYTHON:-python3 python3.12 python3.11}
    for candidate in $candidates; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed, and found under none of: $candidates (set PYTHON=/path/to/python3.12)"
}

mooncake() { # what keeps the connector mooncake from working; nothing where it works
    .venv/bin/python - <<'EOF'
from bagel_triton.kv.connectors.base import ConnectorUnavailable
from bagel_triton.kv.connectors.transfer_engine import load

try:
    load("mooncake.engine")
except (ConnectorUnavailable, ImportError) as error:
    print(error)
EOF
}

unpack_libibverbs() ( # into folder $1, from the packages of Debian or Ubuntu; installs nothing
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    chmod 755 "$folder"
    cd "$folder"
    timeout 60 apt-get -qq download libibverbs1 libnl-3-200 libnl-route-3-200
    for package in *.deb; do
        dpkg --extract "$package" .
    done
    find . \( -name libibverbs.so.1 -o -name 'libnl-*.so.200' \) -exec cp --dereference {} "$1" \;
) >/dev/null 2>&1

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "Linux on x86_64 is needed; this is $(uname -s) on $(uname -m)"
python=$(find_python)
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv and pip modules; install the package $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"

stamp=.venv/.setup
wanted=$({ "$python" -VV; cat pyproject.toml build/constraints.txt build/setup_env.sh; } | sha256sum)
if [ -x .venv/bin/bagel-triton ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

echo "setup: making .venv with $("$python" --version); the first time takes a few minutes"
rm -f "$stamp"
if [ "$(.venv/bin/python -VV 2>/dev/null)" != "$("$python" -VV)" ]; then
    "$python" -m venv --clear .venv
fi
install=(.venv/bin/python -m pip install --disable-pip-version-check --constraint build/constraints.txt)
"${install[@]}" setuptools
"${install[@]}" --no-build-isolation --editable '.[test,lint]'
# Only the server binaries of this wheel are used, so what its Python API needs is left out.
"${install[@]}" --no-deps nvidia-pytriton
# The connector mooncake is an extra: without it everything else works, and its tests are skipped.
if "${install[@]}" --no-build-isolation --editable '.[mooncake]'; then
    if [[ $(mooncake) = *libibverbs* ]]; then
        # The wheel leaves this library to the system, but looks for it beside its own files first.
        unpack_libibverbs "$(.venv/bin/python -c 'import mooncake; print(mooncake.__path__[0])')" || true
    fi
    missing=$(mooncake)
    [ -z "$missing" ] || echo "setup: $missing; until then its tests are skipped"
else
    echo "setup: the connector mooncake could not be installed; its tests are skipped"
fi
echo "$wanted" >"$stamp"
echo "setup: .venv is ready"
