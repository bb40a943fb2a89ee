#!/usr/bin/env bash
# Serve a checkpoint from this source tree, making the environment first where it is missing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<EOF
usage: build/run_server.sh [CHECKPOINT] [options of bagel-triton serve]

CHECKPOINT is a folder, or a repository of the Hugging Face hub. These variables are defaults:
  MODEL          CHECKPOINT (ByteDance-Seed/BAGEL-7B-MoT)
  PORT           port of the OpenAI API (8091)
  DEPLOY_CONFIG  a deploy YAML, or the name of a preset (bagel)

  MODEL=/models/BAGEL-7B-MoT DEPLOY_CONFIG=bagel_think build/run_server.sh --host 0.0.0.0
EOF
}

model=${MODEL:-ByteDance-Seed/BAGEL-7B-MoT}
case ${1:-} in
    -h | --help)
        usage
        exit 0
        ;;
    "" | -*) ;;
    *)
        model=$1
        shift
        ;;
esac

"$root/build/setup_env.sh"
exec "$root/.venv/bin/bagel-triton" serve "$model" \
    --port "${PORT:-8091}" \
    --deploy-config "${DEPLOY_CONFIG:-bagel}" \
    "$@"
