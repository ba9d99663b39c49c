"""The forms of a task's graph beside its own: unadapted, unmerged, with bottlenecks, with all its weights dense."""
