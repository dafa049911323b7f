#!/bin/sh
# Trains and evaluates the six runs of this page; about five hours on two CPU cores. Usage: sh reproduce.sh [FOLDER]
set -eu
out=${1:-runs/cifar10-resnet18-w16}
instar data get cifar10
for recipe in gairat pgd_at trades spat p_sat iseat; do
  if [ -d "$out/$recipe" ]; then
    instar train --resume --out "$out/$recipe"
  else
    instar train "$recipe" --data cifar10 --model resnet18 --width 16 --epochs 5 --seed 0 --precision bf16 --out "$out/$recipe"
  fi
  instar evaluate "$out/$recipe" --suite standard --n 200
done
instar report "$out/gairat" "$out/pgd_at" "$out/trades" "$out/spat" "$out/p_sat" "$out/iseat" --out "$out/pictures"
