"""The tables of a soak."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.machine import machine_lines
from benchmarks.table import number, table

if TYPE_CHECKING:
    from benchmarks.soak import Soak
    from tests.faults.planted import Control

_SETTLED_AFTER_S = 120.0


def report(soak: Soak, control: Control, generator_cores: float, load: float) -> str:
    """Return the report in Markdown."""
    tally, memory = soak.asker.tally, soak.memory.of_the_last(_SETTLED_AFTER_S)
    notes = [
        f"The real service under its supervisor, two models; {number(soak.rate)} requests/s at random times, {load:.0%} of "
        f"what it was seen to answer, and bursts; the generator used {number(generator_cores)} cores",
        "Every vector is compared with that of its text, which was computed by the same service beforehand, alone; "
        "cosine above 0.999, and no two texts are that alike",
        "429, 503 and broken connections are asked again until they are answered; 503 only counts as expected while a "
        "model is loaded anew, a broken connection only while the process is being replaced, 504 only where the model's "
        "queue was full meanwhile",
        "The process is killed in the first 40 % of the time only: memory is that of the process that served from then on",
    ]
    loads = control.events("load")
    pids = {event["pid"] for event in loads}
    first_loads = {(event["pid"], event["alias"]) for event in loads}
    result = [
        ["minutes", number(soak.elapsed_s / 60)],
        ["requests", f"{tally.requests:,}"],
        ["answered as they must be", f"{tally.answered:,}"],
        ["given up by the client", f"{tally.hung_up:,}"],
        ["**wrong answers**", f"{tally.wrong:,}"],
        ["**lost answers**", f"{tally.lost:,}"],
        ["**unexpected statuses**", f"{tally.unexpected:,}"],
        *([f"asked again: {why}", f"{times:,}"] for why, times in sorted(tally.asked_again.items())),
        ["processes that served", f"{len(pids):,}"],
        ["models loaded anew within a process", f"{len(loads) - len(first_loads):,}"],
    ]
    planted = soak.planter.planted | _by_text(control)
    resident = [
        [f"{number(memory.settled_after_s)} s after its start", number(memory.settled)],
        ["at the end", number(memory.end)],
        ["highest", number(memory.highest)],
        ["highest of any process", number(soak.memory.highest())],
        ["**end ÷ after its start**", f"{memory.ratio:.2f}"],
    ]
    parts = [
        "# Soak",
        "\n".join(machine_lines("benchmarks.soak", notes)),
        "## Result",
        table(["", "count"], result),
        "## Answers by status",
        table(
            ["Status", "answers"],
            [[str(status), f"{count:,}"] for status, count in sorted(tally.statuses.items())],
        ),
        "## Faults",
        table(["Planted", "times"], [[kind, f"{count:,}"] for kind, count in sorted(planted.items())]),
        "## Requests by kind",
        table(["Kind", "requests"], [[kind, f"{count:,}"] for kind, count in tally.kinds.most_common()]),
        "## Resident memory",
        f"Of the process that served the last {number(memory.lived_s / 60)} minutes, in MiB:",
        table(["", "MiB"], resident),
        f"By tenths of that time: {', '.join(map(number, memory.course))}.",
    ]
    if tally.examples:
        parts += ["## What went wrong", "\n".join(f"- {line}" for line in tally.examples)]
    return "\n\n".join(parts)


def _by_text(control: Control) -> dict[str, int]:
    """Count the forward passes that failed for a word in a text; a batch that is halved counts each time."""
    counts: dict[str, int] = {}
    for event in control.events("fault"):
        name = f"forward passes: {event['kind']}"
        counts[name] = counts.get(name, 0) + 1
    return counts
