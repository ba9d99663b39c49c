"""Is the merged engine as fast as the unadapted one? Measuring, deciding, reporting.

``equivalence`` is the statistics, ``harness`` takes the samples, ``verdict`` judges them, ``report`` keeps them.
"""
