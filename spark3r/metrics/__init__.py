"""Depth, pose, trajectory and point metrics, and consistency. They need torch only.

Angles are in degrees, sizes and shares are fractions, extrinsics map world to camera in OpenCV
axes, intrinsics are in pixels (`spark3r.geometry` states the conventions). Functions named
``..._metrics`` take one clip and return a frozen record of plain numbers. The others take tensors
with leading batch dimensions where their docstrings show ``...``. NaN and infinite values are
errors. A figure that a clip leaves undetermined has a defined value, and the record says so in
``degenerate`` (or holds None).
"""

from __future__ import annotations

from ..geometry import camera_centres, invert_pose, pixel_grid, project, unproject
from .alignment import Alignment, Similarity, align_trajectories, umeyama
from .consistency import ConsistencyMetrics, collapsed, consistency_metrics, key_frame_indices
from .depth import DepthAlignment, DepthMetrics, depth_metrics, log_depth_deviation, median_scale
from .points import PointMetrics, nearest_distances, point_deviation, point_metrics, scene_size
from .pose import (
    PairErrors,
    PoseMetrics,
    direction_angle_deg,
    frame_pairs,
    pose_auc,
    pose_metrics,
    relative_pose_errors,
    rotation_angle_deg,
)
from .suspects import FrameFigures, frame_figures, suspects
from .trajectory import TrajectoryMetrics, scale_drift, trajectory_metrics

__all__ = [
    "Alignment",
    "ConsistencyMetrics",
    "DepthAlignment",
    "DepthMetrics",
    "FrameFigures",
    "PairErrors",
    "PointMetrics",
    "PoseMetrics",
    "Similarity",
    "TrajectoryMetrics",
    "align_trajectories",
    "camera_centres",
    "collapsed",
    "consistency_metrics",
    "depth_metrics",
    "direction_angle_deg",
    "frame_figures",
    "frame_pairs",
    "invert_pose",
    "key_frame_indices",
    "log_depth_deviation",
    "median_scale",
    "nearest_distances",
    "pixel_grid",
    "point_deviation",
    "point_metrics",
    "pose_auc",
    "pose_metrics",
    "project",
    "relative_pose_errors",
    "rotation_angle_deg",
    "scale_drift",
    "scene_size",
    "suspects",
    "trajectory_metrics",
    "umeyama",
    "unproject",
]
