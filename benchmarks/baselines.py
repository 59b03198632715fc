"""The baselines of an exported schedule: those that are at least as fast as it."""

from __future__ import annotations

from calibrate.report.result import Calibration
from calibrate.search.baselines import paper_schedules, uniform_schedules
from calibrate.settings import OPERATORS
from calibrate.verify.held_out import VerifiedSchedule
from spark3r import Schedule
from spark3r.layout import TokenLayout


def comparable_baselines(found: Calibration, short: TokenLayout) -> dict[str, Schedule]:
    """Return the frontiers of paper and uniform schedules at the latency that ours measured.

    The latency model may be some percent off, and not by as much for all operators, and a few
    timings beside ours are as well. A baseline is let in if either has it take no longer: what the
    model says of both, or what it says scaled, of the paper's operators to the paper finalist as it
    was measured beside ours, and of the others to ours.

    Args:
        found: A calibration that exported a schedule.
        short: Token layout of the shortest clip, which bounds the factors.
    """
    model, layout = found.latency.model, found.latency.layout
    measured = {each.name: each for each in found.verification.schedules}
    ours, paper = measured[found.chosen.name], measured.get("paper")

    def predicted_ms(schedule: Schedule) -> float:
        """Return what is predicted beyond the wall."""
        return model.predict_ms(schedule, layout) - model.wall_ms(layout)

    def taken_ms(each: VerifiedSchedule) -> float:
        assert each.latency is not None
        return each.latency.median_ms - found.wall_ms

    gains = dict.fromkeys(OPERATORS, taken_ms(ours) / predicted_ms(ours.schedule))
    if paper is not None:
        gains[paper.schedule.operators] = taken_ms(paper) / predicted_ms(paper.schedule)

    def fits(schedule: Schedule) -> bool:
        taken = predicted_ms(schedule)
        return taken <= predicted_ms(ours.schedule) or (
            gains[schedule.operators] * taken <= taken_ms(ours)
        )

    depth, length = len(ours.schedule.layers), ours.schedule.length
    return {
        **paper_schedules(depth, found.sensitive, length, short, fits),
        **uniform_schedules(depth, OPERATORS, length, short, fits),
    }
