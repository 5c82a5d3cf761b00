#!/usr/bin/env bash
# Everything that only a GPU can prove, in order of value, each step in processes of its own:
#
#   benchmarks/gpu_proof.sh [--device cuda|cpu] [--data PACKED] [--out DIR] [--quick]
#
# Needs one GPU, Python, torch, DALI (on PYTHONPATH is enough), OpenCV, scikit-learn, PyYAML, TensorBoard, tqdm, psutil,
# matplotlib, webdataset and pytest; no network. About nine minutes. A step that fails does not stop the others; the exit status is
# that of the worst. Results are JSON in DIR (default benchmarks/results), on disk as soon as they are known.
# `--device cpu --quick` runs the same steps on a machine without a GPU, to test their logic.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}

device=cuda out=benchmarks/results quick=() data=()
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --data) data=(--data "$2"); shift 2 ;;
        --out) out=$2; shift 2 ;;
        --quick) quick=(--quick); shift ;;
        *) echo "gpu_proof.sh: unknown argument $1; known: --device --data --out --quick" >&2; exit 2 ;;
    esac
done
"$PYTHON" -c 'import cv2, matplotlib, nvidia.dali, psutil, pytest, sklearn, torch, torch.utils.tensorboard, tqdm, webdataset, yaml' || {
    echo "gpu_proof.sh: a package is missing (see above); carry it on PYTHONPATH" >&2
    exit 2
}
mkdir -p "$out"
worst=0
GPU_TESTS=(tests/test_loaders.py tests/test_windows.py tests/test_probe.py tests/test_meter.py tests/test_launch.py)

step() { # name, command...
    local name=$1 status=0
    shift
    echo "== $name"
    timeout 180 "$@" || status=$?
    printf '{"step": "%s", "exit_status": %d, "seconds": %d}\n' "$name" "$status" "$SECONDS" >> "$out/gpu_proof.jsonl"
    if [ "$status" -gt "$worst" ]; then worst=$status; fi
}

: > "$out/gpu_proof.jsonl"
if [ "$device" = cuda ]; then
    step gpu_tests env REQUIRE_GPU=1 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider "${GPU_TESTS[@]}"
else
    step gpu_tests "$PYTHON" -m pytest -q -k "equal_the_reference and spatial and cpu" -p no:cacheprovider tests/test_loaders.py
fi
step decode_rates "$PYTHON" benchmarks/decode_rates.py --device "$device" "${data[@]}" "${quick[@]}" --out "$out/decode_rates_$device.json"
for stream in temporal spatial; do # one may crash: a process and a file for each
    step "loader_throughput_$stream" "$PYTHON" benchmarks/loader_throughput.py --device "$device" --streams "$stream" --rounds 3 \
        --seconds 2 "${data[@]}" "${quick[@]}" --out "$out/loader_throughput_${device}_$stream.json"
done
step train_step "$PYTHON" benchmarks/train_step.py --device "$device" "${data[@]}" "${quick[@]}" --out "$out/train_step_$device.json"
if [ "$device" = cuda ]; then machines=(--gpus 1); else machines=(--procs 1); fi
step scaling "$PYTHON" benchmarks/scaling.py "${machines[@]}" "${data[@]}" "${quick[@]}" --out "$out/scaling_$device.json"
exit "$worst"
