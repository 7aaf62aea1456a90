"""Write a data set as FFCV files: python write_datasets.py --config-file rn_configs/se94.yaml [--section.key value ...]

Reads what lies at sources.path, checks it, and writes beton.train and beton.test with a sidecar each. What is up to date
is skipped; --force writes it again. Exit status: 0 done, 2 something to mend in config, data or disk, 4 no data set
there, or one of other classes than the recipe's, and none downloaded, 130 interrupted.
"""
import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from seresnet import runtime

if __name__ == "__main__":
    runtime.check_packages()

from seresnet import beton, config, report, sources    # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--force", action="store_true", help="write again what is up to date")
    parser.add_argument("--default-source", metavar="PATH", help="what to read where neither recipe nor command line names sources.path or "
                        "sources.kind [data]")
    settings, own = config.parse(sys.argv[1:], parser)
    named = config.names_a_source(settings, sys.argv[1:])
    if own.default_source and not named and settings.sources.kind != "download":
        settings = replace(settings, sources=replace(settings.sources, path=own.default_source))
    targets = {"train": Path(settings.beton.train), "test": Path(settings.beton.test)}
    source = sources.find_source(**vars(settings.sources), watch=report.watched("reading", " images"))
    for path in targets.values():
        if path.exists():
            report.check_writable(path, source.path, kinds=(".beton",))
    print(f"source: {source.describe()}", flush=True)
    if left_out := source.left_out():
        print(left_out, flush=True)
    storage = {"storage": settings.beton.storage}
    if settings.beton.storage == "jpeg":
        storage["jpeg_quality"] = settings.beton.jpeg_quality
    fingerprint = f"{source.fingerprint()}/{'-'.join(map(str, storage.values()))}"
    outdated = [name for name, path in targets.items() if own.force or not beton.is_current(path, f"{fingerprint}/{name}")]
    for name, path in targets.items():
        if name not in outdated:
            print(f"{name}: {path} is up to date", flush=True)
    if not outdated:
        return
    images = source.read()
    wanted, before = settings.model.classes, {} if own.force else {path: found for path in targets.values() if (found := beton.at(path))}
    lost = [path for path, found in before.items() if wanted not in (0, len(images.classes)) and len(found.classes) == wanted]
    if lost:
        raise sources.MissingError(
            f"{images.source}: has {len(images.classes)} classes ({report.some(images.classes, 10)}) and would take the place of {lost[0]}, which has "
            f"the {wanted} of model.classes: name another place with --sources.path, other files with --beton.train and --beton.test, or "
            "give --force")
    cifar10 = Path(config.Beton.train), Path(config.Beton.test)    # may be written of it in another layout
    others = [f"{path}, which holds {found.name}" for path, found in before.items()
              if found.name != images.name and (found.classes != images.classes or path not in cifar10)]
    if others and not named:
        raise runtime.UserError(f"{images.source}: is read because no place is named, and would take the place of {others[0]}: name the images with "
                                "--sources.path, other files with --beton.train and --beton.test, or give --force")
    print(f"classes: {report.some(images.classes, 10)}", flush=True)
    for name in outdated:
        started, split = time.perf_counter(), getattr(images, name)
        with report.CountBar(len(split.labels), name, " images") as bar:
            written = beton.write_beton(targets[name], split, classes=images.classes, name=images.name,
                                        source=images.source, fingerprint=f"{fingerprint}/{name}", how=source.how(), progress=bar,
                                        **storage)
        print(f"{name}: {written.path}: {written.samples:,} images of {written.width} x {written.height}, "
              f"{len(written.classes)} classes, mean {_pixels(written.mean)}, std {_pixels(written.std)}, written and "
              f"read back in {time.perf_counter() - started:.1f} s", flush=True)


def _pixels(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    runtime.run_program(main)
