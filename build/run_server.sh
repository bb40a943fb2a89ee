#!/usr/bin/env bash
# Serve a checkpoint from this source tree, making the environment first where it is missing.
#
#   build/run_server.sh CHECKPOINT [OPTIONS OF bagel-triton serve...]
#   MODEL=/models/BAGEL-7B-MoT PORT=8091 DEPLOY_CONFIG=build/deploy/bagel_think.yaml build/run_server.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

model=${MODEL:-}
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    model=$1
    shift
fi
if [ -z "$model" ]; then
    echo "usage: $0 CHECKPOINT [options of bagel-triton serve] (or set MODEL)" >&2
    exit 2
fi

"$root/build/setup_env.sh"
exec "$root/.venv/bin/bagel-triton" serve "$model" \
    --port "${PORT:-8091}" \
    --deploy-config "${DEPLOY_CONFIG:-$root/build/deploy/bagel.yaml}" \
    "$@"
