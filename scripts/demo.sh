#!/usr/bin/env bash
# From a bare machine to a trained GPT: installs what is missing, builds, fetches a real text, trains a small model once with
# AdamW and once with DMuon, and ends with a sample, the loss of both and a picture. A second run reuses what is there.
set -euo pipefail
exec "$(dirname "$0")/compare.sh" adamw dmuon
