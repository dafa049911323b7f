#!/bin/sh
# Trains and evaluates the two runs of this page; about 40 minutes on one CPU core. Usage: sh reproduce.sh [FOLDER]
# Imagenette lies in the environment's INSTAR_DATA; the runs of the page used photographs stored at 128 pixels.
set -eu
out=${1:-runs/p_sat-at-16-255}
for recipe in pgd_at p_sat; do
  if [ -d "$out/$recipe" ]; then
    instar train --resume --out "$out/$recipe"
  else
    instar train "$recipe" --data imagenette --size 64 --model resnet18 --stem imagenet --width 32 \
      --eps 16/255 --step-size 4/255 --steps 10 --epochs 8 --seed 0 --precision bf16 --out "$out/$recipe"
  fi
  instar evaluate "$out/$recipe" --suite development --n 300 --checkpoint last
done
