#!/usr/bin/env bash
# Everything that only a GPU can prove, in order of value, each step in processes of its own:
#
#   benchmarks/gpu_proof.sh [--device cuda|cpu] [--data PACKED] [--videos VIDEOS] [--flow-gt PAIRS] [--out DIR] [--quick]
#
# Needs one GPU, Python, torch, DALI (on PYTHONPATH is enough), OpenCV, scikit-learn, PyYAML, TensorBoard, tqdm, psutil,
# matplotlib, webdataset and pytest; no network. Nine minutes at most: each step has its budget of seconds, and is ended
# when that is spent, with status 124. A step that fails does not stop the others; the exit status is that of the worst.
# Results are JSON in DIR (default benchmarks/results), on disk as soon as they are known: those of a step that was cut
# off stay in NAME.partial.json.
# Optical flow is measured on clips of VIDEOS, a folder of class folders, and on PAIRS, a folder of pairs with true flow
# as Middlebury's; without them on generated ones.
# `--device cpu --quick` runs the same steps on a machine without a GPU, to test their logic.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}

device=cuda out=benchmarks/results quick=() data=() videos=() pairs=()
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --data) data=(--data "$2"); shift 2 ;;
        --videos) videos=(--data "$2"); shift 2 ;;
        --flow-gt) pairs=("$2"); shift 2 ;;
        --out) out=$2; shift 2 ;;
        --quick) quick=(--quick); shift ;;
        *) echo "gpu_proof.sh: unknown argument $1; known: --device --data --videos --flow-gt --out --quick" >&2; exit 2 ;;
    esac
done
"$PYTHON" -c 'import cv2, matplotlib, nvidia.dali, psutil, pytest, sklearn, torch, torch.utils.tensorboard, tqdm, webdataset, yaml' || {
    echo "gpu_proof.sh: a package is missing (see above); carry it on PYTHONPATH" >&2
    exit 2
}
mkdir -p "$out"
worst=0
GPU_TESTS=(tests/test_loaders.py tests/test_trajectory.py tests/test_windows.py tests/test_rescale.py tests/test_probe.py tests/test_meter.py tests/test_launch.py tests/test_extract.py tests/test_brox.py tests/test_pack.py tests/test_damage.py tests/test_predict.py)

step() { # name, seconds, command...
    local name=$1 budget=$2 status=0
    shift 2
    echo "== $name, at most $budget s"
    timeout --kill-after=5 "$budget" "$@" || status=$?
    printf '{"step": "%s", "exit_status": %d, "seconds": %d}\n' "$name" "$status" "$SECONDS" >> "$out/gpu_proof.jsonl"
    if [ "$status" -gt "$worst" ]; then worst=$status; fi
}

: > "$out/gpu_proof.jsonl"
if [ "$device" = cuda ]; then
    tests=(env REQUIRE_GPU=1 "$PYTHON" -m pytest -q -m gpu "${GPU_TESTS[@]}")
    throughput=(--rows ours_k1 ours_k4 ours_k8 torch_dataloader dali_textbook ceiling_decode ceiling_write --workers 8 16)
    machines=(--gpus 1) flow=()
else
    tests=("$PYTHON" -m pytest -q -k "equal_the_reference and spatial and cpu" tests/test_loaders.py)
    throughput=() machines=(--procs 1) flow=(--methods dis brox)
fi
common=("${data[@]}" "${quick[@]}")

step gpu_tests 110 "${tests[@]}" -p no:cacheprovider
step decode_rates 90 "$PYTHON" benchmarks/decode_rates.py --device "$device" "${common[@]}" --out "$out/decode_rates_$device.json"
for stream in temporal:70 spatial:50; do # one may crash: a process and a file for each
    name=${stream%:*}
    step "loader_throughput_$name" "${stream#*:}" "$PYTHON" benchmarks/loader_throughput.py --device "$device" --streams "$name" \
        "${throughput[@]}" --rounds 2 --seconds 1.5 "${common[@]}" --out "$out/loader_throughput_${device}_$name.json"
done
step train_step 70 "$PYTHON" benchmarks/train_step.py --device "$device" --rounds 2 --steps 40 "${common[@]}" --out "$out/train_step_$device.json"
step scaling 60 "$PYTHON" benchmarks/scaling.py "${machines[@]}" --rounds 1 --steps 20 "${common[@]}" --out "$out/scaling_$device.json"
step flow_accuracy 30 "$PYTHON" benchmarks/flow_accuracy.py "${pairs[@]}" --device "$device" "${flow[@]}" "${quick[@]}" \
    --out "$out/flow_accuracy_$device.json"
step flow_extraction 60 "$PYTHON" benchmarks/flow_extraction.py "${videos[@]}" "${pairs[@]/#/--flow-gt=}" --device "$device" \
    "${flow[@]}" --rounds 2 --seconds 2 "${quick[@]}" --out "$out/flow_extraction_$device.json"
exit "$worst"
