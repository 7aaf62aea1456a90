# make train   convert once, train, report: make train CIFAR10_DIR=... CONFIG=rn_configs/....yaml ARGS="--loop.epochs 2"
# make test    the tests; those on real images need CIFAR10_DIR
# make setup   system packages, .venv, pinned dependencies; each target does it by itself, and again for nothing
#
# PYTHON=python3.12 chooses the interpreter, PIP_ARGS="..." goes to pip (README, "Without a GPU"),
# FFCV=no does without FFCV, a compiler and system packages. Given once, they hold until others are given.

CONFIG ?= rn_configs/se94.yaml
export CIFAR10_DIR PYTHON PIP_ARGS FFCV

.PHONY: train test setup

train: setup
	@sh scripts/train.sh $(CONFIG) $(ARGS)

test: setup
	@.venv/bin/python -m pytest $(ARGS)

setup:
	@sh scripts/setup.sh
