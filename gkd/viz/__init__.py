"""Reports, pictures and tables of runs. Drawing needs matplotlib (the extra ``viz``), tables do not."""

from gkd.viz.collect import GraphPair, Views, collect_views, count_confusion
from gkd.viz.comparison import write_comparison
from gkd.viz.curves import draw_accuracies, draw_losses, draw_method_curves
from gkd.viz.graphs import draw_graph_pair, draw_spectra, spectral_layout
from gkd.viz.images import draw_attention, draw_confusion
from gkd.viz.report import read_run, render_report, write_report
from gkd.viz.sweeps import draw_cost_accuracy, draw_heatmap, draw_points
from gkd.viz.table import Comparison, Run, compare

__all__ = [
    "Comparison",
    "GraphPair",
    "Run",
    "Views",
    "collect_views",
    "compare",
    "count_confusion",
    "draw_accuracies",
    "draw_attention",
    "draw_confusion",
    "draw_cost_accuracy",
    "draw_graph_pair",
    "draw_heatmap",
    "draw_losses",
    "draw_method_curves",
    "draw_points",
    "draw_spectra",
    "read_run",
    "render_report",
    "spectral_layout",
    "write_comparison",
    "write_report",
]
