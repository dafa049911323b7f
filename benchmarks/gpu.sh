#!/usr/bin/env bash
# The speed results on one GPU, in stages of less than nine minutes each, for machines that are lent for minutes,
# reach no network and take in only little at a time. Every stage can be called again, and goes on where it was.
#
#   benchmarks/gpu.sh pack            before: cut the data set (and wheels, if WHEELS=1) into parts of PART_MB
#   benchmarks/gpu.sh data            there, once for each portion of parts that was carried in: collect and unpack
#   benchmarks/gpu.sh setup           there: install the wheels if anything is missing, and say what the machine is
#   benchmarks/gpu.sh bench           there: the table of `instar bench`, and where a step's time goes
#   benchmarks/gpu.sh accelerate      there: the attack captured as CUDA graphs and compiled, beside itself without
#   benchmarks/gpu.sh main            there, until it says "finished": ResNet-18, 100 epochs of PGD-10 AT on CIFAR-10
#   benchmarks/gpu.sh methods         there, until it says "finished": PGD-AT, GAIRAT, SPAT, P-SAT and ISEAT
#   benchmarks/gpu.sh evaluate        there, until it says "finished": AutoAttack on N test images for each run
#   benchmarks/gpu.sh results [FROM]  there: what is worth keeping, in files of at most 15 MB, eight a call
#
# Exit status: 0 finished, 3 not finished (call the stage again), anything else a failure.
# ACCELERATE (none) is how training attacks: graphs, compile or both, if the table says that it is worth while.
# STORE is kept between calls there; OUT is what comes back. TINY=1 does everything with the embedded digits in seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

STAGE=${1:-help}
TINY=${TINY:-0}
STORE=${STORE:-$HOME/instar-gpu}
CARRIED=${CARRIED:-runs/gpu/carried} # where parts lie, here and there
OUT=${OUT:-runs/gpu/out}
PYTHON=${PYTHON:-python}
PART_MB=${PART_MB:-12}
FILES=8
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}

if [ "$TINY" = 1 ]; then
  LIMIT=${LIMIT:-60} DATA=digits N=${N:-10} WIDTH=4 EPOCHS=${EPOCHS:-2} SHORT_EPOCHS=1 BATCH=256 MODEL=small_cnn
  METHODS=${METHODS:-pgd_at p_sat} DEVICE=cpu BENCH="pgd_at --batch-size 8 --turns 1 --steps 1 --no-memory"
  FASTER="pgd_at --batch-size 8 --turns 1 --steps 1 --no-memory" WAYS=${WAYS:-compile}
else
  LIMIT=${LIMIT:-500} DATA=cifar10 N=${N:-1000} WIDTH=64 EPOCHS=${EPOCHS:-100} SHORT_EPOCHS=${SHORT_EPOCHS:-16} BATCH=${BATCH:-128}
  MODEL=resnet18 METHODS=${METHODS:-pgd_at gairat spat p_sat iseat} DEVICE=${DEVICE:-auto}
  BENCH="--baseline --turns 5 --steps 10 --batch-size $BATCH"
  FASTER="pgd_at gairat trades --turns 5 --steps 10 --batch-size $BATCH" WAYS=${WAYS:-graphs both}
fi
ACCELERATE=${ACCELERATE:-none}
SOURCE=${INSTAR_DATA:-$HOME/.cache/instar/data} # where the data set lies that is packed
export INSTAR_DATA=$STORE/data
RUNS=$STORE/runs
BEGUN=$SECONDS

left() { echo $((LIMIT - SECONDS + BEGUN)); }
instar() { "$PYTHON" -m instar "$@"; }
unfinished() {
  echo "not finished: call the stage again"
  exit 3
}

# Train into a folder until it is done or the time is up; the run saves itself when it is told to stop.
train() { # name, epochs, recipe
  local out=$RUNS/$1 status=0 where=(--out "$RUNS/$1") limit
  if [ -e "$out/finished" ]; then return; fi
  limit=$(left)
  if [ "$limit" -lt 20 ]; then unfinished; fi
  if [ -e "$out/run.json" ]; then
    where+=(--resume)
  else
    where=("$3" "${where[@]}" --data "$DATA" --model "$MODEL" --width "$WIDTH" --epochs "$2" --batch-size "$BATCH"
      --device "$DEVICE" --accelerate "$ACCELERATE" --save-every 60)
  fi
  timeout --signal=TERM --kill-after=30 "$limit" "$PYTHON" -m instar train "${where[@]}" || status=$?
  case $status in
    0) touch "$out/finished" ;;
    124 | 137 | 143) unfinished ;; # out of time, or saved because it was told to stop
    *) exit "$status" ;;
  esac
}

# Judge a run until it is done or the time is up; the same command goes on at the last batch.
judge() { # name
  local status=0 limit
  if [ -e "$RUNS/$1/judged" ] || [ ! -e "$RUNS/$1/finished" ]; then return; fi
  limit=$(left)
  if [ "$limit" -lt 20 ]; then unfinished; fi
  timeout --signal=INT --kill-after=30 "$limit" "$PYTHON" -m instar evaluate "$RUNS/$1" --suite standard \
    --checkpoint best --n "$N" --device "$DEVICE" || status=$?
  case $status in
    0) touch "$RUNS/$1/judged" ;;
    124 | 130 | 137) unfinished ;;
    *) exit "$status" ;;
  esac
}

case $STAGE in
  pack)
    rm -rf "$CARRIED" && mkdir -p "$CARRIED"
    if [ "$TINY" = 1 ]; then
      mkdir -p "$STORE/packed/digits" && echo "embedded in the package" >"$STORE/packed/digits/README"
      from=$STORE/packed
    else
      from=$SOURCE
    fi
    what=("$DATA")
    if [ "${WHEELS:-0}" = 1 ]; then
      mkdir -p "$from/wheels"
      "$PYTHON" -m pip download -q -d "$from/wheels" --no-deps safetensors timm pyautoattack jsonargparse pyyaml rich \
        jinja2 markupsafe matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six packaging \
        pillow scikit-learn joblib threadpoolctl scipy typeshed-client importlib-resources docstring-parser \
        markdown-it-py mdurl pygments huggingface-hub
      what+=(wheels)
    fi
    tar -C "$from" -czf "$CARRIED/all.tar.gz" "${what[@]}"
    (cd "$CARRIED" && sha256sum all.tar.gz >sum && split -b "${PART_MB}m" -d -a 3 all.tar.gz part- && rm all.tar.gz)
    count=$(find "$CARRIED" -name 'part-*' | wc -l)
    echo "$count" >"$CARRIED/count"
    echo "$count parts in $CARRIED: carry them with sum and count, as many at a time as the way allows"
    ;;
  data)
    mkdir -p "$STORE/parts" "$INSTAR_DATA"
    cp "$CARRIED"/* "$STORE/parts/"
    have=$(find "$STORE/parts" -name 'part-*' | wc -l)
    wanted=$(cat "$STORE/parts/count")
    echo "$have of $wanted parts are here"
    if [ "$have" -lt "$wanted" ]; then unfinished; fi
    cat "$STORE"/parts/part-* >"$STORE/all.tar.gz"
    (cd "$STORE" && sha256sum -c --quiet parts/sum)
    tar -C "$INSTAR_DATA" -xzf "$STORE/all.tar.gz"
    rm -r "$STORE/parts" "$STORE/all.tar.gz"
    echo "finished: $INSTAR_DATA"
    ;;
  setup)
    if ! "$PYTHON" -c "import instar.cli.train, instar.cli.evaluate" 2>/dev/null; then
      "$PYTHON" -m pip install -q --no-index --no-deps "$INSTAR_DATA"/wheels/*.whl
    fi
    "$PYTHON" -c "import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())"
    instar doctor --device "$DEVICE"
    ;;
  bench)
    mkdir -p "$STORE/bench" # shellcheck disable=SC2086  # the flags are words
    instar bench $BENCH --data "$DATA" --model "$MODEL" --width "$WIDTH" --device "$DEVICE" --out "$STORE/bench"
    "$PYTHON" benchmarks/profile_step.py --data "$DATA" --model "$MODEL" --width "$WIDTH" --batch-size "$BATCH" \
      --device "$DEVICE" --out "$STORE/bench"
    ;;
  accelerate)
    for way in $WAYS; do # one that this machine lacks something for is no reason to stop
      mkdir -p "$STORE/bench/$way" # shellcheck disable=SC2086  # the flags are words
      instar bench $FASTER --accelerate "$way" --without graphs --without compile --data "$DATA" --model "$MODEL" \
        --width "$WIDTH" --device "$DEVICE" --out "$STORE/bench/$way" || echo "not measured: $way"
    done
    ;;
  main)
    train main "$EPOCHS" pgd_at
    echo "finished: $(tail -n 1 "$RUNS/main/log.jsonl")"
    ;;
  methods)
    for recipe in $METHODS; do train "$recipe" "$SHORT_EPOCHS" "$recipe"; done
    echo "finished"
    ;;
  evaluate)
    for name in main $METHODS; do judge "$name"; done
    echo "finished"
    ;;
  results)
    rm -rf "$STORE/results" && mkdir -p "$STORE/results" "$OUT"
    (cd "$STORE" && find bench runs -type f \( -name '*.json' -o -name '*.jsonl' -o -name '*.md' -o -name '*.png' \
      -o -name 'best.safetensors' -o -path '*/evaluations/*' \) 2>/dev/null | LC_ALL=C sort >results/list)
    (cd "$STORE" && tar -czf - -T results/list | split -b 15m -d -a 3 - results/results.tar.gz-)
    files=("$STORE"/results/results.tar.gz-*)
    from=${2:-0}
    cp "${files[@]:$from:$FILES}" "$OUT/"
    echo "files $from to $((from + FILES < ${#files[@]} ? from + FILES : ${#files[@]})) of ${#files[@]} in $OUT;" \
      "cat results.tar.gz-* | tar xz"
    if [ $((from + FILES)) -lt ${#files[@]} ]; then
      echo "not finished: benchmarks/gpu.sh results $((from + FILES))"
      exit 3
    fi
    ;;
  *)
    sed -n '2,19s/^# \{0,1\}//p' "$0"
    [ "$STAGE" = help ] || exit 2
    ;;
esac
