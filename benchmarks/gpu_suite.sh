#!/usr/bin/env bash
# All GPU tests and benchmarks in under eleven minutes, on a bare machine that has PyTorch, Triton and NumPy, no network,
# and not this package.
#
#   benchmarks/gpu_suite.sh OUT [--wheels DIR] [--python PYTHON]   run everything; results go into the folder OUT
#   benchmarks/gpu_suite.sh --dry-run OUT [--wheels DIR]           the same on the CPU, in tiny sizes, to try the script
#   benchmarks/gpu_suite.sh --pack DIR [--for 3.12]                download what can be carried along for --wheels DIR
#
# The tree is installed into a throwaway environment; neither it nor the machine's Python is changed. Each part has a
# time budget, all together AVSEP_SUITE_SECONDS (640), a part that fails stops no other, and the exit code is not 0 where
# one failed. OUT receives summary.txt, environment.txt, tests.log, tests.xml, bench.log, kernels.csv, kernels.png,
# train.csv, continual.csv, forms.csv and separate.csv.
#
# The order is that of worth, since a borrowed machine may be taken back, and CSV files are written row by row: what was
# finished stays. First the kernels at the published sizes, which the table of `auto` waits for and no other machine can
# tell; each is held against float64 before it is timed, so these rows stand without the tests. Then what training costs
# (fp32, bf16), and whether it reaches there what it reaches on a CPU (two seeds of two tasks, with and without memory).
# Then the tests, which say whether all the rest is right on a GPU too. Last what adds a row to what is known by then:
# the separator's forms, the compiled step, large sizes, a long recording, huge sizes. On SIGTERM the running part is
# stopped, and the summary says so.
set -u -o pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
total_s=${AVSEP_SUITE_SECONDS:-} # 640, of a dry run 840
reserve_s=15 # of it, for the last part, which reads what was measured
out="" wheels="" pack="" for_python=3.12 dry=0

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" # the lines above
}

die() {
    echo "gpu_suite.sh: $*" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --dry-run) dry=1 ;;
    --wheels | --python | --pack | --for)
        [ $# -ge 2 ] || die "$1 needs a value"
        case $1 in
        --wheels) wheels=$2 ;;
        --python) python=$2 ;;
        --pack) pack=$2 ;;
        --for) for_python=$2 ;;
        esac
        shift
        ;;
    -*) die "unknown option $1 (see --help)" ;;
    *)
        [ -z "$out" ] || die "one folder for the results, not '$out' and '$1'"
        out=$1
        ;;
    esac
    shift
done
[ -n "$total_s" ] || total_s=$((dry ? 840 : 640))
command -v "$python" >/dev/null || die "there is no '$python': give --python"
python=$(command -v "$python")
case $python in /*) ;; *) python=$PWD/$python ;; esac

# --- packing ----------------------------------------------------------------------------------------------------------

# With what they need: none of these needs torch.
packed=(pytest pytest-timeout pytest-benchmark pydantic PyYAML soundfile soxr typer rich safetensors fsspec packaging
    typing-extensions matplotlib pillow)
# These would bring torch, which is there.
packed_alone=(lightning-fabric lightning-utilities inf_cl)

pack_wheels() {
    mkdir -p "$1" || return 1
    local tag=${for_python/./} platforms=() n
    for n in 28 27 24 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
    platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
    local options=(--quiet --only-binary=:all: --python-version "$for_python" --implementation cp --abi "cp$tag"
        --abi abi3 --abi none "${platforms[@]}" --dest "$1")
    "$python" -m pip download "${options[@]}" "${packed[@]}" || return 1
    "$python" -m pip download "${options[@]}" --no-deps "${packed_alone[@]}" || return 1
    # the machine's own NumPy is the one its torch was tried with
    rm -f "$1"/numpy-*.whl "$1"/torch-*.whl "$1"/triton-*.whl "$1"/nvidia_*.whl "$1"/setuptools-*.whl
    local mib
    mib=$(du -sm "$1" | cut -f1)
    echo "$(find "$1" -name '*.whl' | wc -l) wheels for Python $for_python in $1, $mib MiB"
    [ "$mib" -lt 60 ] || { echo "gpu_suite.sh: $mib MiB is more than 60" >&2; return 1; }
}

if [ -n "$pack" ]; then
    pack_wheels "$pack"
    exit
fi

# --- preparing --------------------------------------------------------------------------------------------------------

[ -n "$out" ] || die "give a folder for the results (see --help)"
[ -z "$wheels" ] || [ -d "$wheels" ] || die "no folder '$wheels'"
mkdir -p "$out" || die "cannot make '$out'"
out=$(cd "$out" && pwd)
[ ! -e "$out/summary.txt" ] || die "$out has results already: give another folder"
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/logs" "$work/junit" "$work/status" "$work/run" "$work/running" "$work/tmp"
began=$SECONDS
parts=()
missing=()
plots=1

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=Agg
export TMPDIR=$work/tmp # which goes with the rest, also where a part was stopped
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
unset AVSEP_KERNELS
if [ $dry = 1 ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    device=cpu sizes=tiny repeats=2
else
    unset TRITON_INTERPRET
    device=cuda sizes=all repeats=20
fi

say() { echo "[$((SECONDS - began)) s] $*"; }

left_s() {
    local left=$((total_s - (SECONDS - began)))
    [ "${1:-}" = results ] || left=$((left - reserve_s))
    echo $((left > 1 ? left : 1))
}

# part NAME BUDGET COMMAND...: run it within its budget and what is left of the whole; note how it ended
part() {
    local name=$1 budget=$2 start=$SECONDS code word left
    shift 2
    [ $dry = 0 ] || budget=$((10 * budget)) # they are a GPU's; here they would tell how busy the machine is
    left=$(left_s "$name")
    [ "$budget" -le "$left" ] || budget=$left
    if [ "$left" -le 3 ]; then
        echo "failed (no time was left)" >"$work/status/$name"
        : >"$work/logs/$name"
        return
    fi
    # timeout leads a process group of its own, and hands on to all of it what it is sent
    (cd "$work/run" && exec timeout -k 5 "$budget" "$@") >"$work/logs/$name" 2>&1 &
    echo $! >"$work/running/$name"
    wait $! # interrupted by a signal at once, where a command in front would be waited for
    code=$?
    rm -f "$work/running/$name"
    word="failed (exit code $code)"
    [ $code = 0 ] && word=ok
    [ $code = 124 ] || [ $code = 137 ] && word="failed (more than its $budget s)"
    echo "$word, $((SECONDS - start)) s" >"$work/status/$name"
}

failed_parts() {
    local name count=0
    for name in "${parts[@]}"; do
        case $(cat "$work/status/$name" 2>/dev/null) in failed*) count=$((count + 1)) ;; esac
    done
    echo $count
}

sum_up() { # [LAST LINE]: what is known so far, after every part
    local name failed
    failed=$(failed_parts)
    {
        for name in "${parts[@]}"; do
            printf '%-34s %s\n' "$name" "$(cat "$work/status/$name" 2>/dev/null || echo 'not finished')"
        done
        [ ${#missing[@]} = 0 ] || echo "not installed: ${missing[*]}"
        [ $plots = 1 ] || echo "no plot: matplotlib is not installed"
        if [ -e "$work/logs/results" ]; then
            echo
            cat "$work/logs/results"
        fi
        echo
        echo "$((SECONDS - began)) s; ${1:-so far} $([ "$failed" = 0 ] && echo 'nothing failed' || echo "$failed parts failed")"
    } >"$out/summary.part" && mv "$out/summary.part" "$out/summary.txt"
}

cut_off() {
    local name stopped
    trap '' TERM INT
    stopped=$(ls "$work/running")
    for name in $stopped; do kill "$(cat "$work/running/$name")" 2>/dev/null; done
    wait
    for name in $stopped; do
        echo "failed (stopped while it was running)" >"$work/status/$name"
        printf '\n=== %s: stopped while it was running\n' "$name" >>"$out/bench.log"
        cat "$work/logs/$name" >>"$out/bench.log"
    done
    sum_up "cut off;"
    exit 143
}
trap cut_off TERM INT

skip() { # NAME WHY
    echo "skipped ($2)" >"$work/status/$1"
    : >"$work/logs/$1"
}

# Not from the tree's own folder, where Python would find half of the package.
has() {
    (cd "$work/run" && "$run" -c "$finds" "$@") 2>/dev/null
}
finds="import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))"

# Where the parent finds packages, its standard library left out.
parents="
import os, sys, sysconfig
own = {sysconfig.get_path(k) for k in ('stdlib', 'platstdlib')}
own |= {os.path.join(p, 'lib-dynload') for p in own}
print(*[p for p in sys.path if p and os.path.isdir(p) and p not in own], sep='\n')
"

prepare_python() {
    # without pip, which needs ensurepip; the parent's packages by their folders, since --system-site-packages means
    # those of the parent's own parent where that is an environment too
    if "$python" -m venv --without-pip "$work/venv" >"$work/logs/venv" 2>&1 &&
        site=$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))") &&
        "$python" -c "$parents" >"$site/parent.pth" &&
        "$work/venv/bin/python" -c "import torch, numpy" >>"$work/logs/venv" 2>&1; then
        run=$work/venv/bin/python
        unset PYTHONPATH # its folders are among the parent's, behind what is installed here
        how="a virtual environment"
    else
        run=$python
        site=$work/site
        mkdir -p "$site"
        export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
        how="a folder on PYTHONPATH"
    fi
}

install_wheel() { # FILE...
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --root-user-action ignore --target "$site" --upgrade "$@"
}

unpack_wheel() { # FILE; what pip does for wheels without scripts, where there is no pip
    local tag
    tag=$("$run" -c "import sys; print(f'cp{sys.version_info[0]}{sys.version_info[1]}')")
    case $1 in
    *-any.whl | *-"$tag"-* | *-abi3-* | *py3-none-*) "$run" -m zipfile -e "$1" "$site" ;;
    *) echo "$1 is for another Python" && return 1 ;;
    esac
}

install_wheels() {
    [ -n "$wheels" ] || return 0
    local file bad=0
    if "$python" -m pip --version >/dev/null 2>&1; then
        install_wheel "$wheels"/*.whl && return 0
        echo "together they do not install: one by one"
        for file in "$wheels"/*.whl; do install_wheel "$file" || bad=1; done
    else
        for file in "$wheels"/*.whl; do unpack_wheel "$file" || bad=1; done
    fi
    return $bad
}

install_tree() {
    if compgen -G "${wheels:-/nowhere}/avsep-*.whl" >/dev/null && has avsep; then
        how="$how; avsep from its wheel"
        return 0
    fi
    mkdir -p "$work/tree"
    (cd "$here" && cp -r avsep kernels export benchmarks pyproject.toml README.md LICENSE "$work/tree") || return 1
    if "$python" -c "import setuptools, sys; sys.exit(int(setuptools.__version__.split('.')[0]) < 77)" 2>/dev/null &&
        "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --no-compile --no-cache-dir \
            --disable-pip-version-check --root-user-action ignore --target "$site" --upgrade "$work/tree"; then
        how="$how; avsep built from the tree"
    else
        # the layout that pyproject.toml describes
        rm -rf "$site/avsep"
        cp -r "$work/tree/avsep" "$site/avsep" &&
            for room in kernels export benchmarks; do cp -r "$work/tree/$room" "$site/avsep/$room" || return 1; done
        how="$how; avsep copied from the tree (no pip, or no setuptools of version 77 or later)"
    fi
    has avsep.kernels avsep.benchmarks
}

need() { # PACKAGE... : names those that are missing in $absent
    absent=""
    local name
    for name in "$@"; do has "$name" || absent="$absent $name"; done
    [ -z "$absent" ]
}

# Of the tree; or given by who started this, where git or its folder did not come along.
AVSEP_COMMIT=$(git -C "$here" describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || echo "${AVSEP_COMMIT:-unknown}")
export AVSEP_COMMIT

describe() {
    echo "date: $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "commit: $AVSEP_COMMIT"
    echo "environment: $how"
    [ ${#missing[@]} = 0 ] || printf 'missing: %s\n' "${missing[@]}"
    (cd "$work/run" && "$run" -) <<'PYTHON'
import importlib.metadata as metadata, os, platform, sys
import torch
print("python:", sys.version.split()[0], "on", platform.platform())
print("cores:", os.cpu_count())
for name in ("torch", "triton", "numpy", "inf_cl", "pytest", "lightning-fabric", "pydantic", "matplotlib", "onnx",
             "onnxscript", "onnxruntime", "onnxruntime-gpu", "avsep"):
    try:
        print(f"{name}: {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        print(f"{name}: no record of it")
print("torch's CUDA:", torch.version.cuda)
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(f"GPU: {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.0f} GiB")
else:
    print("GPU: none")
PYTHON
    echo "compiler: $({ cc --version || gcc --version; } 2>/dev/null | head -1)"
    nvidia-smi 2>/dev/null || echo "nvidia-smi: not there"
}

say "preparing in $work"
prepare_python
parts=(wheels install)
if [ -z "$wheels" ]; then
    skip wheels "no --wheels"
elif install_wheels >"$work/logs/wheels" 2>&1; then
    echo ok >"$work/status/wheels"
else
    echo "failed" >"$work/status/wheels"
fi
if install_tree >"$work/logs/install" 2>&1; then
    echo "ok: $how" >"$work/status/install"
else
    echo "failed: $how" >"$work/status/install"
fi
for name in pytest pydantic yaml lightning_fabric safetensors soundfile soxr typer rich matplotlib PIL inf_cl onnx onnxscript \
    onnxruntime; do
    has "$name" || missing+=("$name")
done
has matplotlib || plots=0
[ ${#missing[@]} = 0 ] || say "not installed: ${missing[*]}"
describe >"$out/environment.txt" 2>&1
if [ $dry = 0 ] && ! "$run" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    cat "$out/environment.txt"
    die "PyTorch sees no GPU here (try --dry-run)"
fi

# --- what is measured first: one part at a time -----------------------------------------------------------------------

: >"$out/bench.log"
app=(pydantic yaml lightning_fabric safetensors soundfile soxr typer rich) # what `avsep` needs beside torch and NumPy

show() { # NAME : its end on the screen, all of it into bench.log
    printf '\n=== %s: %s\n' "$1" "$(cat "$work/status/$1")" >>"$out/bench.log"
    cat "$work/logs/$1" >>"$out/bench.log"
    say "$1: $(cat "$work/status/$1")"
}

measure() { # NAME BUDGET COMMAND... : a part whose rows are kept
    parts+=("$1")
    sum_up
    part "$@"
    show "$1"
    sum_up
}

leave_out() { # NAME WHY
    parts+=("$1")
    skip "$1" "$2"
    show "$1"
}

kernels() { # NAME BUDGET OPERATION SIZES [MORE...]
    local name=$1 budget=$2 op=$3 chosen=$4
    shift 4
    [ $dry = 0 ] || chosen=tiny
    measure "$name" "$budget" "$run" -m avsep.benchmarks.kernels --op "$op" --sizes "$chosen" --device "$device" \
        --repeats "$repeats" --out "$out/kernels.csv" "$@"
}

# With the command's own packages, or not at all; `also PACKAGE...` are further ones.
also=()
avsep() { # NAME BUDGET ARGUMENTS...
    local name=$1 budget=$2
    shift 2
    if need "${app[@]}" ${also[@]+"${also[@]}"}; then
        measure "$name" "$budget" "$run" -m avsep "$@"
    else
        leave_out "$name" "not installed:$absent"
    fi
    also=()
}

kernels bench-similarity_distillation 90 similarity_distillation paper
kernels bench-stft_masking 55 stft_masking all
kernels bench-mask_head 45 mask_head all

if [ $dry = 1 ]; then # separators that train in seconds
    small="audio_encoder: {name: unet7, params: {base_channels: 4, mask_channels: 4}}, front_end: {sample_rate_hz: 11025,
      clip_samples: 8191, n_fft: 254, hop: 64, log_rows: 128}, mask_decoder: {name: query_transformer, params: {dim: 16,
      heads: 2, feedforward: 16, layers: 2}}"
    echo "{separator: {$small, object_encoder: {name: precomputed, params: {features: o, dim: 8}}, motion_encoder: {name:
      precomputed, params: {features: m, dim: 8}}}}" >"$work/published.yaml"
    echo "{separator: {$small, object_encoder: {name: frame_cnn, params: {dim: 16}}, motion_encoder: {name: motion_cnn,
      params: {dim: 16}}}, train: {batch_size: 2, epochs: 1, steps_per_epoch: 2}}" >"$work/small.yaml"
    step=(bench train --preset "$work/published.yaml" --batch 2 --classes 4 --repeats 1) mixed=()
    tasks=(--preset "$work/small.yaml" --seeds 1 --clips 3 1 2)
    forms=(--preset "$work/small.yaml" --no-compile --repeats 1)
else # published sizes: 32 mixtures; the demo's runs with two of its three epochs
    step=(bench train --device cuda --batch 32 --repeats 7) mixed=(--form bf16)
    tasks=(--device cuda --set train.epochs=2)
    forms=(--device cuda --batch 4)
fi
avsep bench-train 80 "${step[@]}" ${mixed[@]+"${mixed[@]}"} --out "$out/train.csv"
also=(PIL)
avsep bench-continual 120 bench continual "${tasks[@]}" --jobs 2 --out "$out/continual.csv"

# --- correctness: parts side by side ----------------------------------------------------------------------------------

# The library's own pytest settings ask for plugins that may be missing here.
cat >"$work/pytest.ini" <<'INI'
[pytest]
pythonpath = tests
markers =
    gpu: needs an NVIDIA GPU
    slow: takes minutes
    tensorrt: needs a TensorRT builder
    timeout: of a test, where pytest-timeout is installed
INI
mkdir -p "$work/tests"
cp -r "$here"/tests/. "$work/tests"

tests() { # NAME BUDGET MARKERS FILE...
    local name=$1 budget=$2 markers=$3
    shift 3
    part "$name" "$budget" "$run" -m pytest -c "$work/pytest.ini" --rootdir "$work" -p no:cacheprovider -q -ra \
        -m "$markers" --junitxml "$work/junit/$name.xml" "$@"
    # pytest's codes: 5, no test was chosen; 2, a file could not be imported
    if grep -q "(exit code 5)" "$work/status/$name"; then
        echo "skipped (there is no such test)" >"$work/status/$name"
    elif grep -q "(exit code 2)" "$work/status/$name"; then
        local package
        for package in ${missing[@]+"${missing[@]}"}; do
            if grep -q "No module named '$package'" "$work/logs/$name"; then
                echo "skipped (not installed: $package)" >"$work/status/$name"
                rm -f "$work/junit/$name.xml"
            fi
        done
    fi
}

say "checks and tests"
tested=(checks)
part checks 140 "$run" -m avsep.benchmarks.kernels --check-only --no-compile --sizes "$sizes" \
    --device "$device" &
if need pytest; then
    for file in "$work"/tests/kernels/test_triton_*.py "$work"/tests/kernels/test_kernels_*.py; do
        name=$(basename "$file" .py)
        case $name in
        test_kernels_aot) continue ;; # needs no GPU
        test_triton_*) [ $dry = 0 ] || continue ;;
        esac
        [ -e "$file" ] || continue
        tested+=("$name")
        OMP_NUM_THREADS=2 tests "$name" 140 "not slow and not tensorrt" "$file" &
    done
    tested+=(tests-gpu)
    if need pydantic yaml lightning_fabric safetensors soundfile soxr; then
        mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu|pytest\.mark\.gpu' "$work"/tests)
        if [ $dry = 1 ]; then
            skip tests-gpu "dry run"
        elif [ ${#files[@]} = 0 ]; then
            skip tests-gpu "there is no such test"
        else
            tests tests-gpu 140 gpu "${files[@]}" &
        fi
    else
        skip tests-gpu "not installed:$absent"
    fi
else
    tested+=(tests)
    skip tests "not installed:$absent"
fi
parts+=("${tested[@]}")
sum_up
wait
for name in wheels install "${tested[@]}"; do
    say "$name: $(cat "$work/status/$name")" >&2
    printf '\n=== %s: %s\n' "$name" "$(cat "$work/status/$name")"
    cat "$work/logs/$name" 2>/dev/null
done >"$out/tests.log"
"$run" - "$work/junit" "$out/tests.xml" <<'PYTHON'
import pathlib, sys
import xml.etree.ElementTree as tree
whole = tree.Element("testsuites")
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.xml")):
    try:
        root = tree.parse(path).getroot()
    except tree.ParseError:  # of a part that was stopped
        continue
    for suite in [root] if root.tag == "testsuite" else list(root):
        suite.set("name", path.stem)
        whole.append(suite)
tree.ElementTree(whole).write(sys.argv[2], encoding="utf-8", xml_declaration=True)
PYTHON

# --- what is measured last --------------------------------------------------------------------------------------------

sum_up
avsep bench-forms 75 bench export "${forms[@]}" --no-memory --out "$out/forms.csv"
if [ $dry = 1 ]; then # which would compile for minutes, and take 824 GB of scores
    leave_out bench-compiled "dry run"
    leave_out bench-large "dry run"
    avsep bench-separate 60 bench separate --preset aligned_small --minutes 0.12 --repeats 1 --out "$out/separate.csv"
    leave_out bench-huge "dry run"
else
    avsep bench-compiled 90 "${step[@]}" --form compiled --out "$out/train.csv"
    kernels bench-large 80 similarity_distillation large
    avsep bench-separate 40 bench separate --device cuda --repeats 3 --out "$out/separate.csv"
    repeats=3 # of 262,144 rows, whose scores would take 824 GB
    kernels bench-huge 60 similarity_distillation huge --no-compile
fi

parts+=(results)
if [ -e "$out/kernels.csv" ]; then
    plot=()
    [ $plots = 0 ] || plot=(--plot "$out/kernels.png")
    part results 15 "$run" -m avsep.benchmarks.kernels --from-csv "$out/kernels.csv" ${plot[@]+"${plot[@]}"}
else
    skip results "nothing was measured"
fi
sum_up "done;"
cat "$out/summary.txt"
[ "$(failed_parts)" = 0 ]
