#!/usr/bin/env bash
# Copy models from Hugging Face to ModelScope:
#   quick_start_transfer.sh setup              install what is needed, and say how to log in
#   quick_start_transfer.sh transfer SRC DST   copy a model
#   quick_start_transfer.sh batch FILE         copy the models of a list
#   quick_start_transfer.sh test               check this machine, the logins and the connection to both hubs
set -euo pipefail

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$scripts")

usage() {
  sed -n '2,6s/^# //p' "$0" >&2
  exit 2
}

provider() {
  if command -v emb-provider > /dev/null; then
    emb-provider "$@"
  elif command -v uv > /dev/null; then
    uv run --project "$root" emb-provider "$@"
  else
    echo "emb-provider is not installed. Run: bash scripts/quick_start_transfer.sh setup" >&2
    exit 2
  fi
}

setup() {
  if ! command -v emb-provider > /dev/null; then
    command -v uv > /dev/null || python3 -m pip install uv
    # pip may have installed it to a directory that is not on PATH.
    command -v uv > /dev/null || uv() { python3 -m uv "$@"; }
    uv sync --project "$root"
  fi
  provider --version
  cat << 'END'

Log in to both hubs:
  Hugging Face   only for private or gated models:  hf auth login           or  export HF_TOKEN=hf_...
                 create a token: https://huggingface.co/settings/tokens
  ModelScope     always, because it is written to:  modelscope login        or  export MODELSCOPE_API_TOKEN=ms-...
                 create a token: https://modelscope.cn/my/myaccesstoken
modelscope.cn and modelscope.ai have different tokens. In mainland China: export HF_ENDPOINT=https://hf-mirror.com

Then: bash scripts/quick_start_transfer.sh test
END
}

case "${1:-}" in
  setup)
    [ $# -eq 1 ] || usage
    setup
    ;;
  transfer)
    [ $# -ge 3 ] || usage
    provider "$@"
    ;;
  batch)
    [ $# -ge 2 ] || usage
    exec bash "$scripts/batch_transfer.sh" "${@:2}"
    ;;
  test)
    [ $# -eq 1 ] || usage
    provider doctor
    echo "If ModelScope answers without a token, log in first: bash scripts/quick_start_transfer.sh setup" >&2
    ;;
  *)
    usage
    ;;
esac
