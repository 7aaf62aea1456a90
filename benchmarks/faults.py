"""Faults injected, faults survived: python -m benchmarks.faults [--quick] [--out DIR]

Runs the tests below, those of minutes too (not with --quick), and counts: a test that breaks something many times says how
often (the fixture `faults`), any other counts for one a case. Prints a table, a row a hazard with the tests that show it.
"""
from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path

from benchmarks import keep, out_folder
from seresnet import runtime

ROOT = Path(__file__).parents[1]
# Hazard -> the tests that show it: a file without test_ and .py, and parts of the names of its tests.
HAZARDS = {
    "beton cut off anywhere": {"beton": "cut_anywhere"},
    "beton with flipped bits": {"beton": "bit_flipped", "loop": "every_byte_is_checked"},
    "foreign, hanging, unreadable betons and sidecars": {"beton": "foreign no_file unreadable sidecar under_the"},
    "conversion killed (kill -9)": {"beton": "converter_killed"},
    "conversion: disk full, limited, read-only, failing": {"beton": "failure_while small_disk limit_on read_only do_not_read too_little "
                                                                    "unwritable bad_sample"},
    "two converters on one target": {"beton": "two_converters race"},
    "loader: exceptions, dead and stuck threads": {"loader": "failing_pipeline dies_in_silence stuck ffcvs_errors"},
    "loader: early breaks, leaks, recycled buffers": {"loader": "leaving_early flat keeps_no_file asked_for threads_are_untouched "
                                                                "several_passes"},
    "loader: odd sizes, too many workers": {"loader": "every_sample_once empty_pass above_the_cores subset both_modes"},
    "file swapped, cut or gone under a training": {"loader": "changed_under", "loop": "changed_under vanishes"},
    "checkpointing killed (kill -9)": {"checkpoint": "killed living", "loop": "clears"},
    "checkpoint: disk full, limited, read-only, no right, no folder": {"checkpoint": "failure_while limit_on small_disk right missing umask",
                                                                       "loop": "fills_up"},
    "damaged, foreign checkpoints": {"checkpoint": "damaged other_formats plain_values", "loop": "damaged_checkpoint",
                                     "trained": "no_net claims"},
    "training killed or stopped, then resumed": {"faults": "broken_off", "loop": "stopped_goes_on", "end_to_end": "stopped_run second_signal"},
    "resumption of something else": {"loop": "changed_config cannot_be_resumed auto_goes_on"},
    "NaN and infinity": {"loop": "divergence absurd not_finite scale", "beton": "never_varies"},
    "not the same twice": {"loop": "one_seed both_loader_modes", "loader": "share_no_order", "runtime": "seeds"},
    "memory that does not suffice": {"loop": "suffice other_error beyond_the_memory", "sources": "claims_too_much"},
    "pickles that run code": {"sources": "payload objects", "trained": "payload", "checkpoint": "payload"},
    "archives and images that mean harm": {"sources": "outside oversized cut_off bad_tree bad_arrays bad_parquet"},
    "class names that are paths": {"beton": "names_that", "sources": "class_name"},
    "configurations, wrong and hostile": {"config": "refused no_configuration any_ right_values traceback contradictions",
                                          "end_to_end": "mistakes", "write_datasets": "mistakes"},
    "two trainings in one folder": {"report": "share_a_folder has_to_be_empty", "loop": "not_shared"},
}


def wanted(hazard: dict[str, str], file: str, name: str) -> bool:
    """Whether the test `name` in tests/test_<file>.py shows the hazard."""
    return any(part in name for part in hazard.get(file, "").split())


def run(quick: bool, files: list[str]) -> list[tuple[str, str, str, int]]:
    """(file, name, outcome, faults) of every case of the tests in `files`."""
    with tempfile.TemporaryDirectory() as folder:
        names = sorted({part for hazard in HAZARDS.values() for parts in hazard.values() for part in parts.split()})
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "not slow" if quick else "slow or not slow", "-k", " or ".join(names),
                        f"--junitxml={folder}/tests.xml", *(f"tests/test_{file}.py" for file in files)], cwd=ROOT)
        cases = xml.etree.ElementTree.parse(f"{folder}/tests.xml").iter("testcase")
        return [(case.get("classname").rpartition("test_")[2], case.get("name"),
                 next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"),
                 sum(int(entry.get("value")) for entry in case.iter("property") if entry.get("name") == "faults") or 1) for case in cases]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="leave out the tests of minutes")
    parser.add_argument("--out", type=out_folder, help="folder for faults.json; none is written without it")
    own = parser.parse_args(sys.argv[1:])
    files = sorted({file for hazard in HAZARDS.values() for file in hazard})
    cases, rows = run(own.quick, files), []
    for title, hazard in HAZARDS.items():
        mine = [(re.sub(r"\[.*", "", name), outcome, count) for file, name, outcome, count in cases if wanted(hazard, file, name)]
        ran = [entry for entry in mine if entry[1] != "skipped"]
        rows.append({"hazard": title, "tests": sorted({name for name, *_ in ran}), "skipped": len(mine) - len(ran),
                     "injected": sum(count for *_, count in ran), "survived": sum(count for _, outcome, count in ran if outcome == "passed")})
    injected, survived = (sum(row[key] for row in rows) for key in ("injected", "survived"))
    print("\n| hazard | injected | survived | tests |\n|---|---|---|---|")
    for row in rows:
        skipped = f"; {row['skipped']} skipped" if row["skipped"] else ""
        print(f"| {row['hazard']} | {row['injected']} | {row['survived']} | {len(row['tests'])}{skipped} |")
    print(f"\n{survived:,} of {injected:,}: faults injected, survived, nothing lost")
    keep(own.out, "faults", "", {"injected": injected, "survived": survived, "rows": rows})
    return 0 if survived == injected and all(row["tests"] for row in rows) else 1


if __name__ == "__main__":
    runtime.run_program(main)
