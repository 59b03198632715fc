"""Baselines of an exported schedule: paper and uniform schedules that are at least as fast."""

from __future__ import annotations

from calibrate import Calibration
from calibrate.defaults import OPERATORS
from calibrate.search.baselines import paper_schedules, uniform_schedules
from calibrate.verify.held_out import VerifiedSchedule
from spark3r import Schedule, TokenLayout


def comparable_baselines(found: Calibration, short: TokenLayout) -> dict[str, Schedule]:
    """Return the frontiers of paper and uniform schedules at the latency of the exported one.

    The latency model has an error of some percent, which differs between operators, and so have the
    few timings. A schedule is admitted if one of two estimates says that it is fast enough: the
    latency model's for both; or the latency model's scaled to measurements, for the paper's
    operators to the paper finalist's latency and for the others to the exported schedule's.

    Args:
        found: A calibration that exported a schedule.
        short: Token layout of the shortest clip, which limits the factors.
    """
    model, layout = found.latency.model, found.latency.layout
    measured = {each.name: each for each in found.verification.schedules}
    ours, paper = measured[found.chosen.name], measured.get("paper")

    def predicted_ms(schedule: Schedule) -> float:
        """Return the predicted latency beyond the wall."""
        return model.predict_ms(schedule, layout) - model.wall_ms(layout)

    def measured_ms(each: VerifiedSchedule) -> float:
        """Return the measured latency beyond the wall."""
        assert each.latency is not None
        return each.latency.median_ms - found.wall_ms

    scales = dict.fromkeys(OPERATORS, measured_ms(ours) / predicted_ms(ours.schedule))
    if paper is not None:
        scales[paper.schedule.operators] = measured_ms(paper) / predicted_ms(paper.schedule)

    def fits(schedule: Schedule) -> bool:
        ms = predicted_ms(schedule)
        return ms <= predicted_ms(ours.schedule) or (
            scales[schedule.operators] * ms <= measured_ms(ours)
        )

    sensitive = found.sensitivities.sensitive if found.sensitivities else ()
    depth, length = len(ours.schedule.layers), ours.schedule.length
    return {
        **paper_schedules(depth, sensitive, length, short, fits),
        **uniform_schedules(depth, OPERATORS, length, short, fits),
    }
