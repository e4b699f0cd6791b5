#!/usr/bin/env bash
# Serves a model folder with FFA_FP8FP8: serve.sh FOLDER. BACKEND=NAME takes another backend, BACKEND= (empty) vLLM's default.
set -euo pipefail
model=$1
name=$(basename "$model")
port=${PORT:-8000}
bin=${BIN:-.venv/bin}
backend=${BACKEND-FFA_FP8FP8}

unset VLLM_ATTENTION_BACKEND # the option says it
options=()
if [ -n "$backend" ]; then options+=(--attention-backend "$backend"); fi
# Compiling for the CPU takes longer than it saves on a model this small.
if ! nvidia-smi >/dev/null 2>&1; then options+=(--enforce-eager); fi

cat <<END
Serving $name on port $port with ${backend:-the default backend}. A prompt long enough to be pruned, once the server is up:

python3 -c "
import argparse, json
source = open(argparse.__file__).read()[:12000]
prompt = '# note: the code of tamiro is 48213.\n' + source + '\n\n# recall: the code of tamiro is'
print(json.dumps({'model': '$name', 'prompt': prompt, 'temperature': 0, 'max_tokens': 8}))
" | curl http://localhost:$port/v1/completions -H 'Content-Type: application/json' -d @-

END
exec "$bin/vllm" serve "$model" --served-model-name "$name" --port "$port" "${options[@]}" ${ARGS:-}
