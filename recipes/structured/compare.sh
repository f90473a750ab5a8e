#!/usr/bin/env bash
# Every run of the comparison in README.md, one after the other. Finished ones are skipped, so it can be stopped and
# started again; runs/structured/NETWORK-seedN/ holds a folder for each. The tables: python recipes/structured/table.py
#
#   recipes/structured/compare.sh resnet20 0 --data.root FOLDER       a network, a seed, options for every run
#   LIGHTNING_PRUNE="echo lightning-prune" recipes/structured/compare.sh vgg16 1       only say what would be run
set -euo pipefail
network=${1:?resnet20 or vgg16} seed=${2:?a seed}
shift 2
common=(--seed_everything "$seed" --trainer.accelerator cpu --trainer.enable_progress_bar false
  --trainer.enable_model_summary false "$@")
command=${LIGHTNING_PRUNE:-lightning-prune}
home=structured/$network-seed$seed
at=--model.init_args.network
case $network in # widths at which the narrowed network costs what is left: as near to the budget as whole channels allow
  resnet20) class=lightning_prune.experiments.ResNet20 width=0.5 narrowed=([50]=0.3425 [25]=0.24)
    longer=([50]=411 [25]=456) ;;
  vgg16) class=lightning_prune.experiments.VGG16BN width=0.25 narrowed=([50]=0.17625 [25]=0.1225)
    longer=([50]=375 [25]=452) ;;
  *) echo "no network $network: expected resnet20 or vgg16" >&2 && exit 1 ;;
esac

fit() { # ARM RECIPE OPTIONS...: one run, unless it has been tested already
  local arm=$1 recipe=$2
  shift 2
  if grep -qs test_acc "runs/$home/$arm/metrics.csv"; then return; fi
  [[ $command == echo* ]] || rm -rf "runs/${home:?}/$arm" # what an interrupted run has left
  $command fit --config "recipes/structured/$recipe.yaml" --trainer.logger.init_args.name "$home" \
    --trainer.logger.init_args.version "$arm" "$@" "${common[@]}"
}

new() { echo "$at.class_path=$class" "$at.init_args.width=$1"; }
part() { echo "$at.class_path=lightning_prune.experiments.$1" "$at.init_args.network.class_path=$class" \
  "$at.init_args.network.init_args.width=$width"; }
after() { echo "$(part trained)" "$at.init_args.weights=runs/$home/$1/checkpoints/last.ckpt"; }
steps() { echo --trainer.limit_train_batches "$1" --trainer.max_epochs "${2:-1}"; }

cut() { # ARM RECIPE FROM PERCENT OPTIONS...
  local arm=$1 recipe=$2 from=$3 percent=$4
  shift 4
  fit "$arm-$percent" "$recipe" $(after "$from") \
    --trainer.callbacks.init_args.budget.init_args.macs "0.$percent" "$@"
}

fit dense train $(new "$width")
fit sparsity sparsity $(new "$width")
fit untouched train $(after dense) $(steps 150)
for percent in 50 25; do
  cut slimming slimming sparsity $percent
  cut hrank hrank dense $percent
  cut l1 criterion dense $percent --trainer.callbacks.init_args.criterion l1
  cut random criterion dense $percent --trainer.callbacks.init_args.criterion random \
    --trainer.callbacks.init_args.seed "$seed"
done
for percent in 50 25; do # controls: as many steps as the others have had, 300 + 150
  compact=$at.init_args.compact=runs/$home/slimming-$percent/compact.safetensors
  fit scratch-$percent train $(part shaped_like) "$compact" $(steps 450)
  fit narrowed-$percent train $(new "${narrowed[$percent]}") $(steps 450)
done
# controls of equal cost: what 300 steps of the dense network and 150 of the compact one cost, in multiply-adds
fit scratch-50-cost train $(part shaped_like) "$at.init_args.compact=runs/$home/slimming-50/compact.safetensors" \
  $(steps 375 2)
fit scratch-25-cost train $(part shaped_like) "$at.init_args.compact=runs/$home/slimming-25/compact.safetensors" \
  $(steps 450 3)
fit narrowed-50-cost train $(new "${narrowed[50]}") $(steps "${longer[50]}" 2)
fit narrowed-25-cost train $(new "${narrowed[25]}") $(steps "${longer[25]}" 3)
