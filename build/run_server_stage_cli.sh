#!/usr/bin/env bash
# Serve one stage of a checkpoint, or each of the two by a server of its own, from this source tree.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

model=${MODEL:-ByteDance-Seed/BAGEL-7B-MoT}
port=${PORT:-8091}
master_address=${MASTER_ADDRESS:-127.0.0.1}
master_port=${MASTER_PORT:-8092}
deploy_config=${DEPLOY_CONFIG:-bagel}
stage=all
extra=()

usage() {
    cat <<EOT
usage: build/run_server_stage_cli.sh [--stage {0|1|all}] [options] [-- OPTIONS OF bagel-triton serve]

  --stage {0|1|all}         stage to serve (default: all, each by a server of its own)
  --model MODEL             folder, or name at the Hugging Face hub (\$MODEL: $model)
  --port PORT               port of the OpenAI API, which stage 0 has (\$PORT: $port)
  --master-address ADDRESS  stage 0's host, as stage 1 reaches it (\$MASTER_ADDRESS: $master_address)
  --master-port PORT        port at which stage 1 registers (\$MASTER_PORT: $master_port)
  --deploy-config FILE      a deploy file, or the name of a preset (\$DEPLOY_CONFIG: $deploy_config)

What stands after -- goes to the stage that is served, and to both with --stage all. Either stage may start first.

  build/run_server_stage_cli.sh --stage 0 -- --max-model-len 65536
  build/run_server_stage_cli.sh --stage 1 -- --max-num-seqs 4
EOT
}

die() {
    echo "run_server_stage_cli.sh: error: $1 (see --help)" >&2
    exit 2
}

while [[ $# -gt 0 ]]; do
    case $1 in
        --stage | --model | --port | --master-address | --master-port | --deploy-config)
            [[ $# -ge 2 ]] || die "$1 needs a value"
            name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            shift 2
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            extra=("$@")
            break
            ;;
        *) die "$1 is not a known option" ;;
    esac
done
[[ $stage =~ ^(0|1|all)$ ]] || die "--stage=$stage is not allowed; allowed: 0, 1, all"

serve=("$root/.venv/bin/bagel-triton" serve "$model" --deploy-config "$deploy_config"
    --omni-master-address "$master_address" --omni-master-port "$master_port")
first=(--stage-id 0 --port "$port")
second=(--stage-id 1 --headless)

"$root/build/setup_env.sh"
case $stage in
    0) exec "${serve[@]}" "${first[@]}" "${extra[@]}" ;;
    1) exec "${serve[@]}" "${second[@]}" "${extra[@]}" ;;
esac

# Both, until one of them ends or a signal comes; then neither is left.
"${serve[@]}" "${second[@]}" "${extra[@]}" &
pids=($!)
"${serve[@]}" "${first[@]}" "${extra[@]}" &
pids+=($!)
stop() {
    trap '' INT TERM HUP
    kill -TERM "${pids[@]}" 2>/dev/null || true
    wait "${pids[@]}" 2>/dev/null || true
}
trap 'stop; exit 0' INT TERM HUP
status=0
wait -n "${pids[@]}" || status=$?
stop
exit "$status"
