#!/usr/bin/env bash
# Copy the models of a list from Hugging Face to ModelScope: batch_transfer.sh FILE [OPTIONS of `emb-provider transfer`]
# Each line of FILE is `hf_model ms_model`; # begins a comment. A model that fails does not stop the others.
# DELAY is the pause between two models in seconds, against rate limits.
set -euo pipefail

if [ $# -lt 1 ] || [ "$1" = "-h" ] || [ "$1" = "--help" ]; then
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
fi
file=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
arguments=(transfer --batch "$file" --delay "${DELAY:-2}" "$@")
if command -v emb-provider > /dev/null; then
  exec emb-provider "${arguments[@]}"
elif command -v uv > /dev/null; then
  exec uv run --project "$root" emb-provider "${arguments[@]}"
fi
echo "emb-provider is not installed. Run: bash scripts/quick_start_transfer.sh setup" >&2
exit 2
