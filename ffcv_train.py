"""Train an SE-ResNet from FFCV files: python ffcv_train.py --config-file rn_configs/se94.yaml [--section.key value ...]

Writes a run folder (resolved config, environment, log.jsonl, report.json, curves.png, weights and checkpoints) and prints
one line an epoch. Exit status: 0 done, 2 something to mend in config, data or machine, 3 training diverged, 5 the GPU or its driver
failed, 129, 130 or 143 stopped by SIGHUP, SIGINT or SIGTERM: after these --run.resume FOLDER goes on.
"""
import argparse
import sys

from seresnet import runtime

if __name__ == "__main__":
    runtime.check_packages()

from seresnet import config    # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    settings, _ = config.parse(sys.argv[1:], parser)
    if settings.run.tune_allocator:
        runtime.tune_allocator(settings.run.device)
    from seresnet.loop import fit    # loads torch, which has to come after the allocator's restart
    fit(settings, sys.argv)


if __name__ == "__main__":
    runtime.run_program(main)
