#!/bin/sh
# The main job on the embedded default: scikit-learn's digits, real handwritten digits that need no download.
# Adversarially trains a network with GAIRAT, is interrupted half-way and resumed, and is evaluated with PGD, a margin
# attack and AutoAttack. `make run` calls it; any argument is the folder of the run.
set -eu
out=${1:-runs/digits-gairat}
rm -rf "$out"

echo "1. train, and interrupt the training after a few epochs, as Ctrl-C would"
instar train gairat --data digits --model small_cnn --width 16 --epochs 20 --seed 0 --out "$out" &
training=$!
epochs() { if [ -f "$out/log.jsonl" ]; then wc -l < "$out/log.jsonl"; else echo 0; fi; }
while kill -0 "$training" 2>/dev/null && [ "$(epochs)" -lt 6 ]; do sleep 0.2; done
kill -INT "$training" 2>/dev/null || true
wait "$training" || true

echo "2. resume: it goes on exactly where it stopped"
instar train --resume --out "$out"

echo "3. evaluate the best and the last checkpoint"
instar evaluate "$out" --suite standard --n 100

echo "4. draw what happened"
instar report "$out"

cat <<DONE

Done. What lies in $out:
  checkpoints/best.safetensors   the robust model; load it with instar.load("$out")
  evaluations/*.json             its accuracy under each attack, with everything the numbers depend on
  report.html                    one page with all of it: verdict, curves, attacks, images, every training instance
  pictures/*.png                 learning curves, the attack steps that training images survive, the hardest images
  instances/*.npz                what happened to every training image, epoch by epoch
  run.json, log.jsonl            the whole configuration and the course of training

The same on CIFAR-10 (two cores: some minutes an epoch):
  instar data get cifar10
  instar train gairat --data cifar10 --model resnet18 --width 16 --epochs 8
DONE
