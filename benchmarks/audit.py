# SPDX-License-Identifier: Apache-2.0
"""The cost of the audit: whole calls of the tests' tiny pipelines, with check="off" and with check="first".

A row is a pipeline. Passes are those of the loop's body; checks are the network calls that evaluate a state again by itself, to
compare it; rows are states at which the network was evaluated, those of both included. Milliseconds are those of the fastest of
a few calls, on networks that cost next to nothing: what is left is the bookkeeping of the loop and of the audit.

    python benchmarks/audit.py --quick
    python benchmarks/audit.py --json benchmarks/results/audit.json

The second one also writes the table of docs/pipelines.md.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from harness import ROOT, Results, Row, options, show

from paradiff import parallelize, parasolver
from paradiff.chain.slope import freeze_epsilon

sys.path.insert(0, str(ROOT / "tests"))
from tiny import CASES

PIPELINES = (
    "sd",
    "sd_euler_ancestral",
    "sdxl",
    "flux",
    "qwen",
    "sd_inpaint4",
    "sd_controlnet",
    "sd3_skip_layers",
    "wan22",
    "ltx_image_to_video",
    "z_image",
    "cogvideox",
)
METHOD = parasolver(tolerance=1e-4, slope=freeze_epsilon)
COLUMNS = ("pipeline", "executor", "steps", "passes", "passes_before", "checks", "rows", "rows_before", "ms", "ms_before")


def measure(name: str, repeats: int) -> Row:
    """The reports of one pipeline's calls, without and with the audit."""
    case, found = CASES[name], {}
    executor: Any = "auto"
    for check in ("first", "off"):
        pipe: Any = case.make()
        with parallelize(pipe, METHOD, check=check, executor=executor) as run:
            for _ in range(repeats):
                case.run(pipe)
        found[check], executor = run.reports, run.report.executor  # without the audit, mixed windows lead to the plain call
    before, after = found["off"][-1], found["first"][-1]
    return {
        "pipeline": name,
        "executor": after.executor,
        "steps": after.steps,
        "passes": after.passes,
        "passes_before": before.passes,
        "checks": after.checks,
        "rows": after.rows,
        "rows_before": before.rows,
        "ms": round(1000 * min(report.seconds for report in found["first"]), 1),
        "ms_before": round(1000 * min(report.seconds for report in found["off"]), 1),
    }


TITLES = (
    "pipeline",
    "executor",
    "steps",
    "passes, without the audit",
    "network checks",
    "rows, without both",
    "ms a call, without both",
)
HEAD = f"| {' | '.join(TITLES)} |"
PAGE, JSON = ROOT / "docs/pipelines.md", ROOT / "benchmarks/results/audit.json"


def with_table(page: str, rows: list[Row]) -> str:
    """The page with the table of these rows."""
    before, _, rest = page.partition(HEAD)
    lines = [HEAD, "|" + "---|" * len(TITLES)]
    for row in rows:
        pairs = [f"{row[name]:.0f}, {row[name + '_before']:.0f}" for name in ("passes", "rows", "ms")]
        cells = [row["pipeline"], row["executor"], row["steps"], pairs[0], row["checks"], *pairs[1:]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return before + "\n".join(lines) + "\n\n" + rest.partition("\n\n")[2]


def main() -> None:
    given = options(__doc__, PIPELINES)
    warnings.simplefilter("ignore")
    results = Results(given.json, given.keep)
    for name in given.only:
        results.drop([row for row in results.rows if row["pipeline"] != name])
        results.add(measure(name, 2 if given.quick else 5))
    results.save()
    if given.json is not None and given.json.resolve() == JSON:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), results.rows), encoding="utf-8")
    show(results.rows, COLUMNS)


if __name__ == "__main__":
    main()
