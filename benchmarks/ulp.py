"""How far the elementary functions of the kernels are off, at every float32 there is, for every instruction set.

    make exhaustive          # builds hcmen_ops_test, and runs this

The oracle is the C library's function of the float64. A unit is one in the last place of float32 at the exact value,
subnormals included. What is allowed is in runtime/csrc/kernels_test.cc; a function beyond it fails the run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from machine import describe

LINE = re.compile(r"^(\w+) (.+): at most ([\d.]+) units in the last place, at (\S+)$", re.M)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("program", type=Path, help="hcmen_ops_test")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args()
    command = [str(options.program), "exhaustive", str(options.threads)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    sys.stdout.write(printed)
    if not printed.endswith("\n0 failures\n"):
        sys.exit("not every function is within its bound, or the run did not end")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for isa, function, units, at in LINE.findall(printed):
        found.setdefault(isa, {})[function] = {"most_units_in_the_last_place": float(units), "at": float(at)}
    if options.out:
        document = {
            "schema_version": 1,
            "machine": describe(),
            "values": 2**32,
            "unchecked_range": "exp2 (fast): |x| < 100",
            "instruction_sets": found,
        }
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
