#!/bin/sh
# All GPUs of this machine, or as many CPU processes as are given, train one network: sh examples/torchrun.sh 4 runs/gairat
# A process that dies is restarted with the others, which go on from the last save by themselves. Ctrl-C and SIGTERM
# save; the same command then goes on.
set -eu
processes=${1:-gpu}
out=${2:-runs/gairat-together}

if [ -e "$out/run.json" ]; then
    set -- --resume --out "$out"
else
    set -- gairat --data cifar10 --model resnet18 --epochs 30 --out "$out"
fi
exec torchrun --standalone --nproc-per-node "$processes" --max-restarts 3 -m instar train "$@"
