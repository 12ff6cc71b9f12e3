#!/bin/sh
# The malformed nodes, random shapes and a grid of sizes in ONNX Runtime on a library built with AddressSanitizer and
# UndefinedBehaviorSanitizer. ONNX Runtime itself is not instrumented, so leaks are not looked for.
#
#   tests/csrc/ort_asan.sh [python]          about two minutes; builds in $TMPDIR/hcmen-asan
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${1:-python}
build=${TMPDIR:-/tmp}/hcmen-asan
cxx=${CXX:-c++}

cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER="$cxx" \
  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" >/dev/null
cmake --build "$build" --target hcmen_ops >/dev/null
library=$(find "$build" -name libhcmen_ops.so)

# What is loaded into an uninstrumented program must be there from its start.
LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so) $("$cxx" -print-file-name=libstdc++.so.6)"
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1
UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS
levels="avx512 avx2 baseline"
if [ "$(uname -m)" = aarch64 ]; then levels=neon; fi
for isa in $levels; do
  echo "kernels: $isa"
  HCMEN_ISA=$isa "$python" "$root/tests/csrc/ort_cases.py" malformed --library "$library" >"$build/malformed.jsonl"
  if grep '"stage": "none"' "$build/malformed.jsonl"; then
    echo "these malformed nodes ran" >&2
    exit 1
  fi
  echo "malformed: $(wc -l <"$build/malformed.jsonl") nodes, an error from each"
  HCMEN_ISA=$isa "$python" "$root/tests/csrc/ort_cases.py" grid --library "$library"
  for seed in 0 1; do
    HCMEN_ISA=$isa "$python" "$root/tests/csrc/ort_cases.py" fuzz --library "$library" --seed $seed --count 300
  done
done
